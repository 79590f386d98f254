"""The one autograd node: the error comes in, the gradients of every segment go out.

`attach` ends a forward pass: it hands the node everything the segments kept. Nothing stays on the module, so passes
may interleave, and several may be alive before their backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .autocast import without_autocast
from .deferred import DeferringNode, LayerCall, Ledger, layer_call
from .feedback import Feedback
from .plan import (
    LayerSlot,
    NodePlan,
    TensorTable,
    as_error,
    as_rows,
    check_units,
    error_shape,
    grouped_dtype,
    make_plan,
    shares_launch,
)
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
    rows, _ = error_shape(output)
    check_units(segments, last, rows)
    backend = backends.resolve(backend, output.device)
    stored = stored_feedback(output, segments, feedback)
    output = output if last is None else output.detach()
    call = None
    if ledger is not None:
        segments, last, call = _defer(segments, last, stored, feedback, backend)
    if segments or last is not None:
        table = TensorTable()
        plan = make_plan(table, segments, last, stored, feedback.spec, backend)
        output = DFANode.apply(plan, output, *table.tensors)
    if ledger is not None and call is not None:
        output = DeferringNode.apply(ledger, call, output, call.weights[0])
    return output


def stored_feedback(output: Tensor, segments: list[Segment], feedback: Feedback) -> list[Tensor]:
    """What the feedback keeps for the widest of the segments."""
    if not segments:
        return []
    return feedback.stored(
        max(math.prod(segment.units) for segment in segments),
        output.shape[-1] if output.dim() > 1 else 1,
        output.device,
    )


def _defer(
    segments: list[Segment], last: FusedLayer | None, stored: list[Tensor], feedback: Feedback, backend: str
) -> tuple[list[Segment], FusedLayer | None, LayerCall | None]:
    """What remains for `DFANode`, and the deferred call for the rest: the fused linear layers without hooks."""
    dtype = grouped_dtype(segments, last)
    hidden: list[FusedLayer] = []
    remaining = []
    for segment in segments:
        if segment.layer is not None and shares_launch(segment.layer, dtype) and not _has_hooks(segment.layer):
            hidden.append(segment.layer)
        else:
            remaining.append(segment)
    output = None if last is None or _has_hooks(last) else last
    if not hidden and output is None:
        return segments, last, None
    return remaining, None if output is last else last, layer_call(hidden, output, stored, feedback.spec, backend)


def _has_hooks(layer: FusedLayer) -> bool:
    """Whether somebody waits for a gradient of the layer's parameters, which a deferred call never has."""
    for p in (layer.weight, layer.bias):
        if p is not None and (p._backward_hooks or p._post_accumulate_grad_hooks):
            return True
    return False


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
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(gradient.device):
            return _backward(ctx, gradient)


def _meet_numbers(plan: NodePlan) -> float:
    """Shows a compiler in the forward pass every number of the plan that may vary from call to call.

    The compiler of torch 2.10 confuses such numbers with each other if it first meets some in the backward pass.
    """
    layers = (*plan.linears, *plan.convolutions)
    units = sum(math.prod(root.units) for root in plan.roots) + sum(math.prod(layer.units) for layer in layers)
    return units + sum(layer.p + layer.q for layer in layers) + plan.feedback.gain


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    plan: NodePlan = ctx.plan
    saved = dict(zip(plan.saved, ctx.saved_tensors, strict=True))
    wanted = ctx.needs_input_grad[2:]
    grads: list[Tensor | None] = [None] * len(wanted)
    error = as_error(gradient)
    if plan.roots or plan.convolutions:
        _finish_taps(plan, saved, error, error_shape(gradient)[0], wanted, grads)
    if plan.linears:
        _linear_grads(plan, saved, error, wanted, grads)
    return (None, gradient, *grads)


def _finish_taps(
    plan: NodePlan,
    saved: dict[int, Tensor],
    error: Tensor,
    rows: tuple[int, ...],
    wanted: tuple[bool, ...],
    grads: list[Tensor | None],
) -> None:
    """δ for every root, for autograd to go on with, and the gradients of the fused convolutions."""
    deltas = backends.BACKENDS[plan.backend].project_taps(*tap_arguments(plan, saved, error))
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


def _linear_grads(
    plan: NodePlan, saved: dict[int, Tensor], error: Tensor, wanted: tuple[bool, ...], grads: list[Tensor | None]
) -> None:
    """ΔW and Δb of the fused linear layers."""
    arguments = linear_arguments(plan, saved, error, wanted)
    layer_grads = backends.BACKENDS[plan.backend].layer_grads(*arguments, plan.dtype)
    weight_grads, bias_grads = arguments[-2:]
    remaining = iter(layer_grads)
    for slot, wants_weight, wants_bias in zip(plan.linears, weight_grads, bias_grads, strict=True):
        if wants_weight:
            _add(grads, slot.weight, next(remaining))
        if slot.bias is not None and wants_bias:
            _add(grads, slot.bias, next(remaining))


def tap_arguments(plan: NodePlan, saved: dict[int, Tensor], error: Tensor) -> tuple[Any, ...]:
    """The arguments of `project_taps`: the roots, then the convolutions."""
    taps: list[tuple[Any, ...]] = [(slot.units, None, None, "identity", 0.0, 0.0) for slot in plan.roots]
    for slot in plan.convolutions:
        taps.append((slot.units, _get(saved, slot.kept), _get(saved, slot.noise), slot.activation, slot.p, slot.q))
    units, kept, noise, activations, p, q = zip(*taps, strict=True)
    return (
        error,
        [saved[i] for i in plan.stored],
        plan.feedback,
        [math.prod(u) for u in units],
        kept,
        noise,
        activations,
        [number for pair in zip(p, q, strict=True) for number in pair],
    )


def linear_arguments(
    plan: NodePlan, saved: dict[int, Tensor], error: Tensor, wanted: Sequence[bool]
) -> tuple[Any, ...]:
    """The arguments of `layer_grads` up to its dtype; wanted: whether each of the node's tensors needs a gradient."""
    hidden = [slot for slot in plan.linears if slot.kept is not None]
    return (
        error,
        [saved[i] for i in plan.stored],
        plan.feedback,
        [as_rows(saved[slot.x]) for slot in plan.linears],
        [as_rows(saved[slot.kept]) for slot in hidden if slot.kept is not None],
        [None if slot.noise is None else as_rows(saved[slot.noise]) for slot in hidden],
        [slot.activation for slot in hidden],
        [number for slot in hidden for number in (slot.p, slot.q)],
        [wanted[slot.weight] for slot in plan.linears],
        [slot.bias is not None and wanted[slot.bias] for slot in plan.linears],
    )


def _add(grads: list[Tensor | None], i: int, grad: Tensor) -> None:
    before = grads[i]
    grads[i] = grad if before is None else before + grad


def _get(saved: dict[int, Tensor], i: int | None) -> Tensor | None:
    return None if i is None else saved[i]
