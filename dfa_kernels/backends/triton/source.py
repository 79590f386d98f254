"""Where the kernels get U from, and what they leave to the torch backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...feedback_spec import FeedbackSpec
from ...projection import PLAIN_KINDS
from ..torch_backend import shared_projection
from .plan import DTYPES, Projected


def reason_for_torch(error: Tensor, tensors: Sequence[Tensor], *dtypes: torch.dtype) -> str | None:
    """Why the torch backend has to compute this, or None."""
    wanted = {error.dtype, *dtypes, *[tensor.dtype for tensor in tensors]}
    if not wanted.issubset(DTYPES):
        return f"the kernels compute in {_names(DTYPES)}, not in {_names(wanted - set(DTYPES))}"
    activations = {tensor.dtype for tensor in tensors}
    if len(activations) > 1:
        return f"the layers' activations differ in dtype: {_names(activations)}"
    return None


def _names(dtypes: Sequence[torch.dtype] | set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def source_of(feedback: FeedbackSpec, is_stored: bool, is_elsewhere: bool) -> str:
    """The kernels' SOURCE; "projection" where the torch backend has to make e Uᵀ first."""
    if feedback.kind == "fastfood" or feedback.dtype not in DTYPES or is_elsewhere:
        return "projection"
    if not is_stored:
        return "sparse_seed" if feedback.kind == "sparse" else feedback.kind
    if feedback.kind in PLAIN_KINDS:
        return "matrix"
    return "signs" if feedback.kind == "rademacher" else "sparse"


def describe_projection(
    error: Tensor, stored: Sequence[Tensor], feedback: FeedbackSpec, size: int, dtype: torch.dtype
) -> Projected:
    """How e Uᵀ of the widest tap, of `size` units, comes about; dtype: of the activations. Reads no values."""
    is_elsewhere = bool(stored) and stored[0].device != error.device
    source = source_of(feedback, bool(stored), is_elsewhere) if size else "projection"
    given = source == "projection"
    return Projected(
        error.shape[0],
        error.shape[1],
        (error.shape[1], 1) if given else (error.stride(0), error.stride(1)),
        torch.float32 if given else error.dtype,
        feedback,
        source,
        dtype,
        torch.backends.cuda.matmul.fp32_precision == "tf32",
    )


def projection_tensors(
    how: Projected, error: Tensor, stored: Sequence[Tensor], size: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The kernels' error and `stored`: parts of U, or P; any tensor where the kernel reads none."""
    if how.source != "projection":
        return error, tuple(stored) or (error,)
    wide = dense(error.float())
    if not size:
        return wide, (wide,)
    return wide, (dense(shared_projection(error, stored, how.feedback, size).values.float()),)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, its elements one after the other."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def mask_of(flags: Sequence[bool]) -> int:
    """Bit i is flag i."""
    return sum(bool(flag) << i for i, flag in enumerate(flags))
