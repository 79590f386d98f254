"""The one autograd node: the error comes in, the gradients of every segment go out.

`attach` ends a forward pass: it hands the node everything the segments saved. Nothing stays on the module, so passes
may interleave, and several may be alive before their backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._torch_internals import gradient_is_awaited, take_saved_tensors
from ..autocast import without_autocast
from ..backends.calls import LayerCall, TapsCall
from ..forward.record import Pass
from ..forward.segments import FusedLayer
from .deferred import DeferredCall, DeferringNode, Ledger, deferred_call
from .deltas import deltas
from .first_order import refuse_second_order
from .node_plan import (
    LayerSlot,
    NodePlan,
    TensorTable,
    as_error,
    as_rows,
    grouped_dtype,
    make_plan,
    same,
    shares_launch,
)


def attach(seen: Pass, ledger: Ledger | None) -> Tensor:
    """The pass's output, now with an autograd node that turns its gradient into every segment's."""
    output = seen.output if seen.last is None else seen.output.detach()
    remaining, call = (seen, None) if ledger is None else _defer(seen)
    if remaining.segments or remaining.last is not None:
        table = TensorTable()
        plan = make_plan(table, remaining)
        output = DFANode.apply(plan, output, *table.tensors)
    if ledger is not None and call is not None:
        output = DeferringNode.apply(ledger, call, output, *call.weights)
    return output


def _defer(seen: Pass) -> tuple[Pass, DeferredCall | None]:
    """What remains for `DFANode`, and the deferred call for the rest: the fused linear layers without hooks."""
    dtype = grouped_dtype(seen)
    hidden: list[FusedLayer] = []
    remaining = []
    for segment in seen.segments:
        layer = segment.layer
        if layer is not None and shares_launch(layer, dtype) and not _has_hooks(layer):
            hidden.append(layer)
        else:
            remaining.append(segment)
    output = None if seen.last is None or _has_hooks(seen.last) else seen.last
    if not hidden and output is None:
        return seen, None
    call = deferred_call(hidden, output, seen)
    return replace(seen, segments=remaining, last=None if output is seen.last else seen.last), call


def _has_hooks(layer: FusedLayer) -> bool:
    """Whether somebody waits for a gradient of the layer's parameters, which a deferred call never has."""
    return gradient_is_awaited(layer.weight) or (layer.bias is not None and gradient_is_awaited(layer.bias))


class DFANode(torch.autograd.Function):
    """Identity on the output; its backward pass is the whole of DFA.

    Inputs: the plan, the output, then the tensors that the plan's slots number: roots of local graphs, parameters and
    saved tensors of fused layers, what the feedback stores.
    """

    @staticmethod
    def forward(ctx: Any, plan: NodePlan, output: Tensor, *tensors: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            _meet_numbers(plan)
        ctx.plan = plan
        ctx.save_for_backward(*(tensors[i] for i in plan.saved))
        return same(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        with without_autocast(gradient.device):
            return _backward(ctx, gradient)


def _meet_numbers(plan: NodePlan) -> float:
    """Shows a compiler in the forward pass every number of the plan that may vary from call to call.

    The compiler of torch 2.10 confuses such numbers with each other if it first meets some in the backward pass.
    """
    layers = (*plan.linears, *plan.convolutions)
    units = sum(math.prod(root.units) for root in plan.roots) + sum(math.prod(layer.units) for layer in layers)
    return units + sum(layer.p + layer.q for layer in layers) + plan.feedback.gain


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    plan: NodePlan = ctx.plan
    tensors = dict(zip(plan.saved, take_saved_tensors(ctx), strict=True))
    wanted = ctx.needs_input_grad[2:]
    grads: list[Tensor | None] = [None] * len(wanted)
    error = as_error(gradient, plan.batch_dims)
    call = layer_call(plan, tensors, error, wanted) if plan.linears else None
    if plan.roots or plan.convolutions:
        _finish_taps(plan, tensors, error, tuple(gradient.shape[: plan.batch_dims]), wanted, grads)
    if call is not None:
        _linear_grads(plan, call, grads)
    return (None, gradient, *grads)


def _finish_taps(
    plan: NodePlan,
    tensors: dict[int, Tensor],
    error: Tensor,
    rows: tuple[int, ...],
    wanted: tuple[bool, ...],
    grads: list[Tensor | None],
) -> None:
    """The gradients of the fused convolutions, and δ for every root, for autograd to go on with.

    As backpropagation it goes from the last layer to the first, each of which lets go of what it needed: `tensors` ends
    up empty. What a root gets lives on, so the roots come last.
    """
    sizes, units = plan.root_sizes(tensors), [root.sizes(tensors) for root in plan.roots]
    operands = [(tensors[slot.x], tensors[slot.weight]) for slot in plan.convolutions]
    made = deltas(plan.backend, taps_call(plan, tensors, error))
    tensors.clear()
    for slot in reversed(plan.convolutions):
        _convolution_grads(slot, next(made), *operands.pop(), wanted, grads)
    of_roots = list(made)[::-1]
    for root, shape in zip(plan.roots, units, strict=True):
        delta = of_roots[sizes.index(math.prod(shape))].reshape(rows + shape)
        _add(grads, root.root, delta.movedim(tuple(range(len(rows))), root.rows))


def _convolution_grads(
    slot: LayerSlot, delta: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], grads: list[Tensor | None]
) -> None:
    """ΔW and Δb of a convolution. Its input mask stays off: nothing flows to the layer before."""
    numbers = slot.convolution
    assert numbers is not None
    wants_bias = slot.bias is not None and wanted[slot.bias]
    _, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        delta,
        x,
        weight.to(x.dtype),
        [weight.shape[0]],
        numbers.stride,
        numbers.padding,
        numbers.dilation,
        False,
        [0] * len(numbers.stride),
        numbers.groups,
        [False, wanted[slot.weight], wants_bias],
    )
    if wanted[slot.weight]:
        _add(grads, slot.weight, weight_grad.to(weight.dtype))
    if slot.bias is not None and wants_bias:
        _add(grads, slot.bias, bias_grad.to(weight.dtype))


