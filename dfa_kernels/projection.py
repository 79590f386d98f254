"""The parts that U is stored as, and the projection of the error by them, in blocks of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fastfood
from .autocast import without_autocast
from .entries import fill, packed_signs, row_passes, sparse_entries, unpack_signs
from .feedback_spec import FeedbackSpec

# Kinds whose dense storage is U itself; "matrix" is a given one.
PLAIN_KINDS = ("gaussian", "uniform", "matrix")

Parts = list[Tensor]
Source = Callable[[range], Parts]
Piece = tuple[slice, Tensor]


def row_unit(spec: FeedbackSpec, error_size: int) -> int:
    """Rows come in units of one, but those of fastfood in whole blocks."""
    return fastfood.block_rows(error_size) if spec.kind == "fastfood" else 1


def generate(spec: FeedbackSpec, units: range, error_size: int, device: torch.device) -> Parts:
    """What defines these rows (or blocks) of U, as dense storage keeps it; on the meta device only its shapes."""
    if device.type == "meta":
        return _empty_parts(spec, units.stop - units.start, error_size, device)
    make = torch.ops.dfa_kernels.feedback_parts
    parts: Parts = make(spec.encode(), units.start, units.stop, error_size, device)
    return parts


# An operator, so that a compiler that meets it cannot fuse it into arithmetic with other last bits.
torch.library.define(
    "dfa_kernels::feedback_parts",
    "(str feedback, int start, int stop, int error_size, Device device) -> Tensor[]",
)


@torch.library.impl("dfa_kernels::feedback_parts", "CompositeExplicitAutograd")
@torch.inference_mode(False)  # What is made under inference mode may be kept for training.
def _feedback_parts(feedback: str, start: int, stop: int, error_size: int, device: torch.device) -> Parts:
    spec, units = FeedbackSpec.decode(feedback), range(start, stop)
    if spec.kind == "fastfood":
        return fastfood.fastfood_diagonals(spec.seed, units, error_size, device)
    if spec.kind == "sparse":
        nonzeros = spec.nonzeros_per_row(error_size)
        return list(sparse_entries(spec.seed, units, error_size, nonzeros, device))
    if spec.kind == "rademacher":
        return [packed_signs(spec.seed, units, error_size, device)]
    out = torch.empty(len(units), error_size, dtype=spec.dtype, device=device)
    return [fill(out, spec.kind, spec.seed, row=units.start)]


def _parts_fake(feedback: str, start: int, stop: int, error_size: int, device: torch.device) -> Parts:
    return _empty_parts(FeedbackSpec.decode(feedback), stop - start, error_size, device)


def _empty_parts(spec: FeedbackSpec, units: int, error_size: int, device: torch.device) -> Parts:
    return [torch.empty(units, width, dtype=dtype, device=device) for width, dtype in layouts(spec, error_size)]


torch.library.register_fake("dfa_kernels::feedback_parts", _parts_fake)


def layouts(spec: FeedbackSpec, error_size: int) -> list[tuple[int, torch.dtype]]:
    """Width and dtype of each part of a row (or block) of U."""
    if spec.kind == "fastfood":
        d = fastfood.block_rows(error_size)
        return [(d, torch.int8), (d, torch.int32), (d, torch.float32), (d, torch.float32)]
    if spec.kind == "sparse":
        nonzeros = spec.nonzeros_per_row(error_size)
        return [(nonzeros, torch.int32), (nonzeros, torch.int8)]
    if spec.kind == "rademacher":
        return [(-(-error_size // 32), torch.int32)]
    return [(error_size, spec.dtype)]


def _source(stored: Parts, spec: FeedbackSpec, error_size: int, device: torch.device) -> Source:
    if stored:
        return lambda units: [part[units.start : units.stop] for part in stored]
    return lambda units: generate(spec, units, error_size, device)


def project_unscaled(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int) -> Tensor:
    """error [b, E] times the transpose of U[:size]: [b, size], in spec.dtype, or in float64 for a float64
    error.

    stored: what Feedback.stored gives for at least `size` rows on the error's device, empty for procedural
    storage. U is never formed whole unless it is stored so. Not differentiable other than for a stored plain
    U.
    """
    dtype = torch.float64 if error.dtype == torch.float64 else spec.dtype
    if stored and spec.kind in PLAIN_KINDS:
        matrix = stored[0] if stored[0].shape[0] == size else stored[0][:size]
        if matrix.dtype == dtype:
            return error.to(dtype) @ matrix.T
    return _project_in_blocks(error, stored, spec, size, dtype)


@torch.no_grad()
def _project_in_blocks(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(error.shape[0], size, dtype=dtype, device=error.device)
    working = error.to(torch.promote_types(dtype, torch.float32))
    source = _source(stored, spec, error.shape[1], error.device)
    with without_autocast(error.device):
        for rows, product in _products(working, source, spec, size):
            out[:, rows] = product.T
    return out


def _products(error: Tensor, source: Source, spec: FeedbackSpec, size: int) -> Iterator[Piece]:
    """Pieces (rows r, U[r] errorᵀ) of the projection, of bounded size."""
    if spec.kind == "fastfood":
        yield from fastfood.fastfood_products(error, source, size)
        return
    multiply = _sparse_product if spec.kind == "sparse" else _block_product
    for rows in row_passes(range(size), _entries_per_row(spec, error), error.device):
        yield slice(rows.start, rows.stop), multiply(source(rows), error, spec)


def _entries_per_row(spec: FeedbackSpec, error: Tensor) -> int:
    batch, error_size = error.shape
    return max(batch, spec.nonzeros_per_row(error_size) if spec.kind == "sparse" else error_size)


def _block_product(parts: Parts, error: Tensor, spec: FeedbackSpec) -> Tensor:
    return _block(parts, error.shape[1]).to(error.dtype) @ error.T


def _block(parts: Parts, error_size: int) -> Tensor:
    return unpack_signs(parts[0], error_size) if parts[0].dtype == torch.int32 else parts[0]


def _sparse_product(parts: Parts, error: Tensor, spec: FeedbackSpec) -> Tensor:
    indices, signs = parts
    table = (error.T * _sparse_value(spec, error.shape[1])).contiguous()
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=signs.to(error.dtype))


def _sparse_value(spec: FeedbackSpec, error_size: int) -> Tensor:
    # Rounded to spec.dtype as every entry is, so that the projection and the matrix agree in any precision.
    return torch.tensor(math.sqrt(error_size / spec.nonzeros_per_row(error_size)), dtype=spec.dtype)


def dense_blocks(
    spec: FeedbackSpec, size: int, error_size: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Pieces (rows r, columns c, U[r, c]) of U, of bounded size."""
    source = _source([], spec, error_size, device)
    if spec.kind == "fastfood":
        yield from _fastfood_blocks(spec, source, size, error_size, device)
        return
    for rows in row_passes(range(size), error_size, device):
        parts = source(rows)
        block = _scatter(parts, spec, error_size) if spec.kind == "sparse" else _block(parts, error_size)
        yield slice(rows.start, rows.stop), slice(None), block


def _fastfood_blocks(
    spec: FeedbackSpec, source: Source, size: int, error_size: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """U as the projection of the identity, some of its rows at a time."""
    dtype = torch.promote_types(spec.dtype, torch.float32)
    for columns in row_passes(range(error_size), error_size, device):
        some = torch.zeros(len(columns), error_size, dtype=dtype, device=device)
        some[:, columns.start : columns.stop].fill_diagonal_(1)
        for rows, block in fastfood.fastfood_products(some, source, size):
            yield rows, slice(columns.start, columns.stop), block


def _scatter(parts: Parts, spec: FeedbackSpec, error_size: int) -> Tensor:
    indices, signs = parts
    values = signs.to(spec.dtype) * _sparse_value(spec, error_size)
    return values.new_zeros(indices.shape[0], error_size).scatter_(1, indices.long(), values)
