"""The one autograd node: the error comes in, the gradients of every segment go out.

`attach` ends a forward pass: it hands the node everything the segments kept. Nothing stays on the module, so passes
may interleave, and several may be alive before their backward passes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import backends
from .deferred import LayerCall, Ledger, as_rows, layer_call
from .feedback import Feedback
from .plan import LayerSlot, NodePlan, TensorTable, error_shape, grouped_dtype, make_plan, tap_units
from .segments import FusedLayer, Segment


def attach(
    output: Tensor,
    segments: list[Segment],
    last: FusedLayer | None,
    feedback: Feedback,
    backend: str,
    ledger: Ledger | None,
) -> Tensor:
    """The output [..., E], now with an autograd node that turns its gradient into every segment's."""
    rows, error_size = error_shape(output)
    backend = backends.resolve(backend, output.device)
    widest = max([0, *[math.prod(tap_units(segment, rows)) for segment in segments]])
    stored = feedback.stored(widest, error_size, output.device) if segments else []
    plain_output = output if last is None else output.detach()
    table = TensorTable()
    deferred = None
    if ledger is not None:
        is_whole = last is not None
        segments, last, call = _defer(segments, last, stored, feedback, backend)
        if is_whole and not segments:
            whole: Tensor = DeferringNode.apply(ledger, call, plain_output, call.weights[0])
            return whole
        if call.weights:
            deferred = (ledger, call)
            # The node has no gradient for the call's parameters, but without one of them no error reaches it.
            table.index(call.weights[0])
    plan = make_plan(table, segments, last, stored, rows, feedback.spec, backend)
    result: Tensor = DFANode.apply(plan, deferred, plain_output, *table.tensors)
    return result


def _defer(
    segments: list[Segment], last: FusedLayer | None, stored: list[Tensor], feedback: Feedback, backend: str
) -> tuple[list[Segment], None, LayerCall]:
    """Moves the fused linear layers to a deferred call. What autograd has to finish remains for the node."""
    dtype = grouped_dtype(segments, last)
    hidden, remaining = [], []
    for segment in segments:
        layer = segment.layer
        if layer is not None and layer.convolution is None and layer.weight.dtype == dtype:
            hidden.append(layer)
        else:
            remaining.append(segment)
    return remaining, None, layer_call(hidden, last, stored, feedback.spec, backend)


class DeferringNode(torch.autograd.Function):
    """`DFANode` where a fused optimizer finishes every segment: the error goes to the ledger, and that is all.

    ``anchor`` is one of the call's parameters; because of it the output requires grad. Its gradient is not computed.
    """

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, call: LayerCall, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.ledger, ctx.call = ledger, call
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        ctx.ledger.append(ctx.call.with_error(_as_error(gradient)))
        return None, None, None, None


class DFANode(torch.autograd.Function):
    """Identity on the output; its backward pass is the whole of DFA.

    Inputs: the plan, a deferred call with the ledger it goes to (or None), the output, then the tensors that the
    plan's slots number: roots of local graphs, parameters and saved tensors of fused layers, what the feedback stores.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: NodePlan, deferred: tuple[Ledger, LayerCall] | None, output: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.plan = plan
        ctx.deferred = deferred
        ctx.save_for_backward(*(tensors[i] for i in plan.saved))
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        device = gradient.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _backward(ctx, gradient)
        return _backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    plan: NodePlan = ctx.plan
    saved = dict(zip(plan.saved, ctx.saved_tensors, strict=True))
    wanted = ctx.needs_input_grad[3:]
    grads: list[Tensor | None] = [None] * len(wanted)
    error = _as_error(gradient)
    if plan.roots or plan.convolutions:
        _finish_taps(plan, saved, error, error_shape(gradient)[0], wanted, grads)
    if plan.linears:
        _store_layer_grads(plan, saved, error, wanted, grads)
    if ctx.deferred is not None:
        ledger, call = ctx.deferred
        ledger.append(call.with_error(error))
    return (None, None, gradient, *grads)


def _as_error(gradient: Tensor) -> Tensor:
    """∂L/∂output as e [R, E]."""
    if gradient.dim() == 2:
        return gradient
    rows, error_size = error_shape(gradient)
    return gradient.reshape(math.prod(rows), error_size)


def _finish_taps(
    plan: NodePlan,
    saved: dict[int, Tensor],
    error: Tensor,
    rows: tuple[int, ...],
    wanted: tuple[bool, ...],
    grads: list[Tensor | None],
) -> None:
    """δ for every root, for autograd to go on with, and the gradients of the fused convolutions."""
    taps: list[tuple[Any, ...]] = [(slot.units, None, None, "identity", 0.0, 0.0) for slot in plan.roots]
    for slot in plan.convolutions:
        taps.append((slot.units, _get(saved, slot.kept), _get(saved, slot.noise), slot.activation, slot.p, slot.q))
    units, kept, noise, activations, p, q = zip(*taps, strict=True)
    deltas = backends.BACKENDS[plan.backend].project_taps(
        error,
        [saved[i] for i in plan.stored],
        plan.feedback,
        [math.prod(u) for u in units],
        kept,
        noise,
        activations,
        [number for pair in zip(p, q, strict=True) for number in pair],
    )
    free = len(plan.roots)
    for root, delta in zip(plan.roots, deltas[:free], strict=True):
        _add(grads, root.root, delta.reshape(rows + root.units))
    for slot, delta in zip(plan.convolutions, deltas[free:], strict=True):
        _convolution_grads(slot, saved, delta, wanted, grads)


def _convolution_grads(
    slot: LayerSlot, saved: dict[int, Tensor], delta: Tensor, wanted: tuple[bool, ...], grads: list[Tensor | None]
) -> None:
    """ΔW and Δb of a convolution. Its input mask stays off: nothing flows to the layer before."""
    x, weight, numbers = saved[slot.x], saved[slot.weight], slot.convolution
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


def _store_layer_grads(
    plan: NodePlan, saved: dict[int, Tensor], error: Tensor, wanted: tuple[bool, ...], grads: list[Tensor | None]
) -> None:
    """ΔW and Δb of the fused linear layers."""
    hidden = [slot for slot in plan.linears if slot.kept is not None]
    weight_grads = [wanted[slot.weight] for slot in plan.linears]
    bias_grads = [slot.bias is not None and wanted[slot.bias] for slot in plan.linears]
    layer_grads = backends.BACKENDS[plan.backend].layer_grads(
        error,
        [saved[i] for i in plan.stored],
        plan.feedback,
        [as_rows(saved[slot.x]) for slot in plan.linears],
        [as_rows(saved[slot.kept]) for slot in hidden if slot.kept is not None],
        [None if slot.noise is None else as_rows(saved[slot.noise]) for slot in hidden],
        [slot.activation for slot in hidden],
        [number for slot in hidden for number in (slot.p, slot.q)],
        weight_grads,
        bias_grads,
        plan.dtype,
    )
    remaining = iter(layer_grads)
    for slot, wants_weight, wants_bias in zip(plan.linears, weight_grads, bias_grads, strict=True):
        if wants_weight:
            _add(grads, slot.weight, next(remaining))
        if slot.bias is not None and wants_bias:
            _add(grads, slot.bias, next(remaining))


def _add(grads: list[Tensor | None], i: int, grad: Tensor) -> None:
    before = grads[i]
    grads[i] = grad if before is None else before + grad


def _get(saved: dict[int, Tensor], i: int | None) -> Tensor | None:
    return None if i is None else saved[i]
