"""Where the kernels get U from, and what they leave to the torch backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...feedback_spec import FeedbackSpec
from ...projection import PLAIN_KINDS
from ..torch_backend import shared_projection
from .plan import DTYPES, Projected

Parts = tuple[Tensor, ...]


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


def projected(
    error: Tensor, stored: Sequence[Tensor], feedback: FeedbackSpec, size: int, dtype: torch.dtype
) -> tuple[Projected, Tensor, Parts]:
    """How e Uᵀ of the widest tap comes about, the error, and the tensors that U is read from, if any."""
    is_elsewhere = bool(stored) and stored[0].device != error.device
    source = source_of(feedback, bool(stored), is_elsewhere)
    parts: Parts = tuple(stored)
    if source == "projection" or not size:
        source, error = "projection", error.float()
        parts = (shared_projection(error, stored, feedback, size).values.float().contiguous(),) if size else ()
    problem = Projected(
        error.shape[0],
        error.shape[1],
        (error.stride(0), error.stride(1)),
        error.dtype,
        feedback,
        source,
        dtype,
        torch.backends.cuda.matmul.fp32_precision == "tf32",
    )
    return problem, error, parts or (error,)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, its elements one after the other."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()
