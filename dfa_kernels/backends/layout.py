"""Tensors as kernels read them: in an order that they know, without gaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes to whose multiples what kernels' fast ways read and write is aligned."""


def dense(tensor: Tensor) -> Tensor:
    """The tensor, its elements one after the other."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def ordered(saved: Tensor) -> Tensor:
    """saved, in one of the two orders that kernels know: contiguous, or channels last."""
    return saved if _is_channels_last(saved) else dense(saved)


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of [b, C, …] vary fastest in memory, with nothing left out."""
    if tensor.dim() < 3 or tensor.is_contiguous():
        return False
    return tensor.movedim(1, -1).is_contiguous()


def like(mask: Tensor, saved: Tensor) -> Tensor:
    """mask, in the order of saved."""
    return mask if mask.stride() == saved.stride() else torch.empty_like(saved).copy_(mask)


def dense_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The one dtype of tensors without gaps in memory; None if there are several, or gaps."""
    dtype = tensors[0].dtype if tensors else None
    return dtype if all([t.dtype is dtype and t.is_contiguous() for t in tensors]) else None
