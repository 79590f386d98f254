"""The plan of a launch in one phase: every tile of a gradient makes its own δ."""

from __future__ import annotations

from dataclasses import replace

import triton

from .configs import OnePhaseConfig
from .kernels.small_networks import one_phase
from .launch_plan import LaunchPlan, fastfood_block, gradient_tiles, grouped_arguments
from .problem import GroupedProblem, alignment


def plan_one_phase(problem: GroupedProblem, config: OnePhaseConfig) -> LaunchPlan:
    """Every tile of a gradient makes its own δ."""
    projected, widths_in = problem.projected, problem.widths_in
    if projected.tile == "blocks":
        config = replace(config, block_m=max(config.block_m, fastfood_block(projected)))
    hidden_out = problem.widths_out[: problem.hidden]
    block_e = max(16, triton.next_power_of_2(projected.error_size))
    arguments = grouped_arguments(problem) | dict(
        ALIGN=alignment(widths_in, hidden_out),
        ONE_POSITION=all(t == 1 for t in problem.positions),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_E=16 if projected.source == "projection" else block_e,
        GROUP_M=config.group_m,
    )
    return LaunchPlan(
        problem,
        one_phase,
        config,
        gradient_tiles(problem, config),
        arguments,
        _why_one_phase(problem),
    )


def _why_one_phase(problem: GroupedProblem) -> str:
    if problem.hidden == 0:
        return "the output layer alone, whose δ is the error"
    if problem.projected.source == "projection":
        return "every tile of a gradient makes its own δ from the projection"
    return f"an error of {problem.projected.error_size} components: every tile of a gradient makes its own δ"
