"""The plans for wide networks whose δ `deltas` writes first: for `grouped_gemm`, or for torch's products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from .configs import GemmConfig, ProducerConfig, ProjectionConfig, configs_for
from .kernels.deltas import OUTPUT_UNITS, deltas
from .kernels.grouped_gemm import grouped_gemm
from .launch_plan import LaunchPlan, can_use_tma, fitted, gradient_tiles, grouped_arguments, product_tiles, that_fills
from .plan_wide import delta_layout
from .problem import GroupedProblem, Projected, Target

MOST_VIEWS = 16
"""Layers whose inputs `grouped_gemm` takes as descriptors."""
MOST_HELD = 16
"""Components of the error whose columns of U stay in the registers of `deltas`."""
SMALLEST_PIECE = 4
"""Columns of U that are made at a time: a call of the random numbers gives so many."""
PLAIN, MOST_PLAIN = ("tanh", "relu", "abs", "silu", "softplus", "hardtanh"), 10
"""Activations and components of the error that leave registers for all programs of `deltas`, as machine code shows.

On sm_90, of at most four layers.
"""
PROGRAMS_UNLESS_PLAIN = 2
MOST_NUMBERS = 32
"""Numbers of all its layers that a thread of `deltas` has in its registers at a time."""


@dataclass(frozen=True)
class _Layout:
    """Where δ and its sums lie, for what writes and what reads them."""

    align: int
    """What all rows of inputs and δ are a multiple of."""
    copy: bool
    """Whether the output layer's δ is a copy of the error."""
    width: int
    """Of the output layer's δ."""
    tma: bool
    first_deltas: tuple[int, ...]
    strides: tuple[int, ...]
    row: int
    """Numbers of all layers' δ in a row of the batch."""
    summed: tuple[int, ...]
    """Sums of every layer, the output layer's last."""

    def counts(self, rows: int, parts: int) -> tuple[int, ...]:
        """Numbers of δ, of the output layer's δ, and of the sums over this many parts of the batch."""
        return rows * self.row, rows * self.width, parts * sum(self.summed)

    def arguments(self, problem: GroupedProblem) -> dict[str, Any]:
        """Of both kernels."""
        firsts = tuple(accumulate(self.summed, initial=0))
        return dict(
            first_deltas=self.first_deltas,
            first_sums=firsts[: problem.hidden] or (0,),
            first_error_sum=firsts[problem.hidden],
            delta_width=self.width,
            ALIGN=self.align,
        )


