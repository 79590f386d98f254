"""Where the kernels get U from, and what they leave to the torch backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch_internals import cuda_matmul_precision
from ...feedback.spec import FeedbackSpec
from ..layout import ALIGNMENT, dense
from ..torch_backend import shared_projection
from .problem import DTYPES, LARGEST_FASTFOOD_ERROR, Projected


class ErrorLooks(NamedTuple):
    """All of the error and of what the feedback stores that decides what runs; plain values, cheap to hash."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    feedback: FeedbackSpec
    is_stored: bool
    is_elsewhere: bool
    """Whether what is stored is on another device than the error."""
    is_aligned: bool
    """Whether the error is aligned; without values, it does."""
    fp32_precision: str


def looks_of_error(error: Tensor, stored: Sequence[Tensor], feedback: FeedbackSpec) -> ErrorLooks:
    """What the projection's arguments look like. Reads no values, so meta tensors do."""
    return ErrorLooks(
        error.shape,
        error.stride(),
        error.dtype,
        feedback,
        bool(stored),
        bool(stored) and stored[0].device != error.device,
        error.data_ptr() % ALIGNMENT == 0,
        cuda_matmul_precision(),
    )


def reason_for_torch(error: torch.dtype, activations: Set[torch.dtype], parameters: torch.dtype | None) -> str:
    """Why the torch backend has to compute with these dtypes; empty if it has not."""
    if parameters is None:
        return "the parameters and their state differ in dtype or have gaps in memory"
    if lacking := {error, parameters, *activations} - set(DTYPES):
        return f"the kernels compute in {_names(DTYPES)}, not in {_names(lacking)}"
    if len(activations) > 1:
        return f"the layers' activations differ in dtype: {_names(activations)}"
    return ""


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def source_of(looks: ErrorLooks) -> str:
    """The kernels' SOURCE; "projection" where the torch backend has to make e Uᵀ first."""
    feedback = looks.feedback
    kind = feedback.row
    too_large = kind.tile == "blocks" and looks.shape[1] > LARGEST_FASTFOOD_ERROR
    if too_large or feedback.dtype not in DTYPES or looks.is_elsewhere:
        return "projection"
    return kind.stored_source if looks.is_stored else kind.seed_source


def projected_for(looks: ErrorLooks, size: int, dtype: torch.dtype) -> Projected:
    """How e Uᵀ of the widest tap, of `size` units, comes about; dtype: of the activations."""
    source = source_of(looks) if size else "projection"
    given = source == "projection"
    rows, error_size = looks.shape
    return Projected(
        rows,
        error_size,
        (error_size, 1) if given else (looks.strides[0], looks.strides[1]),
        torch.float32 if given and size else looks.dtype,
        looks.feedback,
        source,
        dtype,
        bool(given and size) or looks.is_aligned,
        looks.fp32_precision == "tf32",
    )


def projection_tensors(
    how: Projected, error: Tensor, stored: Sequence[Tensor], size: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The kernels' error and `stored`: parts of U, or P; any tensor where the kernel reads none."""
    if how.source != "projection":
        return error, tuple(stored) or (error,)
    if not size:
        return dense(error), (dense(error),)
    return dense(error.float()), (dense(shared_projection(error, stored, how.feedback, size).values.float()),)


def mask_of(flags: Sequence[bool]) -> int:
    """Bit i is flag i."""
    return sum(bool(flag) << i for i, flag in enumerate(flags))