def _linear_grads(plan: NodePlan, call: LayerCall, grads: list[Tensor | None]) -> None:
    """ΔW and Δb of the fused linear layers."""
    remaining = iter(backends.BACKENDS[plan.backend].layer_grads(call, plan.dtype))
    for slot, wants_weight, wants_bias in zip(plan.linears, call.weight_grads, call.bias_grads, strict=True):
        if wants_weight:
            _add(grads, slot.weight, next(remaining))
        if slot.bias is not None and wants_bias:
            _add(grads, slot.bias, next(remaining))


def taps_call(plan: NodePlan, tensors: dict[int, Tensor], error: Tensor) -> TapsCall:
    """The taps: the roots, of those with as many units one, then the convolutions."""
    taps: list[tuple[Any, ...]] = [(size, None, None, "identity", 0.0, 0.0) for size in plan.root_sizes(tensors)]
    for slot in plan.convolutions:
        assert slot.saved is not None
        h = tensors[slot.saved]
        mask = _get(tensors, slot.dropout_mask)
        taps.append((math.prod(h.shape[1:]), h, mask, slot.activation, slot.p, slot.q))
    sizes, saved, dropout_mask, activations, p, q = zip(*taps, strict=True)
    return TapsCall(
        error,
        [tensors[i] for i in plan.stored],
        plan.feedback,
        sizes,
        saved,
        dropout_mask,
        activations,
        [number for pair in zip(p, q, strict=True) for number in pair],
    )


def layer_call(plan: NodePlan, tensors: dict[int, Tensor], error: Tensor, wanted: Sequence[bool]) -> LayerCall:
    """The fused linear layers; wanted: whether each of the node's tensors needs a gradient."""
    hidden = [slot for slot in plan.linears if slot.saved is not None]
    return LayerCall(
        error,
        [tensors[i] for i in plan.stored],
        plan.feedback,
        [as_rows(tensors[slot.x]) for slot in plan.linears],
        [as_rows(tensors[slot.saved]) for slot in hidden if slot.saved is not None],
        [None if slot.dropout_mask is None else as_rows(tensors[slot.dropout_mask]) for slot in hidden],
        [slot.activation for slot in hidden],
        [number for slot in hidden for number in (slot.p, slot.q)],
        [wanted[slot.weight] for slot in plan.linears],
        [slot.bias is not None and wanted[slot.bias] for slot in plan.linears],
    )


def _add(grads: list[Tensor | None], i: int, grad: Tensor) -> None:
    before = grads[i]
    grads[i] = grad if before is None else before + grad


def _get(tensors: dict[int, Tensor], i: int | None) -> Tensor | None:
    return None if i is None else tensors[i]
