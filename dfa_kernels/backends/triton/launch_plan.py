"""What a grouped launch runs: from the shapes of a step to a kernel, its grid and its constants.

A plan is a pure function of a problem (`problem.py`), made once and saved; no tensor and no device is touched, so that
any GPU's plan can be made and compiled anywhere. What all plans share is here; `plan_small.py`, `plan_wide.py`,
`plan_gemm.py` and `plan_taps.py` make those of one kernel each, and `choice.py` picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl

from ...activations import ACTIVATIONS
from ...feedback.hadamard import padded_bits
from .configs import GemmConfig, ProjectionConfig, StripConfig, TwoPhaseConfig, first_that_fills
from .problem import HALF, SPLIT, GroupedProblem, Projected, Target

# A product of tiles has at least so many of each.
SMALLEST_FACTOR = 16


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
    config: StripConfig | TwoPhaseConfig | ProjectionConfig | GemmConfig
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
    """Whether tiles come by the tensor memory accelerator; descriptors that the kernel makes need scratch memory."""
    first: LaunchPlan | None = None
    """The launch that goes before this one, which reads what it leaves behind."""
    delta_row: int = 0
    """Numbers of δ of all hidden layers in a row of the batch, if it goes through a workspace to what comes next."""
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


def fitted(config: Any, projected: Projected) -> Any:
    """The config with tiles of the projection that suit where U is from."""
    threads = 32 * config.num_warps
    if projected.tile == "blocks":
        # Whole blocks of units, and as many rows as leave 32 numbers to a thread.
        units = max(config.block_u, fastfood_block(projected))
        return replace(config, block_u=units, block_r=max(1, 32 * threads // units))
    is_made = projected.source == projected.feedback.row.seed_source
    if projected.tile == "signs" or (projected.tile == "entries" and is_made):
        # A tile of U is made, or unpacked, once for all the rows whose sums fit into a quarter of the registers, and
        # for no more.
        most = threads * ((config.registers + 1) // 4) // config.block_u
        needed = max(SMALLEST_FACTOR, triton.next_power_of_2(max(1, projected.rows)))
        return replace(config, block_r=min(needed, max(config.block_r, 1 << (most.bit_length() - 1))))
    if projected.tile == "entries" and projected.constants()["DELTA_PRECISION"] == "tf32x3":
        # The two parts of every factor take as many registers as one of twice as many components.
        return replace(config, block_e=max(SMALLEST_FACTOR, config.block_e // 2))
    return config


def fastfood_block(projected: Projected) -> int:
    """Rows of a block of Fastfood."""
    return 1 << padded_bits(projected.error_size)


def can_use_tma(dtype: torch.dtype, alignment: int, target: Target) -> bool:
    """Whether tiles may come by the tensor memory accelerator: rows of a multiple of 16 bytes, from sm_90 on.

    Not on sm_120: where Triton addresses a cluster's memory, as 3.6 does, ptxas makes of every such copy a branch with
    a function call in it.
    """
    return 90 <= target.capability < 120 and dtype in HALF and rows_of_16_bytes(dtype, alignment)


def rows_of_16_bytes(dtype: torch.dtype, alignment: int) -> bool:
    return alignment * dtype.itemsize % 16 == 0


def needs_int64(*counts: int) -> bool:
    """Whether a tensor of one of these sizes has offsets that int32 cannot hold."""
    return any(count >= 2**31 for count in counts)


def index_dtype(*counts: int) -> Any:
    return tl.int64 if needs_int64(*counts) else tl.int32


def grouped_arguments(problem: GroupedProblem, *counts: int) -> dict[str, Any]:
    """Those of both kernels; counts: of numbers in tensors that the kernel reads or writes beside the problem's."""
    projected = problem.projected
    derivatives, which = derivatives_of(problem.activations)
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
        PRECISION=SPLIT if projected.arithmetic == "ieee" else "tf32",
        INDEX=index_dtype(
            *[n * width for n, width in zip(longest, problem.widths_in, strict=True)],
            *[n * width for n, width in zip(longest, problem.widths_out, strict=True)],
            *[n * width for n, width in zip(problem.widths_in, problem.widths_out, strict=True)],
            max(problem.sizes, default=0) * projected.error_size,
            projected.error_reach,
            *counts,
        ),
    )


def derivatives_of(activations: Sequence[str]) -> tuple[Derivatives, tuple[int, ...]]:
    """The distinct derivatives, and which of them each layer uses."""
    names = sorted(set(activations)) or ["identity"]
    functions = Derivatives(ACTIVATIONS[name].tile_gradient for name in names)
    return functions, tuple(names.index(name) for name in activations) or (0,)


def product_tiles(config: TwoPhaseConfig | GemmConfig) -> dict[str, int]:
    """What a kernel is told of its tiles of weight gradients."""
    return dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m)


def gradient_tiles(problem: GroupedProblem, config: StripConfig | TwoPhaseConfig | GemmConfig) -> int:
    tiles = 0
    for i, (width_in, width_out) in enumerate(zip(problem.widths_in, problem.widths_out, strict=True)):
        wants_weight, wants_bias = problem.weights >> i & 1, problem.biases >> i & 1
        across = -(-width_in // config.block_n) if wants_weight else wants_bias
        tiles += -(-width_out // config.block_m) * across
    return tiles


def that_fills(tiles: list[int], target: Target) -> int:
    return first_that_fills(tiles, target.multiprocessors)
