"""The autograd node of all fused linear layers: the error comes in, the gradients of every layer go out at once.

With a fused optimizer no gradient does: the node enters the call in the optimizer's ledger, for its step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._torch_internals import backward_reaches, gradient_is_awaited, take_saved_tensors
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
        if torch.compiler.is_compiling():
            meet_numbers(plan.feedback, [], plan.numbers)
        ctx.plan, ctx.ledger = plan, ledger
        ctx.save_for_backward(*tensors[: plan.kept])
        return same(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        plan: LayersPlan = ctx.plan
        none = [None] * plan.kept
        # A hook may have come since the forward pass.
        if ctx.ledger is None or any([*map(gradient_is_awaited, plan.parameters)]):
            with without_autocast(gradient.device):
                return (None, None, gradient, *none, *_gradients(ctx, gradient))
        _defer(ctx, gradient)
        return (None, None, gradient, *none, *[None] * len(plan.parameters))


@torch.autograd.function.once_differentiable
def _gradients(ctx: Any, gradient: Tensor) -> list[Tensor]:
    plan: LayersPlan = ctx.plan
    call = plan.call(as_error(gradient, plan.batch_dims), take_saved_tensors(ctx))
    return backends.BACKENDS[plan.backend].layer_grads(call, plan.dtype)


def _defer(ctx: Any, gradient: Tensor) -> None:
    plan, kept = ctx.plan, ctx.saved_tensors
    if torch.compiler.is_compiling():
        # Then the compiler leaves the node as it is. That of torch 2.11 ends with an error at `next_functions`.
        raise RuntimeError("gradients cannot be deferred by a compiler")
    # torch.autograd.grad and backward(inputs=…) may pass here on their way to something else than the parameters.
    count = len(plan.parameters)
    reached = backward_reaches([node for node, _ in ctx.next_functions[-count:]])
    if all(reached):
        ctx.ledger.add(DeferredCall(plan, (*kept, as_error(gradient, plan.batch_dims))))
    elif any(reached):
        raise RuntimeError(
            f"inputs: {sum(reached)} of {count} parameters whose gradients a fused optimizer computes together, "
            "expected all or none; use torch.optim for gradients of some"
        )
