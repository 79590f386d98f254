"""Gradients put off until a fused optimizer's step: everything they need, saved from one forward and backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from .._torch_internals import backward_reaches
from ..autocast import without_autocast
from ..backends.calls import LayerCall
from ..forward.record import Pass
from ..forward.segments import FusedLayer
from .first_order import refuse_second_order
from .lazy_gradient import LazyGradient
from .node_plan import as_error, as_rows, same


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
    stand_ins: list[LazyGradient | None] = field(default_factory=list)
    """What the ledger put into ``.grad`` of the weights; None where somebody else's gradient was."""

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


class Ledger:
    """The calls of the backward passes since the last step, and what stands in ``.grad`` for their gradients.

    A gradient whose stand-in somebody took out of ``.grad`` is not owed any more. One that finds another in ``.grad``
    is added to it at once, since nobody could see that it is missing there.
    """

    def __init__(self) -> None:
        self.calls: list[DeferredCall] = []
        self._stand_ins: dict[nn.Parameter, LazyGradient] = {}
        self._closed = False

    def add(self, call: DeferredCall) -> None:
        """Enters the call of a backward pass that is running."""
        if not self._all_stand():
            self.make()
        call.stand_ins = [self._stand_in(p) for p in call.weights]
        self.calls.append(call)
        if self._closed or any([stand_in is None for stand_in in call.stand_ins]):
            self.make()

    @torch.no_grad()
    def make(self) -> None:
        """Computes the gradients that are owed, into ``.grad``."""
        for call in self.calls:
            call.check_versions()
        while self.calls:
            if any(p.grad is not None for p in self.calls[0].weights):
                self._make(self.calls[0])
            del self.calls[0]

    def take_whole(self) -> DeferredCall | None:
        """The only call, if it is all of its parameters' gradients, and each one's once; then none is owed any more."""
        if len(self.calls) != 1 or not self._all_stand():
            return None
        (call,) = self.calls
        if len(set(call.weights)) < len(call.weights):
            return None
        call.check_versions()
        self.clear()
        return call

    def clear(self) -> None:
        """Drops the calls."""
        for call in self.calls:
            for p, stand_in in zip(call.weights, call.stand_ins, strict=True):
                if stand_in is not None and p.grad is stand_in:
                    p.grad = None
        self.calls.clear()

    def close(self) -> None:
        """Nobody will step any more: drops the calls, and those to come are made at once."""
        self._closed = True
        self.clear()

    def _stand_in(self, p: nn.Parameter) -> LazyGradient | None:
        """What stands in ``.grad`` from now on, if it is the ledger's."""
        held, kept = p.grad, self._stand_ins.get(p)
        if held is not None:
            return kept if held is kept else None
        # One that somebody kept from an earlier pass must not turn into the gradient of this one.
        if kept is None or sys.getrefcount(kept) != _REFERENCES_BY_DICTIONARY_AND_NAME or not kept.suits(p):
            kept = self._stand_ins[p] = LazyGradient(p, self.make)
        p.grad = kept
        return kept

    def _all_stand(self) -> bool:
        for call in self.calls:
            for p, stand_in in zip(call.weights, call.stand_ins, strict=True):
                if p.grad is not stand_in:
                    return False
        return True

    def _make(self, call: DeferredCall) -> None:
        # The products belong to the backward pass, which autocast does not reach.
        with without_autocast(call.weights[0].device):
            grads = backends.BACKENDS[call.backend].layer_grads(call.layers(), call.weights[0].dtype)
        for p, stand_in, grad in zip(call.weights, call.stand_ins, grads, strict=True):
            if p.grad is None:
                continue
            if stand_in is not None and p.grad is stand_in:
                p.grad = stand_in.made = grad.to(p)
                del self._stand_ins[p]
            else:
                p.grad.add_(grad)


def _references_by_dictionary_and_name() -> int:
    """What sys.getrefcount says of a value that nothing but a dictionary and a local name holds."""
    only = {0: object()}
    kept = only.get(0)
    return sys.getrefcount(kept)


_REFERENCES_BY_DICTIONARY_AND_NAME = _references_by_dictionary_and_name()


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

    ``parameters`` are the call's: because of them the output requires grad, and by them the node knows whether a
    backward pass is for the parameters at all. No gradient of them is computed.
    """

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, call: DeferredCall, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*call.tensors)
        call.tensors = ()
        ctx.ledger, ctx.call = ledger, call
        return same(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        tensors = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # Then the compiler leaves the node as it is. That of torch 2.11 ends with an error at `next_functions`.
            raise RuntimeError("gradients cannot be deferred by a compiler")
        # torch.autograd.grad and backward(inputs=…) may pass here on their way to something else than the parameters.
        call: DeferredCall = ctx.call
        count = len(call.weights)
        reached = [backward_reaches(node) for node, _ in ctx.next_functions[-count:]]
        if any(reached) and not all(reached):
            raise RuntimeError(
                f"inputs: {sum(reached)} of {count} parameters whose gradients a fused optimizer computes together, "
                "expected all or none; use torch.optim for gradients of some"
            )
        if any(reached):
            ctx.ledger.add(call.completed(*tensors, as_error(gradient, call.batch_dims)))
        return None, None, gradient, *[None] * count
