"""The plan of a launch by strips: a program makes δ of its outputs once, for a run of tiles of the inputs."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
import triton

from .configs import StripConfig
from .kernels.small_networks import strip
from .launch_plan import SMALLEST_FACTOR, LaunchPlan, fastfood_block, grouped_arguments
from .problem import GroupedProblem, Projected, Target, alignment

LARGEST_HELD_ERROR = 64
"""Components of the error up to which a tile of U has them all; beyond, they come in blocks."""
BLOCK_E = 32


def plan_strip(problem: GroupedProblem, config: StripConfig, target: Target) -> LaunchPlan:
    """Strips of all layers in one launch; the problem is one that `parts_of` says fits."""
    config, projected = fitted_strip(problem, config), problem.projected
    positions = max(problem.positions)
    chunks = chunks_of(problem, config, target.multiprocessors * config.programs)
    programs = [count * -(-out // config.block_m) for count, out in zip(chunks, problem.widths_out, strict=True)]
    tf32 = projected.arithmetic == "tf32"
    held = projected.tile in ("entries", "signs", "nonzeros") and projected.error_size <= LARGEST_HELD_ERROR
    arguments = grouped_arguments(problem)
    exact = _exact_products(projected)
    arguments |= dict(
        firsts=tuple(accumulate(programs, initial=0))[:-1],
        chunks=chunks,
        PRECISION=exact or arguments["PRECISION"],
        DELTA_PRECISION=exact or arguments["DELTA_PRECISION"],
        ROUND=arguments["ROUND"] or (tf32 and arguments["DELTA_PRECISION"] == "tf32"),
        ALIGN=alignment(problem.widths_in, problem.widths_out[: problem.hidden]),
        # Tensor cores of sm_90 read a second factor of float32 only along the rows: of δ, which is laid out once.
        SWAP=tf32 or config.parts > 1,
        HELD=held,
        POSITIONS=positions,
        PARTS=config.parts // positions,
        EVEN=positions == 1 and projected.rows % config.block_r == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        BLOCK_E=max(SMALLEST_FACTOR, triton.next_power_of_2(projected.error_size)) if held else BLOCK_E,
    )
    return LaunchPlan(problem, strip, config, sum(programs), arguments, _why_strips(problem))


def fitted_strip(problem: GroupedProblem, config: StripConfig) -> StripConfig:
    """The config with as many parts as the batch has, and no larger ones; with tiles that hold blocks of Fastfood."""
    projected = problem.projected
    block_m = max(config.block_m, fastfood_block(projected)) if projected.tile == "blocks" else config.block_m
    block_r = min(config.block_r, max(SMALLEST_FACTOR, triton.next_power_of_2(projected.rows)))
    parts = max(1, -(-projected.rows // block_r)) * max(problem.positions)
    # Several parts of x on their way would take the memory that several parts of δ lie in.
    stages = config.num_stages if parts == 1 else 1
    return replace(config, block_m=block_m, block_r=block_r, parts=parts, num_stages=stages)


def chunks_of(problem: GroupedProblem, config: StripConfig, programs: int) -> tuple[int, ...]:
    """Into how many runs of tiles each layer's inputs are cut: the longest run is as short as `programs` allow."""
    layers = list(zip(problem.widths_in, problem.widths_out, strict=True))
    tiles = [-(-width // config.block_n) * (problem.weights >> i & 1) for i, (width, _) in enumerate(layers)]
    least = [min(1, problem.weights >> i & 1 | problem.biases >> i & 1) for i in range(len(layers))]
    heights = [-(-out // config.block_m) for _, out in layers]
    longest = 1
    while True:
        chunks = tuple(max(-(-n // longest), one) for n, one in zip(tiles, least, strict=True))
        if sum(n * m for n, m in zip(chunks, heights, strict=True)) <= programs or longest >= max(tiles):
            return chunks
        longest += 1


def _exact_products(projected: Projected) -> str:
    """How tensor cores multiply float32 in full: as six products of three bfloat16 each. Empty if they need not."""
    return "bf16x6" if projected.arithmetic == "ieee" and projected.error_dtype == torch.float32 else ""


def _why_strips(problem: GroupedProblem) -> str:
    if problem.hidden == 0:
        return "the output layer alone, whose δ is the error"
    return f"δ of {problem.projected.rows} rows fits beside a tile"
