"""The autograd node of segments that need δ itself: fused convolutions, and local graphs that autograd finishes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import take_saved_tensors
from ..autocast import without_autocast
from ..backends.calls import TapsCall
from .deltas import deltas
from .first_order import refuse_second_order
from .node_plan import ConvolutionSlot, TapsPlan, as_error, meet_numbers, same


class TapsNode(torch.autograd.Function):
    """Identity on the output. Inputs: the plan, the output, the tensors that the plan numbers.

    Those are roots of local graphs, parameters and saved tensors of fused convolutions, what the feedback stores.
    """

    @staticmethod
    def forward(ctx: Any, plan: TapsPlan, output: Tensor, *tensors: Tensor) -> Tensor:
        is_traced = torch.compiler.is_compiling()
        if is_traced:
            units, slots = [root.units for root in plan.roots], plan.convolutions
            meet_numbers(plan.feedback, units, [number for slot in slots for number in (slot.p, slot.q)])
        ctx.plan = plan
        ctx.save_for_backward(*(tensors[i] for i in plan.kept))
        return same(output, is_traced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        with without_autocast(gradient.device):
            return _backward(ctx, gradient)


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    plan: TapsPlan = ctx.plan
    tensors = dict(zip(plan.kept, take_saved_tensors(ctx), strict=True))
    wanted = ctx.needs_input_grad[2:]
    grads: list[Tensor | None] = [None] * len(wanted)
    error = as_error(gradient, plan.batch_dims)
    _finish_taps(plan, tensors, error, tuple(gradient.shape[: plan.batch_dims]), wanted, grads)
    return (None, gradient, *grads)


def _finish_taps(
    plan: TapsPlan,
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
    slot: ConvolutionSlot,
    delta: Tensor,
    x: Tensor,
    weight: Tensor,
    wanted: tuple[bool, ...],
    grads: list[Tensor | None],
) -> None:
    """ΔW and Δb of a convolution. Its input mask stays off: nothing flows to the layer before."""
    numbers = slot.numbers
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


def taps_call(plan: TapsPlan, tensors: dict[int, Tensor], error: Tensor) -> TapsCall:
    """The taps: the roots, of those with as many units one, then the convolutions."""
    taps: list[tuple[Any, ...]] = [(size, None, None, "identity", 0.0, 0.0) for size in plan.root_sizes(tensors)]
    for slot in plan.convolutions:
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


def _add(grads: list[Tensor | None], i: int, grad: Tensor) -> None:
    before = grads[i]
    grads[i] = grad if before is None else before + grad


def _get(tensors: dict[int, Tensor], i: int | None) -> Tensor | None:
    return None if i is None else tensors[i]
