"""What a grouped launch runs: from the shapes of a step to a kernel, its grid and its constants.

A plan is a pure function of a problem (`problem.py`), made once and saved; no tensor and no device is touched, so that
any GPU's plan can be made and compiled anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from ...activations import ACTIVATIONS
from ...feedback.hadamard import padded_bits
from .configs import OnePhaseConfig, ProjectionConfig, TwoPhaseConfig, configs_for, first_that_fills
from .kernels.project_taps import project_taps_kernel
from .kernels.small_networks import one_phase
from .kernels.wide_networks import two_phase
from .problem import HALF, GroupedProblem, Projected, TapsProblem, Target, alignment

# A hidden layer's tile holds its rows of U: beyond this many components they do not fit beside the gradient.
LARGEST_HELD_ERROR = 64
# A product of tiles has at least so many of each.
SMALLEST_FACTOR = 16
# δ made again by every tile costs arithmetic, δ written once costs a wait in the launch. Estimated, not yet measured.
MOST_REPEATED_DELTAS = 2**23


class Derivatives(tuple[Any, ...]):
    """Kernel functions as one constant of a kernel. Triton's disk cache must know their source, not only names."""

    @property
    def cache_key(self) -> str:
        return "-".join(getattr(function, "cache_key", str(function)) for function in self)


@dataclass
class LaunchPlan:
    """One launch, complete but for the tensors and the update's numbers."""

    problem: Any
    """The `GroupedProblem` or `TapsProblem` it is for."""
    kernel: Any
    config: OnePhaseConfig | TwoPhaseConfig | ProjectionConfig
    programs: int
    arguments: dict[str, Any]
    """By name, the kernel's arguments but the tensors and the update's numbers; what it does not take is left out."""
    why: str
    counters: int = 0
    """int32 counters the launch needs."""
    sums: int = 0
    """float32 numbers that its sums of δ over tiles of rows take."""
    copy_width: int = 0
    """Columns of the copy of the error that the launch makes, if any."""
    uses_tma: bool = False
    """Whether tiles come by the tensor memory accelerator, whose descriptors need scratch memory."""
    compiled: dict[int, Any] = field(default_factory=dict)
    """The kernel compiled for addresses that are multiples of 16, by the index of the GPU it is loaded on."""
    numbers: tuple[Any, ...] = field(init=False)
    """Of the arguments, those between the tensors and the update's numbers, in the kernel's order."""
    constants: tuple[Any, ...] = field(init=False)
    """The others, in the kernel's order."""

    def __post_init__(self) -> None:
        # Once, so that a launch has nothing to look up.
        given = self.arguments
        self.arguments = {n: given[n] for n in self.kernel.arg_names if n.isupper() or n in given}
        self.numbers = tuple([value for name, value in self.arguments.items() if not name.isupper()])
        self.constants = tuple([value for name, value in self.arguments.items() if name.isupper()])

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told."""
        return dict(
            num_warps=self.config.num_warps,
            num_stages=self.config.num_stages,
            maxnreg=self.config.registers,
            enable_fp_fusion=True,
        )


def plan_grouped(problem: GroupedProblem, target: Target) -> LaunchPlan:
    """The launch for this problem: in one phase or in two, with the tiles that fill the GPU."""
    configs, projected = configs_for(target.capability, problem.projected.arithmetic), problem.projected
    one = configs.one_phase[_that_fills([_gradient_tiles(problem, c) for c in configs.one_phase], target)]
    repeated = sum(
        projected.rows * size * -(-width // one.block_n)
        for size, width in zip(problem.sizes, problem.widths_in, strict=False)
    )
    why = _why_two_phases(problem, repeated)
    if not why:
        return plan_one_phase(problem, one)
    usable = usable_two_phase(problem, target)
    two = usable[_that_fills([_gradient_tiles(problem, c) for c in usable], target)]
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


def _block(projected: Projected) -> int:
    """Rows of a block of Fastfood."""
    return 1 << padded_bits(projected.error_size)


def _fitted(config: Any, projected: Projected) -> Any:
    """The config with tiles of the projection that suit where U is from."""
    threads = 32 * config.num_warps
    if projected.tile == "blocks":
        # Whole blocks of units, and as many rows as leave 32 numbers to a thread.
        units = max(config.block_u, _block(projected))
        return replace(config, block_u=units, block_r=max(1, 32 * threads // units))
    if projected.tile in ("entries", "signs") and projected.source == projected.feedback.row.seed_source:
        # A tile of U is made once for all the rows whose sums fit into a quarter of the registers, and for no more.
        most = threads * ((config.registers + 1) // 4) // config.block_u
        needed = max(SMALLEST_FACTOR, triton.next_power_of_2(max(1, projected.rows)))
        return replace(config, block_r=min(needed, max(config.block_r, 1 << (most.bit_length() - 1))))
    return config


def plan_one_phase(problem: GroupedProblem, config: OnePhaseConfig) -> LaunchPlan:
    """Every tile of a gradient makes its own δ."""
    projected, widths_in = problem.projected, problem.widths_in
    if projected.tile == "blocks":
        config = replace(config, block_m=max(config.block_m, _block(projected)))
    hidden_out = problem.widths_out[: problem.hidden]
    block_e = max(16, triton.next_power_of_2(projected.error_size))
    arguments = _grouped_arguments(problem) | dict(
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
        _gradient_tiles(problem, config),
        arguments,
        _why_one_phase(problem),
    )


def _why_one_phase(problem: GroupedProblem) -> str:
    if problem.hidden == 0:
        return "the output layer alone, whose δ is the error"
    if problem.projected.source == "projection":
        return "every tile of a gradient makes its own δ from the projection"
    return f"an error of {problem.projected.error_size} components: every tile of a gradient makes its own δ"


def usable_two_phase(problem: GroupedProblem, target: Target) -> list[TwoPhaseConfig]:
    """The configs whose tiles this problem's tensors allow."""
    align, _ = _delta_layout(problem)
    tma = can_use_tma(problem.projected.dtype, align, target)
    configs = configs_for(target.capability, problem.projected.arithmetic).two_phase
    return [config for config in configs if tma or not config.needs_tma]


