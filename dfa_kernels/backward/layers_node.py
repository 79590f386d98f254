"""The autograd node of all fused linear layers: the error comes in, the gradients of every layer go out at once.

With a fused optimizer no gradient does: the node enters the call in the optimizer's ledger, for its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._torch_internals import (
    BelowAutograd,
    WithoutAutocast,
    any_autocast_is_on,
    any_gradient_is_awaited,
    backward_reaches,
    take_saved_tensors,
)
from ..autocast import without_autocast
from .deferred import DeferredCall, Ledger
from .first_order import refuse_second_order
from .node_plan import LayersPlan, as_error, meet_numbers, same


class LayersNode(torch.autograd.Function):
    """Identity on the output. Inputs: the plan, the ledger or None, the output, the plan's tensors and parameters.

    Because of the parameters the output requires grad, and by them a deferring node knows whether a backward pass is
    for the parameters at all.
    """

    @staticmethod
    def forward(ctx: Any, plan: LayersPlan, ledger: Ledger | None, output: Tensor, *tensors: Tensor) -> Tensor:
        if plan.is_traced:
            meet_numbers(plan.feedback, [], plan.numbers)
        ctx.plan, ctx.ledger = plan, ledger
        ctx.save_for_backward(*tensors[: plan.kept])
        return same(output, plan.is_traced)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        plan: LayersPlan = ctx.plan
        error = as_error(gradient, plan.batch_dims)
        grads: Sequence[Tensor | None]
        # A hook may have come since the forward pass.
        if ctx.ledger is None or any_gradient_is_awaited(plan.parameters):
            grads = _traced_gradients(ctx, error) if torch.compiler.is_compiling() else _gradients(ctx, error)
        else:
            _defer(ctx, error)
            grads = [None] * len(plan.parameters)
        return (None, None, gradient, *[None] * plan.kept, *grads)


def _gradients(ctx: Any, error: Tensor) -> list[Tensor]:
    plan: LayersPlan = ctx.plan
    call, make = plan.call(error, take_saved_tensors(ctx)), backends.BACKENDS[plan.backend].layer_grads
    with BelowAutograd():
        # To ask takes less time than to turn off what is off.
        if not any_autocast_is_on():
            return make(call, plan.dtype)
        with WithoutAutocast():
            return make(call, plan.dtype)


@torch.autograd.function.once_differentiable
def _traced_gradients(ctx: Any, error: Tensor) -> list[Tensor]:
    """By a compiler, which traces with gradients on and knows no other way to leave out autocast."""
    plan: LayersPlan = ctx.plan
    with without_autocast(error.device):
        return backends.BACKENDS[plan.backend].layer_grads(plan.call(error, ctx.saved_tensors), plan.dtype)


def _defer(ctx: Any, error: Tensor) -> None:
    plan, kept = ctx.plan, ctx.saved_tensors
    if torch.compiler.is_compiling():
        # Then the compiler leaves the node as it is. That of torch 2.11 ends with an error at `next_functions`.
        raise RuntimeError("gradients cannot be deferred by a compiler")
    # torch.autograd.grad and backward(inputs=…) may pass here on their way to something else than the parameters.
    count = len(plan.parameters)
    reached = backward_reaches([node for node, _ in ctx.next_functions[-count:]])
    if all(reached):
        ctx.ledger.add(DeferredCall(plan, (*kept, error)))
    elif any(reached):
        raise RuntimeError(
            f"inputs: {sum(reached)} of {count} parameters whose gradients a fused optimizer computes together, "
            "expected all or none; use torch.optim for gradients of some"
        )
