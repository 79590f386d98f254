"""Which launches compute the gradients of a wide network: one by tickets, or `deltas` and then `grouped_gemm`.

One launch is the default: two replace it where they were measured to be shorter, for a problem of about this size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from . import producer
from .launch_plan import LaunchPlan, gradient_tiles, that_fills
from .plan_gemm import choose_configs, plan_grouped_gemm
from .plan_wide import plan_two_phase, usable_two_phase
from .problem import GroupedProblem, Target

MARGIN = 1.03
"""So much longer than two launches may one take, and is still preferred."""


class Measured(NamedTuple):
    """Microseconds of a backward pass whose tiles come by TMA, as a CUDA graph with a cold L2 cache."""

    network: str
    multiply_adds: int
    """Of all weight gradients together."""
    one_launch: float | None
    """None where it was not measured; it was the longer one wherever it was."""
    two_launches: float


# An H200, prototypes of the kernels. `deltas` and then cuBLAS for every layer took 62.5, 231, 247 and 2595 µs, so that
# way is not here.
MEASURED: dict[tuple[int, str], tuple[Measured, ...]] = {
    (90, "half"): (
        Measured("784-2048x4-10 b=512", 512 * (784 * 2048 + 3 * 2048**2 + 10 * 2048), None, 59.9),
        Measured("784-4096x4-10 b=1024", 1024 * (784 * 4096 + 3 * 4096**2 + 10 * 4096), 245.6, 225.6),
        Measured("784-4096x4-1000 b=1024", 1024 * (784 * 4096 + 3 * 4096**2 + 1000 * 4096), 299.6, 240.2),
        Measured("784-8192x4-10 b=4096", 4096 * (784 * 8192 + 3 * 8192**2 + 10 * 8192), 2784.4, 2576.3),
    ),
}


def plan_wide(problem: GroupedProblem, target: Target, why: str) -> LaunchPlan:
    """The launch or launches for a problem that δ is written to memory for; why: the reason for that."""
    nearest = _nearest(problem, target)
    if nearest:
        two, words = _plan_two(problem, target)
        short = nearest.one_launch is None or nearest.one_launch > MARGIN * nearest.two_launches
        if two.uses_tma and short:
            return replace(two, why=f"{why}; {_in_words(nearest)}; {words}")
    usable = usable_two_phase(problem, target)
    config = usable[that_fills([gradient_tiles(problem, c) for c in usable], target)]
    return replace(plan_two_phase(problem, config, target), why=f"{why}; {_why_one_launch(problem, target)}")


def _plan_two(problem: GroupedProblem, target: Target) -> tuple[LaunchPlan, str]:
    """Two launches, and why a warp of its own loads tiles in the second or not."""
    gemm, deltas = choose_configs(problem, target)
    plain = plan_grouped_gemm(problem, gemm, deltas, target)
    if reason := producer.reason_without(plain, target, producer.NO_GLUON):
        return plain, f"no warp of its own loads the tiles: {reason}"
    return plan_grouped_gemm(problem, producer.CONFIG, deltas, target), producer.FASTER


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


def _in_words(nearest: Measured) -> str:
    two = f"two launches, which took {nearest.two_launches:.0f} µs on an H200 in a prototype for {nearest.network}"
    return two if nearest.one_launch is None else f"{two}, one {nearest.one_launch:.0f} µs"


def _why_one_launch(problem: GroupedProblem, target: Target) -> str:
    if (target.capability, problem.projected.arithmetic) not in MEASURED:
        return f"in one launch, an estimate: nothing was measured on sm_{target.capability} in this precision"
    return "in one launch, an estimate: nothing of this size and alignment was measured"
