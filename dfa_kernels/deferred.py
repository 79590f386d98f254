"""Gradients put off until a fused optimizer's step: everything they need, kept from one forward and backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .feedback_spec import FeedbackSpec
from .plan import as_error, as_rows
from .segments import FusedLayer


@dataclass(slots=True)
class LayerCall:
    """One call of `layer_grads` for all layers of a pass: what a fused optimizer gets in place of gradients."""

    stored: list[Tensor]
    feedback: FeedbackSpec
    tensors: Sequence[Tensor]
    """The layers' inputs, then what f' is computed from, then the dropout masks that there are."""
    has_noise: list[bool]
    activations: list[str]
    parameters: list[float]
    weight_grads: list[bool]
    bias_grads: list[bool]
    weights: list[nn.Parameter]
    """What the gradients belong to, in the order of `layer_grads`' result."""
    backend: str
    error: Tensor | None = None
    versions: tuple[int, ...] = ()
    """Version counters of the tensors and of the error after the backward pass."""

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `layer_grads` up to its dtype."""
        layers, hidden = len(self.weight_grads), len(self.activations)
        remaining = iter(self.tensors[layers + hidden :])
        return (
            self.error,
            self.stored,
            self.feedback,
            self.tensors[:layers],
            self.tensors[layers : layers + hidden],
            [next(remaining) if noisy else None for noisy in self.has_noise],
            self.activations,
            self.parameters,
            self.weight_grads,
            self.bias_grads,
        )

    def completed(self, tensors: Sequence[Tensor], error: Tensor) -> LayerCall:
        """The call of one backward pass. Several may come from one forward pass."""
        versions = tuple([tensor._version for tensor in (*tensors, error)])
        return LayerCall(
            self.stored,
            self.feedback,
            tensors,
            self.has_noise,
            self.activations,
            self.parameters,
            self.weight_grads,
            self.bias_grads,
            self.weights,
            self.backend,
            error,
            versions,
        )

    def check_versions(self) -> None:
        """RuntimeError if a tensor that the call needs was overwritten since its backward pass."""
        assert self.error is not None
        for tensor, version in zip((*self.tensors, self.error), self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"step: a tensor of shape {tuple(tensor.shape)} that a deferred gradient needs was modified by an "
                    f"in-place operation before the step: it is at version {tensor._version}, expected {version}"
                )


Ledger = list[LayerCall]
"""Where the backward passes since the last step leave their calls."""


def layer_call(
    hidden: list[FusedLayer], output: FusedLayer | None, stored: list[Tensor], feedback: FeedbackSpec, backend: str
) -> LayerCall:
    """The call for these layers, complete but for the error."""
    layers = hidden if output is None else [*hidden, output]
    noise = [layer.noise for layer in hidden]
    weight_grads = [layer.weight.requires_grad for layer in layers]
    bias_grads = [layer.bias is not None and layer.bias.requires_grad for layer in layers]
    tensors = [layer.x for layer in layers] + [layer.kept for layer in hidden]
    return LayerCall(
        stored,
        feedback,
        [as_rows(tensor) for tensor in (*tensors, *[mask for mask in noise if mask is not None])],
        [mask is not None for mask in noise],
        [layer.activation for layer in hidden],
        [number for layer in hidden for number in (layer.p, layer.q)],
        weight_grads,
        bias_grads,
        [p for layer in layers for p in (layer.weight, layer.bias) if p is not None and p.requires_grad],
        backend,
    )


class DeferringNode(torch.autograd.Function):
    """Identity on the output; its backward pass enters the call, with the error, in a fused optimizer's ledger.

    ``anchor`` is one of the call's parameters: because of it the output requires grad, and by it the node knows whether
    a backward pass is for the parameters at all. No gradient of it is computed.
    """

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, call: LayerCall, output: Tensor, anchor: Tensor) -> Tensor:
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
        if torch._C._will_engine_execute_node(anchor_accumulates):
            ctx.ledger.append(ctx.call.completed(tensors, as_error(gradient)))
        return None, None, gradient, None
