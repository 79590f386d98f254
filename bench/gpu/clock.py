"""Seconds of a piece of work on a device: each variant in turn, by device events, from a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench.gpu.graphs import Work, nothing

FLUSH_BYTES = 256 * 2**20
"""Several times the largest cache."""


class Clock:
    """Measures on one device. On a CPU there is nothing to wait for, and the cache stays as it is."""

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self.on_gpu = device.type == "cuda"
        self._flush: Tensor | None = None
        if self.on_gpu:
            self._flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def flush(self) -> None:
        """Fills the cache with something else."""
        if self._flush is not None:
            self._flush.fill_(1)

    def once(self, run: Work, prepare: Work = nothing, waits_for_host: bool = True) -> float:
        """From the work's begin on the device to its end.

        waits_for_host: the device is idle when the work is handed over, so that the host's part counts; else it is
        still busy with the flush, and only the device's part does.
        """
        prepare()
        self.flush()
        if not self.on_gpu:
            return self.host(run)
        if waits_for_host:
            torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def burst(self, run: Work, times: int) -> float:
        """Per run, of many in a row, as in training."""
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            run()
        self.synchronize()
        return (time.perf_counter() - begin) / times

    def host(self, run: Work) -> float:
        """Until the call returns, whatever the device still has to do."""
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def in_turn(
    measures: Mapping[str, Callable[[], float]], seconds: float, least: int = 3, most: int = 30, warm_up: int = 2
) -> dict[str, list[float]]:
    """Each measure once a round, in rotated order, for about so many seconds."""
    names = list(measures)
    found: dict[str, list[float]] = {name: [] for name in names}
    begin = time.monotonic()
    for turn in range(warm_up + most):
        if turn >= warm_up + least and time.monotonic() - begin > seconds:
            break
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            value = measures[name]()
            if turn >= warm_up:
                found[name].append(value)
    return found
