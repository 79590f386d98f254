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

from . import fastfood
from .entries import fill, packed_signs, sparse_entries, unpack_signs

if TYPE_CHECKING:
    from .feedback_spec import FeedbackSpec

Parts = list[Tensor]


def _layout(spec: FeedbackSpec, error_size: int) -> list[tuple[int, torch.dtype]]:
    return [(error_size, spec.dtype)]


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
    layout: Callable[[FeedbackSpec, int], list[tuple[int, torch.dtype]]] = _layout
    """(spec, E) → width and dtype of each part of a unit."""
    unit_rows: Callable[[int], int] = lambda error_size: 1
    """E → how many rows of U a unit is."""
    work: Callable[[FeedbackSpec, int, int], int] = lambda spec, batch, error_size: max(batch, error_size)
    """(spec, b, E) → numbers that the product of a unit takes at once."""
    operand: Callable[[Tensor, FeedbackSpec], Tensor] = lambda error, spec: error.T
    """(error [b, E], spec) → what each product takes of it, made once."""
    multiply: Callable[[Parts, Tensor, FeedbackSpec], Tensor] = _product
    """(parts of units, operand, spec) → U[their rows] errorᵀ, in the operand's dtype."""
    dense: Callable[[Parts, FeedbackSpec, int], Tensor] | None = lambda parts, spec, error_size: parts[0]
    """(parts of units, spec, E) → U[their rows]; None if that is the projection of the identity."""
    value: Callable[[FeedbackSpec, int], Tensor] = lambda spec, error_size: torch.ones(())
    """(spec, E) → the factor from the signs that a kernel sums to the entries of U, in spec.dtype."""


def _sparse_layout(spec: FeedbackSpec, error_size: int) -> list[tuple[int, torch.dtype]]:
    nonzeros = spec.nonzeros_per_row(error_size)
    return [(nonzeros, torch.int32), (nonzeros, torch.int8)]


def _sparse_parts(spec: FeedbackSpec, units: range, error_size: int, device: torch.device) -> Parts:
    return list(sparse_entries(spec.seed, units, error_size, spec.nonzeros_per_row(error_size), device))


def _sparse_value(spec: FeedbackSpec, error_size: int) -> Tensor:
    # Rounded to spec.dtype as every entry is, so that the projection and the matrix agree in any precision.
    return torch.tensor(math.sqrt(error_size / spec.nonzeros_per_row(error_size)), dtype=spec.dtype)


def _sparse_product(parts: Parts, operand: Tensor, spec: FeedbackSpec) -> Tensor:
    indices, signs = parts
    return F.embedding_bag(indices, operand, mode="sum", per_sample_weights=signs.to(operand.dtype))


def _scattered(parts: Parts, spec: FeedbackSpec, error_size: int) -> Tensor:
    indices, signs = parts
    values = signs.to(spec.dtype) * _sparse_value(spec, error_size)
    return values.new_zeros(indices.shape[0], error_size).scatter_(1, indices.long(), values)


FEEDBACK_KINDS: dict[str, Kind] = {
    row.name: row
    for row in (
        Kind("gaussian", _filled, "gaussian"),
        Kind(
            "rademacher",
            lambda spec, units, error_size, device: [packed_signs(spec.seed, units, error_size, device)],
            "rademacher",
            "signs",
            "U from packed signs",
            tile="signs",
            layout=lambda spec, error_size: [(-(-error_size // 32), torch.int32)],
            dense=lambda parts, spec, error_size: unpack_signs(parts[0], error_size),
        ),
        Kind("uniform", _filled, "uniform"),
        Kind(
            "sparse",
            _sparse_parts,
            "sparse_seed",
            "sparse",
            "U from its non-zeros",
            tile="nonzeros",
            layout=_sparse_layout,
            work=lambda spec, batch, error_size: max(batch, spec.nonzeros_per_row(error_size)),
            operand=lambda error, spec: (error.T * _sparse_value(spec, error.shape[1])).contiguous(),
            multiply=_sparse_product,
            dense=_scattered,
            value=_sparse_value,
        ),
        Kind(
            "fastfood",
            lambda spec, units, error_size, device: fastfood.fastfood_diagonals(spec.seed, units, error_size, device),
            "fastfood_seed",
            "fastfood",
            "U as Fastfood's diagonals",
            tile="blocks",
            layout=lambda spec, error_size: [(fastfood.block_rows(error_size), dtype) for dtype in fastfood.DTYPES],
            unit_rows=fastfood.block_rows,
            work=lambda spec, batch, error_size: 2 * fastfood.block_rows(error_size) * max(1, batch),
            operand=lambda error, spec: fastfood.padded(error),
            multiply=lambda parts, operand, spec: fastfood.block_products(operand, *parts),
            dense=None,
        ),
        Kind("matrix", None, ""),
    )
}
