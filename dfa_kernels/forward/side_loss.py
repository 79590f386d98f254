"""Losses on hidden tensors: how they reach the layers before a tap, which cuts the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


class _Whole:
    """The tensor before the cut, on the cut one. A copy of a model that keeps the cut one comes without."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def remember_whole(cut: Tensor, whole: Tensor) -> None:
    """Lets `side_loss` find the tensor with its graph from the one that the network goes on with. Not for compilers."""
    cut._dfa_whole = _Whole(whole)  # type: ignore[attr-defined]


class Uncut(torch.autograd.Function):
    """The identity, as a tensor that is no view: its input can be cut in place, and may refer to it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def side_loss(tensor: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """``loss(tensor)``, to be added to the loss of the output; it teaches the tensor's own segment, too.

    A loss on a hidden tensor does not reach the layers before a tap, where only the output's projected error teaches.
    With this one a sparsity penalty on a hidden activation, say, reaches the layers that made it, back to the tap
    before. Nothing flows through later layers. May be called inside the network's forward or with a tensor that it
    keeps; outside `dfa_kernels.DFA` it is plain ``loss(tensor)``.

    Args:
        tensor: at a tap, or between two, of any shape; from a pass whose backward pass has not run yet.
        loss: from the tensor to a scalar.

    Raises:
        RuntimeError: the tensor was computed from one behind a tap and has lost its way back: call it with that one.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: got {type(tensor).__name__}, expected a tensor of the network")
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a function from the tensor to a scalar")
    if has_torch_function((tensor,)):
        # What looks for taps is not to look for them in here.
        found: Tensor = handle_torch_function(side_loss, (tensor,), tensor, loss)
        return found
    whole = getattr(tensor, "_dfa_whole", None)
    if whole is not None:
        return loss(whole.tensor)
    if torch.is_grad_enabled() and not tensor.requires_grad:
        raise RuntimeError(
            f"tensor: a tensor of shape {list(tensor.shape)} has no graph, so its loss would teach nothing; call "
            "side_loss with the activation that it was computed from, and compute the rest inside loss"
        )
    return loss(tensor)
