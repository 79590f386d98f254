"""Gradients put off until a fused optimizer's step: everything they need, kept from one forward and backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .feedback_spec import FeedbackSpec
from .segments import FusedLayer


@dataclass(slots=True)
class LayerCall:
    """The arguments of `layer_grads` and the parameters they lead to: what a fused optimizer gets for a gradient."""

    operands: tuple[Any, ...]
    """What follows the error among the arguments, up to the dtype."""
    weights: list[nn.Parameter]
    """In the order of `layer_grads`' result."""
    backend: str
    versions: list[tuple[Tensor, int]]
    """The saved tensors and their version counters, to notice one that is overwritten before the call runs."""
    error: Tensor | None = None

    def with_error(self, error: Tensor) -> LayerCall:
        return LayerCall(self.operands, self.weights, self.backend, self.versions, error)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.error, *self.operands)


Ledger = list[LayerCall]
"""Where the backward passes since the last step leave their calls."""


def layer_call(
    hidden: list[FusedLayer], output: FusedLayer | None, stored: list[Tensor], feedback: FeedbackSpec, backend: str
) -> LayerCall:
    """The call for these layers, complete but for the error."""
    layers = hidden if output is None else [*hidden, output]
    weight_grads = [layer.weight.requires_grad for layer in layers]
    bias_grads = [layer.bias is not None and layer.bias.requires_grad for layer in layers]
    operands = (
        stored,
        feedback,
        [as_rows(layer.x) for layer in layers],
        [as_rows(layer.kept) for layer in hidden],
        [None if layer.noise is None else as_rows(layer.noise) for layer in hidden],
        [layer.activation for layer in hidden],
        [number for layer in hidden for number in (layer.p, layer.q)],
        weight_grads,
        bias_grads,
    )
    weights = [
        p
        for layer, *wanted in zip(layers, weight_grads, bias_grads, strict=True)
        for p, wants in zip((layer.weight, layer.bias), wanted, strict=True)
        if wants and p is not None
    ]
    saved = [t for layer in layers for t in (layer.x, layer.kept, layer.noise) if t is not None]
    return LayerCall(operands, weights, backend, [(t, t._version) for t in saved])


def as_rows(tensor: Tensor) -> Tensor:
    """[..., features] as [n, features]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
