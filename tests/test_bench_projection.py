"""The projection's benchmark: every form is held to float64, and what is wrong gets no time."""

from __future__ import annotations

import json

import pytest

import dfa_kernels as dfa
from bench.cpu import projection


def test_every_form_is_right_and_timed(tmp_path, capsys):
    assert projection.main(["--units", "5000", "--batch", "3", "--rounds", "1", "--out", str(tmp_path / "p.json")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "p.json").read_text())["rows"]}
    assert list(rows) == [projection.PRODUCT, *(", ".join(form) for form in projection.FORMS)]
    assert all(row["correct"] and row["ms"] > 0 for row in rows.values())
    assert rows["gaussian, dense"]["kept_bytes"] == 5000 * 1000 * 4
    assert rows["fastfood, dense"]["kept_bytes"] == 5 * 1024 * 13
    assert rows["fastfood, procedural"]["kept_bytes"] == 0
    assert rows["fastfood, dense"]["target"] == 5
    assert capsys.readouterr().out.count(" times as fast as the product") == 6


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sparse", "fastfood"])
def test_what_is_wrong_is_not_timed(kind, monkeypatch, capsys):
    project = dfa.Feedback.project

    def spoiled(self, error, size):
        result = project(self, error, size)
        if self.spec.kind == kind:
            result[-1, -1] += 1
        return result

    monkeypatch.setattr(dfa.Feedback, "project", spoiled)
    assert projection.main(["--units", "2000", "--batch", "2", "--rounds", "1"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{kind}, dense"))
    assert line.endswith("not timed")
    assert "wrong result (off by 1)" in line or "wrong result (off by 1.0" in line
