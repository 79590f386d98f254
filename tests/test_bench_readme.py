"""The README's tables are those of the committed results."""

from __future__ import annotations

import json

import pytest

from bench.gpu import tables
from bench.readme import PAGES, ROOT, TABLES, with_table, with_tables

BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
RESULTS = ROOT / "bench" / "results"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_up_to_date(page):
    text = (ROOT / page).read_text()
    assert with_tables(text, RESULTS) == text, "results have changed: run python -m bench.readme"


@pytest.mark.parametrize("name", TABLES)
def test_every_table_stands_on_one_page(name):
    assert sum(f"<!-- {name} -->" in (ROOT / page).read_text() for page in PAGES) == 1


@pytest.mark.parametrize("name", TABLES)
def test_results_are_of_a_commit(name):
    """Kinds are trained over hours, a commit each; see its rows."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert "dirty" not in json.dumps([result["environment"], result["rows"] if name == "cpu/kinds" else None])


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_whole(name):
    result = json.loads((RESULTS / f"{name}.json").read_text())
    lines = TABLES[name](result).splitlines()
    assert len(lines) > 2
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_a_wrong_result_has_no_speed():
    right, wrong = {"correct": True, "seconds": 1234.4e-6}, {"correct": False, "error": 1.0, "allowed": 0.1}
    names = [f"{name}{graphed}" for name in ("BP", "δ + cuBLAS by hand", "dfa.DFA") for graphed in ("", ", graphed")]
    rows = {**dict.fromkeys(names, right), "dfa.DFA, graphed": wrong}
    regions = dict.fromkeys(("backward", "backward+update", "step"), rows)
    table = tables.times({"time": {"items": {"ceilings": {"bytes": 1.0}, "a network": {"regions": regions}}}})
    half, whole = "1,234 / 1,234 / wrong", "1,234 / 1,234 / 1,234"
    assert table.splitlines()[2:] == [f"| a network | {half} | {half} | {half} | {whole} |"]

    forms = {"function": "project_taps", "feedback": "sparse, dense"}
    table = tables.projection(
        {"rows": [{**forms, "precision": "tf32", "correct": False}, {**forms, "precision": "float32", "correct": True}]}
    )
    assert table.splitlines()[2:] == [
        "| `e @ U.T` | – / – |", "| one launch | wrong / – |", "| `Feedback.project` | – / – |"
    ]  # fmt: skip


def test_the_results_count_the_gpu_tests():
    first, *mended = json.loads((RESULTS / "h200" / "tests.json").read_text())["runs"]
    passed, failed, skipped = first["passed"], first["failed"], first["skipped"]
    said = " ".join((RESULTS / "README.md").read_text().split())
    assert f"All {passed + failed + skipped} GPU tests ran on commit {first['commit'][:7]}: {passed} passed" in said
    assert f"and {failed} failed" in said
    assert not any(run["failed"] for run in mended)


def test_the_table_takes_the_place_of_the_old_one():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n<!-- memory -->\nother\n<!-- /memory -->\n"
    expected = f"before\n{BEGIN}\n| new |\n{END}\nafter\n<!-- memory -->\nother\n<!-- /memory -->\n"
    assert with_table(text, "speed", "| new |") == expected
    assert with_table(expected, "speed", "| new |") == expected


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}" * 2])
def test_text_without_the_marks(text):
    with pytest.raises(ValueError, match=r"expected <!-- speed --> and then <!-- /speed -->"):
        with_table(text, "speed", "table")
