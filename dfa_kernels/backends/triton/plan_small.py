"""The plan of a launch by strips: a program makes δ of its outputs once, for a run of tiles of the inputs."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import triton

from .configs import MOST_REGISTERS, REGISTERS, StripConfig, configs_for
from .kernels.small_networks import strip
from .launch_plan import SMALLEST_FACTOR, LaunchPlan, fastfood_block, grouped_arguments, rows_of_16_bytes
from .problem import GroupedProblem, Projected, Target, alignment

LARGEST_HELD_ERROR = 64
"""Components of the error up to which a tile of U has them all; beyond, they come in blocks."""
BLOCK_E = 32
MULTIPLIED = ("entries", "signs", "nonzeros")
"""Tiles of U that the error is multiplied by, if they have all its components."""
ROOMY_WARPS = 8
LIGHT_ACTIVATIONS, MOST_LIGHT_LAYERS = ({"tanh"}, {"relu"}), 9
"""With others, or more layers, a program may take more than a third of a multiprocessor's registers."""
SPLIT_PRODUCTS = 6
"""Of a product of float32 split into three bfloat16 each."""
TENSOR_MEMORY = 512
"""Columns of a multiprocessor, from sm_100 to sm_110."""


def plan_strip(problem: GroupedProblem, config: StripConfig, target: Target) -> LaunchPlan:
    """Strips of all layers in one launch; see `usable_strips`."""
    config, projected = fitted_strip(problem, config, target), problem.projected
    chunks = chunks_of(problem, config, target.multiprocessors * config.programs)
    programs = [count * -(-out // config.block_m) for count, out in zip(chunks, problem.widths_out, strict=True)]
    positions, parts, held = max(problem.positions), row_parts(problem, config), is_held(projected)
    arguments = grouped_arguments(problem)
    arguments |= dict(
        ROUND=arguments["ROUND"] or (projected.arithmetic == "tf32" and arguments["DELTA_PRECISION"] == "tf32"),
        firsts=tuple(accumulate(programs, initial=0))[:-1],
        chunks=chunks,
        ALIGN=_alignment(problem),
        SWAP=_swaps(projected.arithmetic, parts * positions),
        HELD=held,
        POSITIONS=positions,
        PARTS=parts,
        EVEN=positions == 1 and projected.rows == parts * config.block_r,
        INPUTS_AHEAD=_loads_inputs_ahead(problem, config.block_r),
        # Other rules leave no registers for one tile more, nor do most products of split factors.
        PARAMETERS_AHEAD=problem.rule == "sgd"
        and (projected.arithmetic != "ieee" or _is_light(problem, config.block_r)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.block_r,
        BLOCK_E=max(SMALLEST_FACTOR, triton.next_power_of_2(projected.error_size)) if held else BLOCK_E,
    )
    return LaunchPlan(problem, strip, config, sum(programs), arguments, _why_strips(problem))


def usable_strips(problem: GroupedProblem, target: Target) -> list[StripConfig]:
    """The configs beside whose tiles δ of the whole batch has room, at all positions."""
    configs = configs_for(target.capability, problem.projected.arithmetic).strip
    return [config for config in configs if _fits(problem, config, target)]


def _fits(problem: GroupedProblem, config: StripConfig, target: Target) -> bool:
    fitted = fitted_strip(problem, config, target)
    parts = row_parts(problem, fitted) * max(problem.positions)
    return parts * fitted.block_r <= config.rows and fitted.block_n <= _widest(problem, fitted, target)


def fitted_strip(problem: GroupedProblem, config: StripConfig, target: Target) -> StripConfig:
    """The config with parts that suit the batch, and as many warps as have registers for what the problem needs.

    And tiles that suit the parts, where each takes tensor memory.
    """
    projected, positions = problem.projected, max(problem.positions)
    block_m = max(config.block_m, fastfood_block(projected)) if projected.tile == "blocks" else config.block_m
    one_part = positions == 1 and projected.rows <= config.block_r
    by_blocks = projected.tile in MULTIPLIED and not is_held(projected)
    # Rows that begin anywhere are read number by number, each with an address of its own.
    aligned = rows_of_16_bytes(projected.dtype, _alignment(problem))
    plain = problem.rule == "store" and positions == 1 and not _is_regenerated(projected)
    block_r, warps, programs = config.block_r, config.num_warps, config.programs
    # On sm_100 an update has no registers for a mask beside δ of 128 rows.
    masked = _splits_in_tensor_memory(problem, target) and problem.dropout_mask and problem.rule != "store"
    if by_blocks or not aligned or not (one_part or plain) or masked:
        block_r, warps = max(SMALLEST_FACTOR, block_r // (2 if aligned else 4)), max(warps, ROOMY_WARPS)
    block_r = min(block_r, max(SMALLEST_FACTOR, triton.next_power_of_2(projected.rows)))
    if problem.rule != "store" or not _is_light(problem, block_r):
        # Only as many as leave a thread all the registers that it can have.
        programs = min(programs, max(1, REGISTERS // (MOST_REGISTERS + 1) // (32 * warps)))
    # Several parts of x on their way would take the memory that several parts of δ lie in.
    in_memory = positions == 1 and projected.rows <= block_r and not _loads_inputs_ahead(problem, block_r)
    stages = config.num_stages if in_memory else 1
    fitted = replace(config, block_m=block_m, block_r=block_r, num_warps=warps, num_stages=stages, programs=programs)
    widest = max(SMALLEST_FACTOR, _widest(problem, fitted, target))
    return replace(fitted, block_n=min(config.block_n, widest))


def _widest(problem: GroupedProblem, fitted: StripConfig, target: Target) -> int:
    """Inputs of a tile for whose products there is tensor memory: a power of two, or 0.

    Triton 3.6 gives each product an accumulator of its own, a column for an input, and δ a column for a row of a part.
    It refuses to launch what takes more columns than there are.
    """
    if not _splits_in_tensor_memory(problem, target):
        return fitted.block_n
    products = SPLIT_PRODUCTS * row_parts(problem, fitted) * max(problem.positions)
    columns = (TENSOR_MEMORY - fitted.block_r) // products
    return 1 << columns.bit_length() >> 1


def _splits_in_tensor_memory(problem: GroupedProblem, target: Target) -> bool:
    return problem.projected.arithmetic == "ieee" and 100 <= target.capability < 120


def row_parts(problem: GroupedProblem, fitted: StripConfig) -> int:
    """Parts of δ at each position."""
    return max(1, -(-problem.projected.rows // fitted.block_r))


def is_held(projected: Projected) -> bool:
    """Whether a tile of U has all components of the error."""
    return projected.tile in MULTIPLIED and projected.error_size <= LARGEST_HELD_ERROR


def chunks_of(problem: GroupedProblem, config: StripConfig, programs: int) -> tuple[int, ...]:
    """Into how many runs of tiles each layer's inputs are cut: the longest run is as short as `programs` allow."""
    layers = list(zip(problem.widths_in, problem.widths_out, strict=True))
    tiles = [-(-width // config.block_n) * (problem.weights >> i & 1) for i, (width, _) in enumerate(layers)]
    least = [(problem.weights | problem.biases) >> i & 1 for i in range(len(layers))]
    heights = [-(-out // config.block_m) for _, out in layers]
    longest = 0
    while True:
        longest += 1
        chunks = tuple(max(-(-n // longest), one) for n, one in zip(tiles, least, strict=True))
        if sum(n * m for n, m in zip(chunks, heights, strict=True)) <= programs or longest >= max(tiles):
            return chunks


def _alignment(problem: GroupedProblem) -> int:
    return alignment(problem.widths_in, problem.widths_out[: problem.hidden])


def _is_regenerated(projected: Projected) -> bool:
    return projected.source == projected.feedback.row.seed_source


def _is_light(problem: GroupedProblem, block_r: int) -> bool:
    """Whether δ takes no more registers than in what was timed, of the paper's network, in one whole part."""
    projected = problem.projected
    return (
        projected.rows == block_r
        and max(problem.positions) == 1
        and rows_of_16_bytes(projected.dtype, _alignment(problem))
        and projected.source == "matrix"
        and projected.error_size <= SMALLEST_FACTOR
        and projected.dtype == problem.parameter_dtype
        and len(problem.widths_in) <= MOST_LIGHT_LAYERS
        and set(problem.activations) in LIGHT_ACTIVATIONS
        and not problem.dropout_mask
    )


def _loads_inputs_ahead(problem: GroupedProblem, block_r: int) -> bool:
    """Whether a tile of x waits in registers for its product, not in shared memory.

    Factors of float32 are split there, on their way to the memory that the product reads.
    """
    return problem.projected.arithmetic == "ieee" and problem.rule == "store" and _is_light(problem, block_r)


def _swaps(arithmetic: str, parts: int) -> bool:
    """Whether δ is the second factor: in shared memory, where several parts have room.

    And of float32, which tensor cores of sm_90 read only along the rows there: δ is laid out so once, x would be by
    every tile. Split into bfloat16 neither needs it, and splitting x in registers takes too many of them.
    """
    return arithmetic == "tf32" or (arithmetic == "half" and parts > 1)


def _why_strips(problem: GroupedProblem) -> str:
    if problem.hidden == 0:
        return "the output layer alone, whose δ is the error"
    return f"δ of {problem.projected.rows} rows fits beside a tile"