def _delta_layout(problem: GroupedProblem) -> tuple[int, bool]:
    """What all rows of inputs and δ are a multiple of, and whether the output layer's δ is a copy of the error.

    It is the error itself if that lies in memory as the other δ do.
    """
    projected = problem.projected
    align = alignment(problem.widths_in, problem.widths_out[: problem.hidden])
    align_error = projected.constants()["ALIGN_ERROR"]
    copy = (
        projected.error_dtype != projected.dtype
        or not _rows_of_16_bytes(projected.dtype, align_error)
        or not projected.error_aligned
        or projected.error_strides[0] < projected.error_size
    )
    if len(problem.widths_in) > problem.hidden and not copy:
        align = math.gcd(align, align_error)
    return align, copy


def plan_two_phase(problem: GroupedProblem, config: TwoPhaseConfig, target: Target) -> LaunchPlan:
    """δ of all layers into memory, then the gradients, ordered by tickets."""
    config = _fitted(config, problem.projected)
    projected, has_output = problem.projected, len(problem.widths_in) > problem.hidden
    row_tiles, unit_tiles = -(-projected.rows // config.block_r), -(-max(problem.sizes, default=0) // config.block_u)
    align, copy = _delta_layout(problem)
    width = -(-projected.error_size // 16) * 16 if copy else projected.error_size
    copy_tiles = -(-width // config.block_u) if copy and has_output else 0
    uses_tma = can_use_tma(projected.dtype, align, target)
    summed = [size * (problem.biases >> i & 1) for i, size in enumerate(problem.sizes)]
    sums = row_tiles * sum(summed)
    copies, projections = copy_tiles * row_tiles, unit_tiles * row_tiles
    total = copies + projections + _gradient_tiles(problem, config)
    arguments = _grouped_arguments(problem, projected.rows * width, sums) | dict(
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
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
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


@lru_cache(maxsize=512)
def plan_taps(problem: TapsProblem, target: Target) -> LaunchPlan:
    """The launch for this problem, with the tiles that fill the GPU."""
    configs = configs_for(target.capability, problem.projected.arithmetic).project_taps
    fitted = [_fitted(config, problem.projected) for config in configs]
    return plan_projection(
        problem, configs[_that_fills([_projection_tiles(problem, config) for config in fitted], target)]
    )


def plan_projection(problem: TapsProblem, config: ProjectionConfig) -> LaunchPlan:
    """δ of every tap."""
    config = _fitted(config, problem.projected)
    projected = problem.projected
    longest = projected.rows * max(problem.sizes)
    derivatives, which = _derivatives(problem.activations)
    arguments = projected.arguments(max(problem.sizes)) | dict(
        sizes=problem.sizes,
        channels=problem.channels,
        scales=projected.scales(problem.sizes),
        p=problem.parameters[0::2],
        q=problem.parameters[1::2],
        DERIVATIVES=derivatives,
        WHICH=which,
        SAVED=problem.saved,
        DROPOUT=problem.dropout_mask,
        CHANNELS_LAST=problem.channels_last,
        ALIGN=alignment(problem.sizes),
        INDEX=_index_dtype(longest, max(problem.sizes) * projected.error_size, projected.error_reach),
        BLOCK_U=config.block_u,
        BLOCK_R=config.block_r,
        BLOCK_E=config.block_e,
    )
    taps = len(problem.sizes)
    why = f"a tile of the projection serves all {taps} taps" if taps > 1 else "a tile of the projection at a time"
    return LaunchPlan(
        problem,
        project_taps_kernel,
        config,
        _projection_tiles(problem, config),
        arguments,
        why,
    )


def can_use_tma(dtype: torch.dtype, alignment: int, target: Target) -> bool:
    """Whether tiles may come by the tensor memory accelerator: rows of a multiple of 16 bytes, from sm_90 on.

    Not on sm_120: where Triton addresses a cluster's memory, as 3.6 does, ptxas makes of every such copy a branch with
    a function call in it.
    """
    return 90 <= target.capability < 120 and dtype in HALF and _rows_of_16_bytes(dtype, alignment)


def _rows_of_16_bytes(dtype: torch.dtype, alignment: int) -> bool:
    return alignment * dtype.itemsize % 16 == 0


def needs_int64(*counts: int) -> bool:
    """Whether a tensor of one of these sizes has offsets that int32 cannot hold."""
    return any(count >= 2**31 for count in counts)


def _index_dtype(*counts: int) -> Any:
    return tl.int64 if needs_int64(*counts) else tl.int32


def _grouped_arguments(problem: GroupedProblem, *counts: int) -> dict[str, Any]:
    """Those of both kernels; counts: of numbers in tensors that the kernel reads or writes beside the problem's."""
    projected = problem.projected
    derivatives, which = _derivatives(problem.activations)
    p, q = problem.parameters[0::2], problem.parameters[1::2]
    has_output = len(problem.widths_in) > problem.hidden
    longest = [projected.rows * t for t in problem.positions]
    return projected.arguments(problem.widest) | dict(
        widths_in=problem.widths_in,
        widths_out=problem.widths_out,
        positions=problem.positions,
        sizes=problem.sizes or (0,),
        # The output layer's are without effect.
        scales=projected.scales(problem.sizes) + (1.0,) * has_output,
        p=p + (0.0,) * has_output,
        q=q + (0.0,) * has_output,
        OUTPUT=has_output,
        DERIVATIVES=derivatives,
        WHICH=which,
        DROPOUT=problem.dropout_mask,
        WEIGHTS=problem.weights,
        BIASES=problem.biases,
        RULE=problem.rule,
        WEIGHT_SETS=problem.weight_sets,
        BIAS_SETS=problem.bias_sets,
        PRECISION="ieee" if projected.arithmetic == "ieee" else "tf32",
        INDEX=_index_dtype(
            *[n * width for n, width in zip(longest, problem.widths_in, strict=True)],
            *[n * width for n, width in zip(longest, problem.widths_out, strict=True)],
            *[n * width for n, width in zip(problem.widths_in, problem.widths_out, strict=True)],
            max(problem.sizes, default=0) * projected.error_size,
            projected.error_reach,
            *counts,
        ),
    )


def _derivatives(activations: Sequence[str]) -> tuple[Derivatives, tuple[int, ...]]:
    """The distinct derivatives, and which of them each layer uses."""
    names = sorted(set(activations)) or ["identity"]
    functions = Derivatives(ACTIVATIONS[name].tile_gradient for name in names)
    return functions, tuple(names.index(name) for name in activations) or (0,)


def _gradient_tiles(problem: GroupedProblem, config: OnePhaseConfig | TwoPhaseConfig) -> int:
    tiles = 0
    for i, (width_in, width_out) in enumerate(zip(problem.widths_in, problem.widths_out, strict=True)):
        wants_weight, wants_bias = problem.weights >> i & 1, problem.biases >> i & 1
        across = -(-width_in // config.block_n) if wants_weight else wants_bias
        tiles += -(-width_out // config.block_m) * across
    return tiles


def _projection_tiles(problem: TapsProblem, config: ProjectionConfig) -> int:
    return -(-max(problem.sizes) // config.block_u) * -(-problem.projected.rows // config.block_r)


def _that_fills(tiles: list[int], target: Target) -> int:
    return first_that_fills(tiles, target.multiprocessors)
