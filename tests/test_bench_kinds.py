"""The table of kinds and storages: what is read from finished runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.learn import kinds
from bench.learn.kinds import Job
from dfa_kernels.feedback.spec import KINDS, STORAGES


def write_run(job: Job, runs: Path, **changes: Any) -> None:
    """A run whose test accuracy is 0.40 and a hundredth more for every seed, in sparse feedback 0.1 less."""
    test = 0.4 + 0.01 * job.seed - (0.1 if job.kind == "sparse" else 0)
    alignment = {f"fc{i}": {"mean": i / 10, "std": 0.5} for i in (1, 2, 3)}
    result = {
        "interrupted": False,
        "failure": None,
        "options": {
            "feedback": job.kind, "storage": job.storage, "seed": job.seed, "published": True, "epochs": 50,
        },
        "environment": {"commit": "abc"},
        "history": {"dfa": [{"test_accuracy": test, "by": job.storage if job.kind == "uniform" else ""}]},
        "feedback_bytes": {"in_use": 7},
        "results": {
            "dfa": {
                "test_accuracy": {"final": test, "best": 0.9},
                "train_accuracy": {"final": 0.8, "best": 0.9},
                "alignment": alignment,
            }
        },
    }  # fmt: skip
    job.folder(runs).mkdir(parents=True)
    (job.folder(runs) / "run.json").write_text(json.dumps(result | changes))


def test_finished_runs_become_the_table(tmp_path, capsys):
    for kind in KINDS:
        for storage in STORAGES:
            for seed in (0, 1) if storage == "procedural" else (0, 1, 2):
                write_run(Job(kind, storage, seed), tmp_path / "runs")
    assert kinds.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--procedural-seeds", "0,1"]) == 0
    table = capsys.readouterr().out.splitlines()
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]}
    assert list(lines) == ["paper", *KINDS]
    alignment = ["0.100 (0.000)", "0.200 (0.000)", "0.300 (0.000)"]
    assert lines["gaussian"] == ["41.00 (1.00)", "80.00 (0.00)", *alignment, "the same, bit for bit (seeds 0, 1)"]
    assert lines["sparse"] == ["31.00 (1.00)", "80.00 (0.00)", *alignment, "the same, bit for bit (seeds 0, 1)"]
    assert lines["uniform"] == ["41.00 (1.00)", "80.00 (0.00)", *alignment, "test 40.50 (0.71) (seeds 0, 1)"]
    result = json.loads((tmp_path / "kinds.json").read_text())
    assert len(result["rows"]) == len(KINDS) * len(STORAGES)
    assert {tuple(row["best_test"]) for row in result["rows"]} == {(0.9, 0.0)}
    assert {tuple(row["commits"]) for row in result["rows"]} == {("abc",)}


@pytest.mark.parametrize("changes", [{"interrupted": True}, {"failure": "the loss became nan"}])
def test_a_run_that_did_not_end_is_not_finished(tmp_path, changes):
    write_run(Job("gaussian", "dense", 0), tmp_path, **changes)
    assert kinds.finished(Job("gaussian", "dense", 0), tmp_path) is None
    assert kinds.finished(Job("gaussian", "dense", 1), tmp_path) is None


def test_a_run_of_other_settings_is_refused(tmp_path):
    job = Job("gaussian", "dense", 0)
    write_run(job, tmp_path)
    path = job.folder(tmp_path) / "run.json"
    result = json.loads(path.read_text())
    result["options"]["epochs"] = 3
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="of 3 epochs, expected Job"):
        kinds.finished(job, tmp_path)


def test_an_unfinished_run_goes_on(tmp_path):
    job = Job("sparse", "procedural", 4)
    assert job.argv(tmp_path, Path("data"))[:3] == ["--published", "--rule", "dfa"]
    job.folder(tmp_path).mkdir()
    (job.folder(tmp_path) / "checkpoint.pt").touch()
    assert job.argv(tmp_path, Path("data"))[:2] == ["--resume", str(job.folder(tmp_path) / "checkpoint.pt")]
