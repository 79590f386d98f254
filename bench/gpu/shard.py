"""A pytest plugin: one part of the tests, and a line of JSON for each as it begins and ends.

pytest -p bench.gpu.shard --shard=2/8 --shard-log=FILE

Tests that are in the file already have been begun by a process that one of them ended, and are left out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

DEVICE_LOST, LONGEST_WHY = 70, 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="I/N: every N-th of the chosen tests, from the I-th on")
    parser.addoption("--shard-log", type=Path, help="where the lines go")


def pytest_configure(config: pytest.Config) -> None:
    log = config.getoption("--shard-log")
    if log is not None:
        config.pluginmanager.register(_Recorder(log), "shard-recorder")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, parts = map(int, config.getoption("--shard").split("/"))
    begun = _begun(config.getoption("--shard-log"))
    chosen = {item.nodeid for item in items[index::parts]} - begun
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]


def _begun(log: Path | None) -> set[str]:
    """The tests that an earlier process of the same part has begun."""
    lines = log.read_text().splitlines() if log is not None and log.exists() else []
    return {json.loads(line)["test"] for line in lines}


def _leave_if_device_is_lost() -> None:
    """After some errors every further test of the process would fail, whatever it tests."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(DEVICE_LOST)


class _Recorder:
    def __init__(self, log: Path) -> None:
        self.log = log

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid or "collection", "failed", 0.0, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "began", 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test has up to three reports; what decides is its own, or the failure of what comes before and after.
        if report.when == "call" or report.outcome != "passed":
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            self._write(report.nodeid, report.outcome, report.duration, why)
        if report.failed:
            _leave_if_device_is_lost()

    def _write(self, test: str, outcome: str, seconds: float, why: str = "") -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "why": why[-LONGEST_WHY:]}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
