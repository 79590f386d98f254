"""What decides a launch: all of an operator's call but the tensors' addresses, as plain hashable values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...feedback.hadamard import padded_bits
from ...feedback.spec import FeedbackSpec

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
# float32 products in full, by tensor cores: six of three bfloat16 each. The interpreter multiplies in full anyway, and
# does not know the word.
SPLIT = "ieee" if triton.knobs.runtime.interpret else "bf16x6"
# A block of Fastfood has to lie in the registers of a program of 4 warps.
LARGEST_FASTFOOD_ERROR = 2**12
_TILE_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Target(NamedTuple):
    """The GPU a plan is for: compute capability (90 for sm_90) and number of multiprocessors."""

    capability: int
    multiprocessors: int


@dataclass(frozen=True)
class Projected:
    """How e Uᵀ comes about, for layers and taps alike: error [rows, error_size], and where U is from."""

    rows: int
    error_size: int
    error_strides: tuple[int, int]
    error_dtype: torch.dtype
    feedback: FeedbackSpec
    source: str
    dtype: torch.dtype
    """Of the activations."""
    error_aligned: bool
    """Whether the error begins at a multiple of 16 bytes."""
    tf32: bool
    """Whether float32 products may go through tensor cores, as torch's matmul precision says."""

    @property
    def tile(self) -> str:
        """How the kernels come by e Uᵀ, as the kind's row says; "projection" if they read it."""
        return "projection" if self.source == "projection" else self.feedback.row.tile

    @property
    def arithmetic(self) -> str:
        return "half" if self.dtype in HALF else "tf32" if self.tf32 else "ieee"

    @property
    def error_reach(self) -> int:
        """No number of the error lies this far behind its first one in memory."""
        return self.rows * self.error_strides[0] + self.error_size * self.error_strides[1]

    def constants(self) -> dict[str, Any]:
        """DOT: what the factors of e Uᵀ are converted to. A random sign loses nothing in the error's own precision."""
        signs = self.tile in ("signs", "nonzeros")
        entry = self.error_dtype if signs else self.feedback.dtype
        dot = self.error_dtype if entry == self.error_dtype else torch.float32
        narrow_error = self.error_dtype in HALF
        # Sums of picked components are exact elsewhere, so a product in their place may not round them. Nor may it
        # round U to as many bits as float16 has: rows of one error would add that up.
        exact = self.tile == "nonzeros" or (self.error_dtype == torch.float16 and dot == torch.float32)
        tensor_cores = "tf32x3" if exact else "tf32"
        return dict(
            SOURCE=self.source,
            ENTRY=_TILE_DTYPE[torch.float32 if signs or self.source == "projection" else entry],
            DOT=_TILE_DTYPE[dot],
            DELTA_PRECISION=tensor_cores if self.tf32 or narrow_error else SPLIT,
            ROUND=narrow_error and dot == torch.float32 and not exact,
            ALIGN_ERROR=alignment((self.error_size, self.error_strides[0])) if self.error_strides[1] == 1 else 1,
            BITS=padded_bits(self.error_size) if self.tile == "blocks" else 0,
        )

    def arguments(self, widest: int) -> dict[str, Any]:
        """What all kernels get alike, by name; widest: units of the widest tap."""
        seed, (stride_row, stride_column) = self.feedback.seed, self.error_strides
        return self.constants() | dict(
            error_size=self.error_size,
            stride_row=stride_row,
            stride_column=stride_column,
            key0=_signed(seed & 0xFFFFFFFF),
            key1=_signed(seed >> 32),
            nonzeros=self.feedback.nonzeros_per_row(self.error_size) if self.tile == "nonzeros" else 0,
            widest=widest,
            rows=self.rows,
        )

    def scales(self, sizes: Sequence[int]) -> tuple[float, ...]:
        """The factor from what the kernel sums to e Bᵀ, for each size. A given P is scaled for the widest already."""
        widest = max(sizes, default=1)
        if self.source == "projection":
            return tuple(math.sqrt(widest / size) if self.feedback.normalize else 1.0 for size in sizes)
        value = float(self.feedback.row.value(self.feedback, self.error_size))
        return tuple(value * self.feedback.scale(size, self.error_size) for size in sizes)


@dataclass(frozen=True)
class GroupedProblem:
    """All of one `layer_grads` or `layer_update_` but the tensors' addresses."""

    projected: Projected
    widths_in: tuple[int, ...]
    widths_out: tuple[int, ...]
    positions: tuple[int, ...]
    activations: tuple[str, ...]
    """Of the hidden layers; one more width than these is the output layer's."""
    parameters: tuple[float, ...]
    dropout_mask: int
    weights: int
    biases: int
    """Bit i tells whether layer i has the respective tensor or wants the respective gradient."""
    parameter_dtype: torch.dtype
    rule: str = "store"
    weight_sets: tuple[int, ...] = (0,)
    bias_sets: tuple[int, ...] = (0,)
    """Where each layer's numbers for the rule begin."""
    numbers_in_memory: bool = False
    """Whether these are on the device, not arguments."""

    @property
    def hidden(self) -> int:
        return len(self.activations)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units of every hidden layer's tap."""
        return tuple(t * out for t, out in zip(self.positions, self.widths_out, strict=True))[: self.hidden]

    @property
    def widest(self) -> int:
        """Rows of U that are needed."""
        return max(self.sizes, default=0)


@dataclass(frozen=True)
class TapsProblem:
    """All of one `project_taps` but the tensors' addresses."""

    projected: Projected
    sizes: tuple[int, ...]
    channels: tuple[int, ...]
    activations: tuple[str, ...]
    parameters: tuple[float, ...]
    saved: int
    dropout_mask: int
    channels_last: int
    """Bit i tells whether tap i has the respective tensor or order."""


def alignment(*widths: Sequence[int]) -> int:
    """The largest of 16, 8, 4, 2 and 1 that divides all."""
    return math.gcd(16, *(width for group in widths for width in group))


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits, so that every seed's launch has the same types."""
    return word - 2**32 if word >= 2**31 else word
