"""The operators in plain PyTorch, on any device: the definition of correct for every other backend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..feedback.hadamard import hadamard_by_products
from ..feedback.projection import project_by_torch
from ..feedback.spec import FeedbackSpec
from ..updates import RULES, are_small, shares, update_each_
from .calls import DeviceNumbers, LayerCall, TapsCall

hadamard = hadamard_by_products

Layer = tuple[Tensor, Tensor, Tensor]
"""δa [R·T, out] and x [R·T, in] of a layer, and what adds up to its bias gradient: δa, or sums of it [any, out]."""


def project_taps(call: TapsCall) -> list[Tensor]:
    """δ of every tap; see `Backend.project_taps`."""
    shared = shared_projection(call.error, call.stored, call.feedback, max(call.sizes))
    deltas: list[Tensor] = []
    for tap in call.taps():
        delta = delta_of(shared, call.error.dtype, *tap)
        # A projection that needs no scaling is handed out as it is, but once.
        deltas.append(delta.clone() if any(delta is earlier for earlier in deltas) else delta)
    return deltas


def layer_grads(call: LayerCall, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of every fused linear layer; see `Backend.layer_grads`."""
    return grads_of(layer_deltas(call), call, dtype)


def grads_of(layers: Iterable[Layer], call: LayerCall, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the call's layers, one after the other."""
    grads = []
    for (delta, x, summed), wants_weight, wants_bias in zip(layers, call.weight_grads, call.bias_grads, strict=True):
        if wants_weight:
            gradient = delta.t().mm(x)
            grads.append(gradient if gradient.dtype == dtype else gradient.to(dtype))
        if wants_bias:
            grads.append(_bias_grad(summed, dtype))
    return grads


def layer_update_(
    call: LayerCall,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    rule: str,
    hyper: Sequence[float] | DeviceNumbers,
) -> None:
    """See `Backend.layer_update_`."""
    update_of_(layer_deltas(call), call, weights, state, rule, hyper)


def update_of_(
    layers: Iterable[Layer],
    call: LayerCall,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    rule: str,
    hyper: Sequence[float] | DeviceNumbers,
) -> None:
    """The update of the call's layers. No gradient outlives its layer's product, unless all together are small.

    Or unless numbers are on the device, which torch's products take from the host.
    """
    if isinstance(hyper, DeviceNumbers):
        grads = grads_of(layers, call, weights[0].dtype) if weights else []
        for i, (p, own_state, grad) in enumerate(zip(weights, shares(state, len(weights)), grads, strict=True)):
            RULES[rule].apply_row_(p, own_state, hyper.row(i), grad)
        return
    if weights and are_small(weights):
        update_each_(rule, weights, state, hyper, grads_of(layers, call, weights[0].dtype))
        return
    update = RULES[rule]
    of_each = zip(weights, shares(state, len(weights)), shares(hyper, len(weights)), strict=True)
    for (delta, x, summed), wants_weight, wants_bias in zip(layers, call.weight_grads, call.bias_grads, strict=True):
        if wants_weight:
            update.apply_product_(*next(of_each), delta, x)
        if wants_bias:
            parameter, own_state, own_hyper = next(of_each)
            update.apply_(parameter, own_state, own_hyper, _bias_grad(summed, parameter.dtype))


def layer_deltas(call: LayerCall) -> Iterator[Layer]:
    """One layer after the other, δ made by torch."""
    error, inputs, saved, numbers = call.error, call.inputs, call.saved, call.parameters
    if saved:
        # For an empty batch, whose gradients are zero, T is taken as 1.
        rows = error.shape[0]
        sizes = [h.numel() // rows if rows else h.shape[1] for h in saved]
        shared, dtype = shared_projection(error, call.stored, call.feedback, max(sizes)), error.dtype
        taps = zip(sizes, saved, call.dropout_mask, call.activations, numbers[0::2], numbers[1::2], strict=True)
        for x, tap in zip(inputs, taps, strict=False):
            delta = delta_of(shared, dtype, *tap)
            yield delta, x, delta
    for x in inputs[len(saved) :]:
        delta = error if error.dtype == x.dtype else error.to(x.dtype)
        yield delta, x, delta


class SharedProjection:
    """e Uᵀ [R, l_max], scaled for the widest layer. A narrower one takes its columns, times the ratio of the scales."""

    def __init__(self, values: Tensor, normalize: bool) -> None:
        self.values, self.normalize = values, normalize
        self.widest = values.shape[1]

    def for_size(self, size: int) -> tuple[Tensor, float]:
        return self.values[:, :size], math.sqrt(self.widest / size) if self.normalize else 1.0


def shared_projection(error: Tensor, stored: Sequence[Tensor], feedback: FeedbackSpec, size: int) -> SharedProjection:
    """Computed where the feedback lives, brought back to the error's device."""
    if stored and stored[0].device != error.device:
        values = project_by_torch(error.to(stored[0].device), list(stored), feedback, size).to(error.device)
    else:
        values = project_by_torch(error, list(stored), feedback, size)
    return SharedProjection(values, feedback.normalize)


def delta_of(
    shared: SharedProjection,
    dtype: torch.dtype,
    size: int,
    saved: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
    p: float,
    q: float,
) -> Tensor:
    """δ of one tap in the saved tensor's dtype, without one in `dtype`; see `Backend.project_taps`."""
    values, ratio = (shared.values, 1.0) if size == shared.widest else shared.for_size(size)
    if saved is None:
        return (values if values is shared.values else values * ratio).to(dtype)
    wide = saved if saved.dtype == values.dtype else saved.to(values.dtype)
    if saved.dim() != 2 or saved.shape[1] != size:
        values = values.reshape(saved.shape)
        # δ in the order of the saved tensor, which a convolution would bring it into. Compilers choose orders
        # themselves: asked for one in a backward pass, Dynamo traces that anew and leaves out that autocast is off.
        if not torch.compiler.is_compiling() and not saved.is_contiguous():
            values = torch.empty_like(saved, dtype=values.dtype).copy_(values)
    delta = ACTIVATIONS[activation].gradient(values, wide, p, q)
    if dropout_mask is not None:
        delta = delta * dropout_mask
    if ratio != 1:
        delta = delta * ratio
    return delta if delta.dtype == saved.dtype else delta.to(saved.dtype)


def _bias_grad(summed: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over the rows, in float32 at least."""
    if summed.dtype == dtype and dtype.itemsize >= 4:
        return summed.sum(0)
    return summed.sum(0, dtype=torch.promote_types(summed.dtype, torch.float32)).to(dtype)


def describe_layers(call: LayerCall, dtype: torch.dtype, rule: str, device: torch.device) -> str:
    """See `Backend.describe_layers`."""
    projection = "e Uᵀ once for all, then " if call.saved else ""
    return f"{projection}one product for each of {len(call.inputs)} layers"


def describe_taps(call: TapsCall, device: torch.device) -> str:
    """See `Backend.describe_taps`."""
    return f"e Uᵀ once for all, sliced for each of {len(call.sizes)} taps"
