"""Interleaved timing: every variant once a round, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Step = Callable[[], object]


def interleaved(steps: dict[str, Step], rounds: int, warm_up: int = 5, rotate: bool = True) -> dict[str, list[float]]:
    """Seconds of each call, by variant. The order rotates, so that no variant always follows the same one.

    Steps that build on each other need ``rotate=False``.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        first = turn % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            steps[name]()
            elapsed = time.perf_counter() - begin
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds by variant."""
    return {name: statistics.median(values) for name, values in seconds.items()}
