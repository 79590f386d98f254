"""Gradients put off until a fused optimizer's step: everything they need, saved from one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import backward_reaches
from ..backends.calls import LayerCall
from ..forward.record import Pass
from ..forward.segments import FusedLayer
from .node_plan import as_error, as_rows


@dataclass(slots=True)
class DeferredCall:
    """One call of `layer_grads` for all layers of a pass: what a fused optimizer gets in place of gradients."""

    call: Callable[..., LayerCall]
    """From the error, inputs, saved and dropout_mask."""
    has_noise: list[bool]
    weights: list[nn.Parameter]
    """What the gradients belong to, in the order of `layer_grads`' result."""
    backend: str
    batch_dims: int
    """How many leading dimensions of the output are rows."""
    tensors: Sequence[Tensor]
    """The layers' inputs, then what f' is computed from, the dropout masks that there are; once known, the error."""
    versions: tuple[int, ...] = ()
    """Version counters of the tensors after the backward pass."""

    def layers(self) -> LayerCall:
        """The call, once the error is known."""
        *tensors, error = self.tensors
        hidden = len(self.has_noise)
        layers = len(tensors) - hidden - sum(self.has_noise)
        masks = iter(tensors[layers + hidden :])
        dropout_mask = [next(masks) if noisy else None for noisy in self.has_noise]
        return self.call(error, tensors[:layers], tensors[layers : layers + hidden], dropout_mask)

    def completed(self, *tensors: Tensor) -> DeferredCall:
        """The call of one backward pass. Several may come from one forward pass."""
        versions = tuple([tensor._version for tensor in tensors])
        return DeferredCall(self.call, self.has_noise, self.weights, self.backend, self.batch_dims, tensors, versions)

    def check_versions(self) -> None:
        """RuntimeError if a tensor that the call needs was overwritten since its backward pass."""
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"step: a tensor of shape {tuple(tensor.shape)} that a deferred gradient needs was modified by an "
                    f"in-place operation before the step: it is at version {tensor._version}, expected {version}"
                )


Ledger = list[DeferredCall]
"""Where the backward passes since the last step leave their calls."""


def deferred_call(hidden: list[FusedLayer], output: FusedLayer | None, seen: Pass) -> DeferredCall:
    """The call for these layers of a pass, complete but for the error."""
    stored, feedback = seen.stored, seen.feedback
    layers = hidden if output is None else [*hidden, output]
    dropout_mask = [layer.dropout_mask for layer in hidden]
    tensors = [layer.x for layer in layers] + [layer.saved for layer in hidden]
    activations = [layer.activation for layer in hidden]
    parameters = [number for layer in hidden for number in (layer.p, layer.q)]
    weight_grads = [layer.weight.requires_grad for layer in layers]
    bias_grads = [layer.bias is not None and layer.bias.requires_grad for layer in layers]
    return DeferredCall(
        # It keeps no tensor of the pass alive: those are autograd's until the backward pass.
        lambda error, inputs, saved, dropout_mask: LayerCall(
            error, stored, feedback, inputs, saved, dropout_mask, activations, parameters, weight_grads, bias_grads
        ),
        [mask is not None for mask in dropout_mask],
        [p for layer in layers for p in (layer.weight, layer.bias) if p is not None and p.requires_grad],
        seen.backend,
        len(seen.rows),
        [as_rows(tensor) for tensor in (*tensors, *[mask for mask in dropout_mask if mask is not None])],
    )


class DeferringNode(torch.autograd.Function):
    """Identity on the output; its backward pass enters the call, with the error, in a fused optimizer's ledger.

    ``anchor`` is one of the call's parameters: because of it the output requires grad, and by it the node knows whether
    a backward pass is for the parameters at all. No gradient of it is computed.
    """

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, call: DeferredCall, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(*call.tensors)
        call.tensors = ()
        ctx.ledger, ctx.call = ledger, call
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, None]:
        tensors = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # Then the compiler leaves the node as it is. That of torch 2.11 ends with an error at `next_functions`.
            raise RuntimeError("gradients cannot be deferred by a compiler")
        # torch.autograd.grad and backward(inputs=…) may pass here on their way to something else than the parameters.
        anchor_accumulates = ctx.next_functions[-1][0]
        if backward_reaches(anchor_accumulates):
            ctx.ledger.append(ctx.call.completed(*tensors, as_error(gradient, ctx.call.batch_dims)))
        return None, None, gradient, None
