"""Which kernel computes the gradients of all layers."""

from __future__ import annotations

from .choice_wide import multiply_adds, plan_wide
from .configs import StripConfig
from .launch_plan import LaunchPlan, gradient_tiles, that_fills
from .plan_small import LARGEST_HELD_ERROR, chunks_of, fitted_strip, is_held, plan_strip, row_parts, usable_strips
from .problem import GroupedProblem, Target

# Multiplications and additions for each multiprocessor beyond which larger tiles, that read less, pay for two phases.
MOST_PRODUCTS = 2**25
# As many as a multiprocessor could do while δ travels through memory and programs wait for each other, and as an entry
# of U takes that is made anew. Both estimated, not measured.
WAIT = 2**22
ENTRY = 256


def plan_grouped(problem: GroupedProblem, target: Target) -> LaunchPlan:
    """The launch for this problem, or two of them, with the tiles that fill the GPU."""
    strips = usable_strips(problem, target)
    one = strips[that_fills([gradient_tiles(problem, c) for c in strips], target)] if strips else None
    why = _why_wide(problem, one, target)
    return plan_strip(problem, one, target) if one and not why else plan_wide(problem, target, why)


def _why_wide(problem: GroupedProblem, config: StripConfig | None, target: Target) -> str:
    """Why this cannot or should not be done by strips; empty if it should."""
    projected, most = problem.projected, MOST_PRODUCTS * target.multiprocessors
    if config is None:
        return f"δ of {projected.rows * max(problem.positions)} rows does not fit beside a tile"
    if projected.tile == "blocks":
        if projected.error_size > LARGEST_HELD_ERROR:
            return f"blocks of Fastfood for {projected.error_size} error components are larger than a tile"
        if max(problem.positions) > 1:
            return "with several positions, tiles of gradients do not begin where blocks of Fastfood do"
    if (products := multiply_adds(problem)) > most:
        return f"{products} products, more than {most}, are worth larger tiles"
    once = products + WAIT * target.multiprocessors
    if (repeated := _repeated(problem, config, target)) > once:
        return f"{repeated} products would make δ anew in every strip, more than the {once} that making it once costs"
    return ""


def _repeated(problem: GroupedProblem, config: StripConfig, target: Target) -> int:
    """Multiplications of all strips for their projections; of what is made otherwise, as many as take as long."""
    fitted, projected = fitted_strip(problem, config, target), problem.projected
    if projected.source == "projection":
        return 0
    chunks = chunks_of(problem, fitted, target.multiprocessors * fitted.programs)
    regenerated = projected.source == projected.feedback.row.seed_source and projected.tile != "blocks"
    made = ENTRY * (1 if is_held(projected) else row_parts(problem, fitted)) if regenerated else 0
    units = sum(size * n for size, n in zip(problem.sizes, chunks, strict=False))
    return units * projected.error_size * (max(1, projected.rows) + made)
