"""How the gradients of a wide network come about: by one launch with tickets, or by `deltas` and what multiplies then.

That is `grouped_gemm`, or the library that torch's products are from. The way is taken that was measured to be the
shortest for a problem of about this size. What was not measured goes by one launch, or by the library if it is large.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from . import producer
from .launch_plan import LaunchPlan, gradient_tiles, that_fills
from .plan_gemm import choose_configs, choose_deltas, plan_grouped_gemm, plan_products
from .plan_wide import plan_two_phase, usable_two_phase
from .problem import GroupedProblem, Target

ONE, TWO, PRODUCTS = "one launch", "two launches", "the library's products"

MARGIN = 1.03
"""So much longer than another way may one launch take, and is still preferred."""

LEAST_FOR_PRODUCTS = 2**35
"""Multiplications and additions from which on the library is taken unmeasured; an estimate.

On an H200 its products took 13 to 16 % less than one launch from 2**35.7 on, and 31 % more for 2**32.8.
"""


class Measured(NamedTuple):
    """Microseconds of a backward pass whose tiles come by TMA, as a CUDA graph with a cold L2 cache."""

    network: str
    multiply_adds: int
    """Of all weight gradients together."""
    one_launch: float
    two_launches: float
    with_producer: float
    """Two launches, the second with a warp of its own for loads."""
    products: float


# An H200, Triton 3.6, cuBLAS of CUDA 13; bfloat16, parameters as well (bench/results/h200/times.json).
MEASURED: dict[tuple[int, str], tuple[Measured, ...]] = {
    (90, "half"): (
        Measured("784-2048x4-10 b=512", 512 * (784 * 2048 + 3 * 2048**2 + 10 * 2048), 66.9, 49.9, 54.0, 87.4),
        Measured("784-4096x4-10 b=1024", 1024 * (784 * 4096 + 3 * 4096**2 + 10 * 4096), 276.6, 200.1, 204.7, 240.2),
        Measured("784-4096x4-1000 b=1024", 1024 * (784 * 4096 + 3 * 4096**2 + 1000 * 4096), 396.8, 301.8, 305.7, 333.8),
        Measured("784-8192x4-10 b=4096", 4096 * (784 * 8192 + 3 * 8192**2 + 10 * 8192), 2956.6, 2385.8, 2382.2, 2494.4),
    ),
}


def plan_wide(problem: GroupedProblem, target: Target, why: str) -> LaunchPlan:
    """The launch or launches for a problem that δ is written to memory for; why: the reason for that."""
    nearest, unfit = _nearest(problem, target), _why_no_products(problem)
    two = _plan_two(problem, target) if nearest else None
    if nearest and two and two.uses_tma:
        way, words = _measured(nearest, unfit)
    else:
        way, words = _estimated(problem, target, unfit)
    if nearest and two and way == TWO:
        found, loads = _loaded(two, target, nearest)
        words += f"; {loads}"
    elif way == PRODUCTS:
        found = plan_products(problem, choose_deltas(problem, target), target)
    else:
        found = _plan_one(problem, target)
    return replace(found, why=f"{why}; {words}")


def _measured(nearest: Measured, unfit: str) -> tuple[str, str]:
    """The way that took least, and the times; unfit: why it cannot be the library's products, whatever they took."""
    times = {ONE: nearest.one_launch, TWO: nearest.two_launches, PRODUCTS: nearest.products}
    possible = [way for way in times if not (unfit and way == PRODUCTS)]
    way = min(possible, key=lambda way: times[way] / (MARGIN if way == ONE else 1))
    others = "".join(f", {name} {t:.0f}" for name, t in times.items() if name != way)
    return way, f"{way}, which took {times[way]:.0f} µs on an H200 for {nearest.network}{others}"


def _estimated(problem: GroupedProblem, target: Target, unfit: str) -> tuple[str, str]:
    """The way for what was not measured, and why."""
    unknown = f"nothing was measured on sm_{target.capability} in this precision"
    if (target.capability, problem.projected.arithmetic) in MEASURED:
        unknown = "nothing of this size and alignment was measured"
    if not unfit and (size := multiply_adds(problem)) < LEAST_FOR_PRODUCTS:
        unfit = f"{size} products, fewer than {LEAST_FOR_PRODUCTS}, are little for a launch each layer"
    if unfit:
        return ONE, f"in one launch, an estimate: {unknown}, and {unfit}"
    return PRODUCTS, f"by the library, an estimate: {unknown}, and it has tiles for every card"


def _why_no_products(problem: GroupedProblem) -> str:
    """Why the library's products are no good for this; empty if they are."""
    if problem.projected.arithmetic == "ieee":
        return "float32 in full took the library twice as long as strips on an H200"
    if problem.parameter_dtype != problem.projected.dtype:
        return "gradients in another dtype than the products' would be written twice"
    if problem.rule == "adamw" or (problem.rule != "store" and problem.numbers_in_memory):
        return "an update that no product can add to would read and write everything many times"
    return ""


def _plan_one(problem: GroupedProblem, target: Target) -> LaunchPlan:
    usable = usable_two_phase(problem, target)
    config = usable[that_fills([gradient_tiles(problem, c) for c in usable], target)]
    return plan_two_phase(problem, config, target)


def _plan_two(problem: GroupedProblem, target: Target) -> LaunchPlan:
    return plan_grouped_gemm(problem, *choose_configs(problem, target), target)


def _loaded(two: LaunchPlan, target: Target, nearest: Measured) -> tuple[LaunchPlan, str]:
    """The two launches, and why a warp of its own loads tiles in the second or not."""
    if nearest.with_producer >= nearest.two_launches:
        return two, f"no warp of its own loads the tiles, with which they took {nearest.with_producer:.0f} µs"
    if reason := producer.reason_without(two, target, producer.NO_GLUON):
        return two, f"no warp of its own loads the tiles: {reason}"
    with_producer = plan_grouped_gemm(two.problem, producer.CONFIG, choose_deltas(two.problem, target), target)
    return with_producer, f"a warp of its own loads the tiles, with which they took {nearest.with_producer:.0f} µs"


def _nearest(problem: GroupedProblem, target: Target) -> Measured | None:
    """What was measured nearest to this problem's size; None if it is smaller than half of everything measured."""
    size = multiply_adds(problem)
    rows = MEASURED.get((target.capability, problem.projected.arithmetic), ())
    rows = tuple(row for row in rows if 2 * size >= row.multiply_adds)
    return min(rows, key=lambda row: max(row.multiply_adds / size, size / row.multiply_adds), default=None)


def multiply_adds(problem: GroupedProblem) -> int:
    """Of all the weight gradients that are wanted."""
    layers = zip(problem.positions, problem.widths_in, problem.widths_out, strict=True)
    products = [t * width_in * width_out for t, width_in, width_out in layers]
    return problem.projected.rows * sum(n for i, n in enumerate(products) if problem.weights >> i & 1)
