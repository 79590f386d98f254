"""The parts that U is stored as, and the projection of the error by them, in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from .._torch_internals import forward_mode_is_on, is_under_functorch
from ..autocast import without_autocast
from .entries import row_passes
from .kinds import Parts
from .spec import FeedbackSpec

Source = Callable[[range], Parts]
_WIDE = (torch.float32, torch.float64)


def units_for(spec: FeedbackSpec, rows: int, error_size: int) -> int:
    """How many units (rows, or blocks of them) of U it takes to have these rows."""
    return -(-rows // spec.row.unit_rows(error_size))


def generate(spec: FeedbackSpec, units: range, error_size: int, device: torch.device) -> Parts:
    """What defines these units of U, as dense storage keeps it; on the meta device only its shapes."""
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


@torch.inference_mode(False)  # What is made under inference mode may be kept for training.
def _feedback_parts(feedback: str, start: int, stop: int, error_size: int, device: torch.device) -> Parts:
    spec, parts = FeedbackSpec.decode(feedback), _parts_fake(feedback, start, stop, error_size, device)
    assert spec.row.make is not None
    # Temporaries are several times as large as what is made.
    for units in row_passes(range(start, stop), sum(part.shape[1] for part in parts), device):
        for part, some in zip(parts, spec.row.make(spec, units, error_size, device), strict=True):
            part[units.start - start : units.stop - start] = some
    return parts


def _parts_fake(feedback: str, start: int, stop: int, error_size: int, device: torch.device) -> Parts:
    return _empty_parts(FeedbackSpec.decode(feedback), stop - start, error_size, device)


def _empty_parts(spec: FeedbackSpec, units: int, error_size: int, device: torch.device) -> Parts:
    layout = spec.row.layout(spec, error_size)
    return [torch.empty(units, width, dtype=dtype, device=device) for width, dtype in layout]


torch.library.impl("dfa_kernels::feedback_parts", "CompositeExplicitAutograd", _feedback_parts)
torch.library.register_fake("dfa_kernels::feedback_parts", _parts_fake)


def _source(stored: Parts, spec: FeedbackSpec, error_size: int, device: torch.device) -> Source:
    if stored:
        return lambda units: [part[units.start : units.stop] for part in stored]
    return lambda units: generate(spec, units, error_size, device)


def project(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int) -> Tensor:
    """error [b, E] times B_iᵀ: [b, size], in the error's dtype or a wider one; stored: as for `project_unscaled`.

    On a GPU by the operator, but for one product with a stored U. That has no derivatives, so transforms go by torch.
    """
    if _may_have_kernels(error.device) and not is_one_product(error.dtype, stored, spec) and not _is_transformed():
        return _by_operator(error, stored, spec, size)
    return project_by_torch(error, stored, spec, size)


def project_by_torch(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int) -> Tensor:
    """The same by torch on any device, as `project_unscaled` of the scaled error."""
    wide = error if error.dtype in _WIDE else error.float()
    scale = spec.scale(size, error.shape[1])
    if spec.dtype == wide.dtype and is_one_product(wide.dtype, stored, spec):
        # Of a sum with no share in it nothing is read.
        return torch.addmm(wide.new_empty(()), wide, _rows(stored[0], size).t(), beta=0, alpha=scale)
    # In float16 the error has to be scaled before its components are summed.
    return project_unscaled(wide * scale, stored, spec, size)


def _by_operator(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int) -> Tensor:
    call = (error, stored, spec.encode(), [size], [None], [None], ["identity"], [0.0, 0.0])
    (projected,) = torch.ops.dfa_kernels.project_taps(*call)
    return cast(Tensor, projected)


def _may_have_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_transformed() -> bool:
    return forward_mode_is_on() or (not torch.compiler.is_compiling() and is_under_functorch())


def is_one_product(error: torch.dtype, stored: Parts, spec: FeedbackSpec) -> bool:
    """Whether e Uᵀ, for an e of this dtype, is one product with what is stored, as libraries make it fastest."""
    whole = len(stored) > 0 and spec.row.stored_source == "matrix"
    return whole and stored[0].dtype == _projected_dtype(error, spec)


def _projected_dtype(error: torch.dtype, spec: FeedbackSpec) -> torch.dtype:
    return torch.float64 if error == torch.float64 else spec.dtype


def project_unscaled(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int) -> Tensor:
    """error [b, E] times the transpose of U[:size]: [b, size], in spec.dtype, or in float64 for a float64
    error.

    stored: what Feedback.stored gives for at least `size` rows on the error's device, empty for procedural
    storage. U is never formed whole unless it is stored so. Not differentiable other than for a stored plain
    U.
    """
    dtype = _projected_dtype(error.dtype, spec)
    if not is_one_product(error.dtype, stored, spec):
        return _project_in_blocks(error, stored, spec, size, dtype)
    return (error if error.dtype is dtype else error.to(dtype)) @ _rows(stored[0], size).t()


def _rows(matrix: Tensor, size: int) -> Tensor:
    return matrix if matrix.shape[0] == size else matrix[:size]


@torch.no_grad()
def _project_in_blocks(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(error.shape[0], size, dtype=dtype, device=error.device)
    working = error.to(torch.promote_types(dtype, torch.float32))
    source = _source(stored, spec, error.shape[1], error.device)
    for rows, product in _products(working, source, spec, size):
        out[:, rows] = product.T
    return out


def _products(error: Tensor, source: Source, spec: FeedbackSpec, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Pieces (rows r, U[r] errorᵀ) of the projection, of bounded size."""
    kind, (batch, error_size) = spec.row, error.shape
    each, operand = kind.unit_rows(error_size), kind.operand(error, spec)
    for units in row_passes(range(units_for(spec, size, error_size)), kind.work(spec, batch, error_size), error.device):
        rows = slice(units.start * each, min(units.stop * each, size))
        with without_autocast(error.device):
            product = kind.multiply(source(units), operand, spec)
        yield rows, product[: rows.stop - rows.start]


def dense_blocks(
    spec: FeedbackSpec, size: int, error_size: int, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Pieces (rows r, columns c, U[r, c]) of U, of bounded size."""
    source, dense = _source([], spec, error_size, device), spec.row.dense
    if dense is not None:
        for rows in row_passes(range(size), error_size, device):
            yield slice(rows.start, rows.stop), slice(None), dense(source(rows), spec, error_size)
        return
    dtype = torch.promote_types(spec.dtype, torch.float32)
    for columns in row_passes(range(error_size), error_size, device):
        identity = torch.zeros(len(columns), error_size, dtype=dtype, device=device)
        identity[:, columns.start : columns.stop].fill_diagonal_(1)
        for piece, block in _products(identity, source, spec, size):
            yield piece, slice(columns.start, columns.stop), block
