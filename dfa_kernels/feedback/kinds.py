"""The kinds of feedback matrix U: what is stored of each, how that is made and multiplied, how the kernels get it.

What is stored comes in units: one for every row of U, or one for a whole block of rows where U is structured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .entries import fill, packed_signs, sparse_entries, unpack_signs
from .fastfood import DIAGONALS, block_products, block_rows, fastfood_diagonals

if TYPE_CHECKING:
    from .spec import FeedbackSpec

Parts = list[Tensor]


def _filled(spec: FeedbackSpec, units: range, error_size: int, device: torch.device) -> Parts:
    out = torch.empty(len(units), error_size, dtype=spec.dtype, device=device)
    return [fill(out, spec.kind, spec.seed, row=units.start)]


def _product(parts: Parts, operand: Tensor, spec: FeedbackSpec) -> Tensor:
    dense = spec.row.dense
    assert dense is not None
    return dense(parts, spec, operand.shape[0]).to(operand.dtype) @ operand


@dataclass(frozen=True)
class Kind:
    """One row of the table. The defaults are those of a U that is stored as it is."""

    name: str
    make: Callable[[FeedbackSpec, range, int, torch.device], Parts] | None
    """(spec, units, E, device) → the parts that dense storage keeps of these units; None for a given U."""
    seed_source: str
    """The kernels' SOURCE where they make U anew."""
    stored_source: str = "matrix"
    """The kernels' SOURCE where they read the parts; "matrix" if these are U itself."""
    stored_as: str = "U from memory"
    """What the kernels read, in words."""
    tile: Literal["entries", "signs", "nonzeros", "blocks"] = "entries"
    """How the kernels multiply: by tiles of U, or such of ±1, by picking components of the error, by whole blocks."""
    layout: Callable[[FeedbackSpec, int], list[tuple[int, torch.dtype]]] = lambda spec, E: [(E, spec.dtype)]
    """(spec, E) → width and dtype of each part of a unit."""
    unit_rows: Callable[[int], int] = lambda E: 1
    """E → how many rows of U a unit is."""
    work: Callable[[FeedbackSpec, int, int], int] = lambda spec, batch, E: max(batch, E)
    """(spec, b, E) → numbers that the product of a unit takes at once."""
    operand: Callable[[Tensor, FeedbackSpec], Tensor] = lambda error, spec: error.T
    """(error [b, E], spec) → what each product takes of it, made once."""
    multiply: Callable[[Parts, Tensor, FeedbackSpec], Tensor] = _product
    """(parts of units, operand, spec) → U[their rows] errorᵀ, in the operand's dtype."""
    dense: Callable[[Parts, FeedbackSpec, int], Tensor] | None = lambda parts, spec, E: parts[0]
    """(parts of units, spec, E) → U[their rows]; None if that is the projection of the identity."""
    value: Callable[[FeedbackSpec, int], Tensor] = lambda spec, E: torch.ones((), device="cpu")
    """(spec, E) → the factor from the signs that a kernel sums to the entries of U, in spec.dtype."""


def _sparse_value(spec: FeedbackSpec, error_size: int) -> Tensor:
    # Rounded to spec.dtype as every entry is, so that the projection and the matrix agree in any precision.
    value = math.sqrt(error_size / spec.nonzeros_per_row(error_size))
    return torch.tensor(value, dtype=spec.dtype, device="cpu")


def _sparse_product(parts: Parts, operand: Tensor, spec: FeedbackSpec) -> Tensor:
    indices, signs = parts
    if not operand.shape[1]:
        # Which torch refuses for some sizes.
        return operand.new_zeros(len(indices), 0)
    return F.embedding_bag(indices, operand, mode="sum", per_sample_weights=signs.to(operand.dtype))


def _scattered(parts: Parts, spec: FeedbackSpec, error_size: int) -> Tensor:
    indices, signs = parts
    values = signs.to(spec.dtype) * _sparse_value(spec, error_size)
    return values.new_zeros(indices.shape[0], error_size).scatter_(1, indices.long(), values)


def _padded(error: Tensor, spec: FeedbackSpec) -> Tensor:
    error_size = error.shape[1]
    return F.pad(error, (0, block_rows(error_size) - error_size)).t().contiguous()


FEEDBACK_KINDS: dict[str, Kind] = {
    row.name: row
    for row in (
        Kind("gaussian", _filled, "gaussian"),
        Kind(
            "rademacher", lambda spec, units, E, device: [packed_signs(spec.seed, units, E, device)],
            "rademacher", "signs", "U from packed signs", tile="signs",
            layout=lambda spec, E: [(-(-E // 32), torch.int32)],
            dense=lambda parts, spec, E: unpack_signs(parts[0], E),
        ),
        Kind("uniform", _filled, "uniform"),
        Kind(
            "sparse", lambda spec, units, E, device: list(
                sparse_entries(spec.seed, units, E, spec.nonzeros_per_row(E), device)
            ),
            "sparse_seed", "sparse", "U from its non-zeros", tile="nonzeros",
            layout=lambda spec, E: [(spec.nonzeros_per_row(E), dtype) for dtype in (torch.int32, torch.int8)],
            work=lambda spec, batch, E: max(batch, spec.nonzeros_per_row(E)),
            operand=lambda error, spec: (error.T * _sparse_value(spec, error.shape[1])).contiguous(),
            multiply=_sparse_product, dense=_scattered, value=_sparse_value,
        ),
        Kind(
            "fastfood", lambda spec, units, E, device: fastfood_diagonals(spec.seed, units, E, device),
            "fastfood_seed", "fastfood", "U as Fastfood's diagonals", tile="blocks",
            layout=lambda spec, E: [(block_rows(E), dtype) for dtype in DIAGONALS],
            unit_rows=block_rows, work=lambda spec, batch, E: 2 * block_rows(E) * max(1, batch),
            operand=_padded, multiply=lambda parts, operand, spec: block_products(operand, *parts), dense=None,
        ),
        Kind("matrix", None, ""),
    )
}  # fmt: skip
