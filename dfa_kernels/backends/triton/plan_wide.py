"""The plan of a launch in two phases: δ of all layers into memory, then the gradients."""

from __future__ import annotations

import math
from itertools import accumulate

from .configs import TwoPhaseConfig, configs_for
from .kernels.wide_networks import two_phase
from .launch_plan import (
    LaunchPlan,
    can_use_tma,
    fitted,
    gradient_tiles,
    grouped_arguments,
    product_tiles,
    rows_of_16_bytes,
)
from .problem import GroupedProblem, Target, alignment


def plan_two_phase(problem: GroupedProblem, config: TwoPhaseConfig, target: Target) -> LaunchPlan:
    """δ of all layers into memory, then the gradients, ordered by tickets."""
    config = fitted(config, problem.projected)
    projected, has_output = problem.projected, len(problem.widths_in) > problem.hidden
    row_tiles, unit_tiles = -(-projected.rows // config.block_r), -(-max(problem.sizes, default=0) // config.block_u)
    align, copy = delta_layout(problem)
    width = -(-projected.error_size // 16) * 16 if copy else projected.error_size
    copy_tiles = -(-width // config.block_u) if copy and has_output else 0
    uses_tma = can_use_tma(projected.dtype, align, target)
    summed = [size * (problem.biases >> i & 1) for i, size in enumerate(problem.sizes)]
    sums = row_tiles * sum(summed)
    copies, projections = copy_tiles * row_tiles, unit_tiles * row_tiles
    total = copies + projections + gradient_tiles(problem, config)
    arguments = grouped_arguments(problem, projected.rows * width, sums) | dict(
        first_sums=tuple(accumulate(summed, initial=0))[:-1] or (0,),
        delta_width=width,
        delta_stride=width if copy else projected.error_strides[0],
        copies=copies,
        projections=projections,
        total=total,
        ALIGN=align,
        TMA=uses_tma,
        COPY=copy_tiles > 0,
        BLOCK_U=config.block_u,
        BLOCK_R=config.block_r,
        BLOCK_E=config.block_e,
        **product_tiles(config),
    )
    return LaunchPlan(
        problem,
        two_phase,
        config,
        min(total, target.multiprocessors * config.programs),
        arguments,
        "chosen",
        counters=1 + unit_tiles + copy_tiles,
        sums=sums,
        copy_width=width if copy_tiles else 0,
        uses_tma=uses_tma,
    )


def usable_two_phase(problem: GroupedProblem, target: Target) -> list[TwoPhaseConfig]:
    """The configs whose tiles this problem's tensors allow."""
    align, _ = delta_layout(problem)
    tma = can_use_tma(problem.projected.dtype, align, target)
    configs = configs_for(target.capability, problem.projected.arithmetic).two_phase
    return [config for config in configs if tma or not config.needs_tma]


def delta_layout(problem: GroupedProblem) -> tuple[int, bool]:
    """What all rows of inputs and δ are a multiple of, and whether the output layer's δ is a copy of the error.

    It is the error itself if that lies in memory as the other δ do.
    """
    projected = problem.projected
    align = alignment(problem.widths_in, problem.widths_out[: problem.hidden])
    align_error = projected.constants()["ALIGN_ERROR"]
    copy = (
        projected.error_dtype != projected.dtype
        or not rows_of_16_bytes(projected.dtype, align_error)
        or not projected.error_aligned
        or projected.error_strides[0] < projected.error_size
    )
    if len(problem.widths_in) > problem.hidden and not copy:
        align = math.gcd(align, align_error)
    return align, copy
