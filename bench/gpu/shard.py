"""A pytest plugin: one part of the tests, and a line of JSON for each as it begins and ends.

pytest -p bench.gpu.shard --shard 2/8 --shard-log FILE
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


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
    left_out = [item for i, item in enumerate(items) if i % parts != index]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[index::parts]


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
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self._write(report.nodeid, report.outcome, report.duration, why)

    def _write(self, test: str, outcome: str, seconds: float, why: str = "") -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 2), "why": why[-400:]}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
