"""All variants of one case: each is checked, and what is right is timed in turn with the others."""

from __future__ import annotations

import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import Problem
from bench.gpu.clock import Clock, in_turn
from bench.gpu.kernel_times import compare_kernels, first_line, run_every_kernel
from bench.gpu.precision import tf32
from bench.gpu.reference import MissingResultsError, Reference, make_reference
from bench.gpu.regions import BP_COMPILED, REGIONS, STEP, UPDATE, Region, Regions, Variant, rule_of, variants_for

TIMED_LR = 1e-4
BURST, BURST_FLOPS = 20, 1e13
"""Steps in a row: this many, unless they are so large that fewer will do."""
COMPILE_SECONDS = 45.0

References = dict[tuple[str, bool], Reference]
"""By rule, and by whether the error is given."""


def measure_case(problem: Problem, clock: Clock, deadline: float, seconds: float) -> dict[str, Any]:
    """Checks and times everything on one problem; deadline: on time.monotonic, seconds: to spend on timing."""
    with tf32(problem.case.tf32):
        references = make_references(problem)
        regions, rows = check_all(problem, variants_for(problem), references, deadline)
        share = seconds / (len(REGIONS) + 1)
        burst = max(2, min(BURST, int(BURST_FLOPS / (2 * problem.case.weight_flops + problem.case.chain_flops))))
        for region in REGIONS:
            time_region(clock, region, regions, rows, share, burst)
        regions.clear()
        free()
        reference = references["DFA", True]
        return {
            "limits": problem.case.limits(),
            "regions": rows,
            "kernels": compare_kernels(problem, reference, clock, share),
        }


def make_references(problem: Problem) -> References:
    """One learning rate for a rule, so that a variant is made once for all its regions."""
    made = {(rule, given): make_reference(problem, rule, given) for rule in ("BP", "DFA") for given in (False, True)}
    for rule in ("BP", "DFA"):
        rate = max(made[rule, given].learning_rate for given in (False, True))
        for given in (False, True):
            made[rule, given].learning_rate = rate
    return made


def check_all(
    problem: Problem, named: dict[str, Variant], references: References, deadline: float
) -> tuple[dict[str, Regions], dict[str, dict[str, Any]]]:
    """The regions that are right, by variant, made for timing; and for each region a row for every variant."""
    regions: dict[str, Regions] = {}
    rows: dict[str, dict[str, Any]] = {region: {} for region in REGIONS}
    for name, variant in named.items():
        found = check_variant(problem, name, variant, references, deadline)
        for region, row in found.items():
            rows[region][name] = row
        right = [region for region, row in found.items() if row["correct"]]
        try:
            made = variant(problem, TIMED_LR) if right else {}
            regions[name] = {region: made[region] for region in right}
        except Exception as failure:
            for region in right:
                rows[region][name]["reason"] = first_line(failure)
            fail_if_device_is_lost(problem)
    return regions, rows


def check_variant(
    problem: Problem, name: str, variant: Variant, references: References, deadline: float
) -> dict[str, dict[str, Any]]:
    """A row for each region that the variant has; one for "step" if it cannot be made at all."""
    rule = rule_of(name)
    try:
        with guarded(name, deadline):
            made = variant(problem, references[rule, False].learning_rate)
            found = {
                region: check_region(problem, made[region], references[rule, region != STEP], region) for region in made
            }
    except Exception as failure:
        found = {STEP: {"correct": False, "reason": first_line(failure)}}
        fail_if_device_is_lost(problem)
    free()
    return found


def fail_if_device_is_lost(problem: Problem) -> None:
    """After some errors nothing runs any more in this process, and everything else would seem wrong."""
    if problem.on_gpu:
        torch.cuda.synchronize()


def check_region(problem: Problem, region: Region, reference: Reference, name: str) -> dict[str, Any]:
    """Runs it twice, each time from the initial weights and with old gradients poisoned."""

    def compute() -> list[Tensor]:
        problem.restore(region.net)
        region.prepare()
        for p in region.net.parameters():
            if p.grad is not None:
                p.grad.fill_(math.nan)
        region.run()
        return region.results()

    try:
        return reference.check(compute, updated=name in (STEP, UPDATE)).row()
    except MissingResultsError as failure:
        return {"correct": False, "reason": str(failure)}


def time_region(
    clock: Clock, name: str, regions: dict[str, Regions], rows: dict[str, dict[str, Any]], seconds: float, burst: int
) -> None:
    """Steps in a row, as in training; the others one at a time, from a cold cache. Seconds go into the rows."""
    there = {variant: made[name] for variant, made in regions.items() if name in made}
    measures = {variant: _measure(clock, name, region, burst) for variant, region in there.items()}
    for variant, values in in_turn(measures, seconds).items():
        rows[name][variant]["seconds"] = statistics.median(values)
        rows[name][variant]["rounds"] = len(values)


def _measure(clock: Clock, name: str, region: Region, burst: int) -> Callable[[], float]:
    if name == STEP:
        return lambda: clock.burst(region.run, burst)
    return lambda: clock.once(region.run, region.prepare, waits_for_host=not region.graphed)


def build_only(problem: Problem) -> None:
    """Fills the compilers' caches on disk, one variant after the other."""
    with tf32(problem.case.tf32):
        for name, variant in variants_for(problem).items():
            try:
                for region in variant(problem, TIMED_LR).values():
                    region.prepare()
                    region.run()
            except Exception as failure:
                print(f"{problem.case.name}, {name}: {first_line(failure)}")
            free()
        run_every_kernel(problem)


@contextmanager
def guarded(name: str, deadline: float) -> Iterator[None]:
    """TimeoutError if the compiler takes too long, or if there is too little time left for it."""
    if name != BP_COMPILED:
        yield
        return
    left = min(COMPILE_SECONDS, deadline - time.monotonic())
    if left < COMPILE_SECONDS / 3:
        raise TimeoutError(f"not built: {left:.0f} s left")

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"not built within {left:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free() -> None:
    """Gives memory back before the next variant takes its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
