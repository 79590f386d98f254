"""Which kernel computes the gradients of all layers."""

from __future__ import annotations

from dataclasses import replace

from .configs import configs_for
from .launch_plan import LaunchPlan, gradient_tiles, that_fills
from .plan_small import plan_strip
from .plan_wide import plan_two_phase, usable_two_phase
from .problem import GroupedProblem, Target

# A hidden layer's tile holds its rows of U: beyond this many components they do not fit beside the gradient.
LARGEST_HELD_ERROR = 64
# δ made again by every tile costs arithmetic, δ written once costs a wait in the launch. Estimated, not yet measured.
MOST_REPEATED_DELTAS = 2**23


def plan_grouped(problem: GroupedProblem, target: Target) -> LaunchPlan:
    """The launch for this problem: in one phase or in two, with the tiles that fill the GPU."""
    configs, projected = configs_for(target.capability, problem.projected.arithmetic), problem.projected
    one = configs.one_phase[that_fills([gradient_tiles(problem, c) for c in configs.one_phase], target)]
    repeated = sum(
        projected.rows * size * -(-width // one.block_n)
        for size, width in zip(problem.sizes, problem.widths_in, strict=False)
    )
    why = _why_two_phases(problem, repeated)
    if not why:
        return plan_one_phase(problem, one)
    usable = usable_two_phase(problem, target)
    two = usable[that_fills([gradient_tiles(problem, c) for c in usable], target)]
    return replace(plan_two_phase(problem, two, target), why=why)


def _why_two_phases(problem: GroupedProblem, repeated: int) -> str:
    """Why this cannot or should not be one phase; empty if it should. repeated: values of δ that tiles would make."""
    projected = problem.projected
    if projected.source != "projection" and projected.error_size > LARGEST_HELD_ERROR:
        return f"{projected.error_size} error components, more than {LARGEST_HELD_ERROR}, do not fit beside a tile"
    if projected.tile == "blocks" and any(t > 1 for t in problem.positions):
        return "with several positions, tiles of gradients do not begin where blocks of Fastfood do"
    if repeated > MOST_REPEATED_DELTAS:
        return f"{repeated} values of δ would be made again in tiles, more than {MOST_REPEATED_DELTAS}"
    return ""
