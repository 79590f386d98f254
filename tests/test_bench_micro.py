"""The microbenchmarks: every operator is timed, a wrong result is not, and a later run finds the same names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.micro import conftest
from bench.micro.workloads import CASES
from bench.readme import ROOT

NETWORK = CASES[0].name
OPERATORS = {
    "test_layer_grads": ["torch"],
    "test_layer_update_": ["sgd-torch", "momentum-torch", "adamw-torch"],
    "test_project_taps": ["torch"],
    "test_project": [],
}
CHOSEN = (
    f"{NETWORK} and dense and (gaussian or rademacher) and not triton and not cpu"
    " or hadamard and float32 and torch and (64 or 1024) and not bfloat16"
)
# What is made from rademacher feedback is a thousandth off in its last number, and so are transforms of 64 numbers.
SPOILED = """
import dfa_kernels as dfa
from dfa_kernels.backends import torch_backend


def spoil(owner, name, is_wrong, last_of):
    right = getattr(owner, name)

    def spoiled(*arguments):
        result = right(*arguments)
        if is_wrong(arguments[0]):
            last_of(arguments, result).view(-1)[-1] *= 1.001
        return result

    setattr(owner, name, spoiled)


def from_signs(call):
    return "rademacher" in (getattr(call, "feedback", None) or call.spec).kind


spoil(torch_backend, "layer_grads", from_signs, lambda arguments, result: result[-1])
spoil(torch_backend, "layer_update_", from_signs, lambda arguments, result: arguments[1][-1])
spoil(torch_backend, "project_taps", from_signs, lambda arguments, result: result[-1])
spoil(torch_backend, "hadamard", lambda x: x.shape[-1] == 64, lambda arguments, result: result)
spoil(dfa.Feedback, "project", from_signs, lambda arguments, result: result)
"""


def names(kind: str, n: int) -> set[str]:
    """The chosen tests with this kind of feedback, and the transform of n numbers."""
    ids = {
        f"{test}[{'-'.join([NETWORK, kind, 'dense', *([last] if last else [])])}]"
        for test, ends in OPERATORS.items()
        for last in ends or [""]
    }
    return {*ids, f"test_hadamard_transform[{n}-float32-torch]"}


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without what disables benchmarks in those of pytest-xdist."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    short = ["--benchmark-max-time=0.001", "--benchmark-min-rounds=2", f"--benchmark-storage={folder}"]
    command = [sys.executable, "-m", "pytest", "bench/micro", "-p", "no:cacheprovider", *short, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("micro")


@pytest.fixture(scope="module")
def first(folder):
    """A run with some wrong results."""
    (folder / "spoiled.py").write_text(SPOILED)
    return run(folder, "-p", "spoiled", "-k", CHOSEN, f"--benchmark-json={folder / 'first.json'}")


@pytest.fixture(scope="module")
def written(folder, first):
    return json.loads((folder / "first.json").read_text())


def test_every_operator_that_is_right_is_timed(written):
    rows = {row["name"]: row for row in written["benchmarks"]}
    assert rows.keys() == names("gaussian", 1024)
    for row in rows.values():
        assert 0 < row["stats"]["min"] <= row["stats"]["median"]
        assert row["options"]["timer"] == "when_done"
        assert 0 <= row["extra_info"]["error"] <= row["extra_info"]["allowed"] < 1e-3
    assert rows[f"test_layer_grads[{NETWORK}-gaussian-dense-torch]"]["params"] == {
        "backend": "torch", "case": NETWORK, "form": ["gaussian", "dense"]
    }  # fmt: skip


def test_the_clock_is_read_when_the_gpu_is_done(monkeypatch):
    done = []
    monkeypatch.setattr(conftest, "ON_GPU", True)
    monkeypatch.setattr(conftest.torch.cuda, "synchronize", lambda: done.append("gpu"))
    monkeypatch.setattr(conftest.time, "perf_counter", lambda: len(done))
    assert conftest.when_done() == 1


def test_what_is_wrong_fails_without_a_time(first, written):
    assert first.returncode == 1
    failed = {line.split("::")[1].split(" - ")[0] for line in first.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == names("rademacher", 64)
    assert first.stdout.count("AssertionError: wrong: result 7 [10], off by") >= 4, first.stdout
    assert not failed & {row["name"] for row in written["benchmarks"]}


def test_the_file_says_what_it_was_measured_on(written):
    machine = written["machine_info"]
    assert {"device", "processor", "threads", "torch", "triton"} <= machine.keys()
    assert "commit" not in machine, "two commits would seem two machines"
    assert written["commit_info"]["id"]


def test_a_later_run_is_compared_by_name(folder, first):
    name = "test_hadamard_transform[1024-float32-torch]"
    later = run(folder, "-k", "hadamard and 1024 and float32 and torch", f"--benchmark-compare={folder / 'first.json'}")
    assert later.returncode == 0, later.stdout
    rows = [line for line in later.stdout.splitlines() if line.startswith(name)]
    assert sorted(row.split()[1] for row in rows) == ["(NOW)", "(first)"], later.stdout
    assert "machine_info is different" not in later.stdout + later.stderr