def _layout_of(problem: GroupedProblem, target: Target, by_torch: bool = False) -> _Layout:
    """Through TMA one descriptor serves all hidden layers: their δ lie one behind the other, in rows of one length.

    by_torch: torch reads δ, each layer's without gaps.
    """
    projected, sizes, has_output = problem.projected, problem.sizes, len(problem.widths_in) > problem.hidden
    align, copy = delta_layout(problem)
    tma = (
        not by_torch
        and can_use_tma(projected.dtype, align, target)
        and 0 < len(problem.widths_in) <= MOST_VIEWS
        and set(problem.positions[: problem.hidden]) == {1}
        and projected.rows > 0
    )
    rooms = (problem.widest,) * problem.hidden if tma else sizes
    widths = (*sizes, *(projected.error_size,) * has_output)
    return _Layout(
        align,
        copy and has_output,
        -(-projected.error_size // 16) * 16 if copy else projected.error_size,
        tma,
        tuple(accumulate(rooms, initial=0))[: problem.hidden] or (0,),
        rooms or (0,),
        sum(rooms),
        tuple(width * (problem.biases >> i & 1) for i, width in enumerate(widths)),
    )


def plan_grouped_gemm(
    problem: GroupedProblem, config: GemmConfig, delta_config: ProjectionConfig, target: Target
) -> LaunchPlan:
    """δ of all layers into memory by one launch, then the gradients of all layers by another."""
    layout, rows = _layout_of(problem, target), problem.projected.rows
    first = _plan_deltas(problem, layout, delta_config, target)
    parts = first.arguments["parts"]
    total = gradient_tiles(problem, config)
    arguments = grouped_arguments(problem, *layout.counts(rows, parts)) | layout.arguments(problem)
    arguments |= dict(
        delta_stride=layout.width if layout.copy else problem.projected.error_strides[0],
        parts=parts,
        total=total,
        TMA=layout.tma,
        STAGES=config.num_stages,
        **product_tiles(config),
    )
    return LaunchPlan(
        problem,
        _kernel_for(config),
        config,
        min(total, target.multiprocessors * config.programs),
        arguments,
        "chosen",
        sums=first.sums,
        copy_width=first.copy_width,
        uses_tma=layout.tma,
        first=first if first.programs else None,
        delta_row=layout.row,
    )


def plan_products(problem: GroupedProblem, config: ProjectionConfig, target: Target) -> LaunchPlan:
    """δ of all layers into memory by one launch; torch makes a product of each layer's."""
    return _plan_deltas(problem, _layout_of(problem, target, by_torch=True), config, target)


def _kernel_for(config: GemmConfig) -> Any:
    if not isinstance(config, ProducerConfig):
        return grouped_gemm
    # Gluon is not there in every version of Triton.
    from .kernels.grouped_gemm_producer import grouped_gemm_producer

    return grouped_gemm_producer


def _plan_deltas(problem: GroupedProblem, layout: _Layout, config: ProjectionConfig, target: Target) -> LaunchPlan:
    """Of no program if there are no rows, or δ is the error itself and nothing is to be summed up."""
    projected, hidden = problem.projected, problem.hidden
    walk = walks(projected)
    if not walk:
        config = fitted(config, projected)
    elif _takes_registers(problem):
        config = replace(config, programs=min(config.programs, PROGRAMS_UNLESS_PLAIN))
    each = config.block_u * config.block_r // (32 * config.num_warps)
    groups = max(1, -(-hidden // max(1, MOST_NUMBERS // each))) if walk else 1
    sum_error = any(layout.summed[hidden:])
    strips = -(-problem.widest // config.block_u)
    columns = strips * groups + (-(-layout.width // OUTPUT_UNITS.value) if layout.copy or sum_error else 0)
    tiles = -(-projected.rows // config.block_r)
    # As many parts of the batch as programs that run at once, and every part a whole number of tiles.
    most = target.multiprocessors * config.programs // max(1, columns)
    part = max(1, -(-tiles // max(1, min(tiles, most)))) if walk else 1
    parts = -(-tiles // part)
    arguments = grouped_arguments(problem, *layout.counts(projected.rows, parts)) | layout.arguments(problem)
    arguments |= dict(
        delta_strides=layout.strides,
        parts=parts,
        part_rows=part * config.block_r,
        columns=columns,
        COPY=layout.copy,
        SUM_ERROR=sum_error,
        WALK=walk,
        HELD=projected.error_size if keeps_columns(projected) else 0,
        GROUPS=groups,
        LAYERS=-(-hidden // groups) if walk else 1,
        ALIKE=set(problem.sizes) == {problem.widest} and hidden % groups == 0,
        BLOCK_U=config.block_u,
        BLOCK_R=config.block_r,
        BLOCK_E=SMALLEST_PIECE if walk else config.block_e,
    )
    return LaunchPlan(
        problem,
        deltas,
        config,
        columns * parts,
        arguments,
        "δ of all layers",
        sums=parts * sum(layout.summed),
        copy_width=layout.width if layout.copy else 0,
        delta_row=layout.row,
    )


def _takes_registers(problem: GroupedProblem) -> bool:
    """Whether δ takes so many registers that as many programs as usual would put some of them on the stack."""
    plain = len(set(problem.activations)) == 1 and problem.activations[0] in PLAIN
    return not plain or problem.dropout_mask != 0 or problem.projected.error_size > MOST_PLAIN or problem.hidden > 4


def keeps_columns(projected: Projected) -> bool:
    """Whether the columns of U for all components of the error stay in the registers."""
    return projected.tile != "projection" and projected.error_size <= MOST_HELD


def walks(projected: Projected) -> bool:
    """Whether P of a tile costs so little that programs walk over the batch, and serve a few layers each."""
    return keeps_columns(projected) or projected.tile == "projection"


def choose_configs(problem: GroupedProblem, target: Target) -> tuple[GemmConfig, ProjectionConfig]:
    """Of both launches: those whose tiles fill the GPU, and which this problem's tensors allow."""
    table, tma = configs_for(target.capability, problem.projected.arithmetic), _layout_of(problem, target).tma
    usable = [config for config in table.grouped_gemm if tma or not config.needs_tma]
    gemm = usable[that_fills([gradient_tiles(problem, c) for c in usable], target)]
    return gemm, choose_deltas(problem, target)


def choose_deltas(problem: GroupedProblem, target: Target) -> ProjectionConfig:
    """Of `deltas` alone."""
    projected = problem.projected
    table = configs_for(target.capability, projected.arithmetic)
    fitting = table.deltas if walks(projected) else [fitted(config, projected) for config in table.project_taps]
    return fitting[that_fills([delta_tiles(problem, config) for config in fitting], target)]


def delta_tiles(problem: GroupedProblem, config: ProjectionConfig) -> int:
    """Tiles of the projection."""
    return -(-problem.widest // config.block_u) * -(-problem.projected.rows // config.block_r)
