"""Gradients put off until a fused optimizer's step: everything they need, saved from one forward and backward pass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from .. import backends
from .._torch_internals import lie_in
from ..autocast import without_autocast
from ..backends.calls import LayerCall
from .lazy_gradient import LazyGradient
from .node_plan import LayersPlan

_grad, _version, _place = attrgetter("grad"), attrgetter("_version"), attrgetter("shape", "device")


class DeferredCall:
    """The grouped layers of one backward pass: what a fused optimizer gets in place of their gradients.

    ``tensors`` are those that the plan numbers, then the error. ``stand_ins`` are what the ledger put into ``.grad`` of
    the parameters; None where somebody else's gradient was.
    """

    __slots__ = ("parameters", "plan", "stand_ins", "tensors", "versions")

    def __init__(self, plan: LayersPlan, tensors: tuple[Tensor, ...]) -> None:
        self.plan, self.parameters = plan, plan.parameters
        self.tensors = tensors
        self.versions = [*map(_version, tensors)]
        self.stand_ins: list[LazyGradient | None] = []

    def layers(self) -> LayerCall:
        return self.plan.call(self.tensors[-1], self.tensors[:-1])

    def reads_parameters(self) -> bool:
        """Whether an update of some parameters may change what others' gradients are computed from."""
        plan, tensors = self.plan, self.tensors
        return plan.has_shared or lie_in([tensors[i] for i in plan.outer], plan.memory)

    def check_unchanged(self) -> None:
        """RuntimeError if since its backward pass what the call needs was overwritten, or a parameter has moved."""
        places = [*map(_place, self.parameters)]
        if places != self.plan.places:
            before, now = next((a, b) for a, b in zip(self.plan.places, places, strict=True) if a != b)
            raise RuntimeError(
                f"step: a parameter is of shape {tuple(now[0])} on {now[1]}, expected {tuple(before[0])} on "
                f"{before[1]} as in the backward pass; change parameters behind step() or zero_grad()"
            )
        if [*map(_version, self.tensors)] == self.versions:
            return
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"step: a tensor of shape {tuple(tensor.shape)} that a deferred gradient needs was modified by an "
                    f"in-place operation before the step: it is at version {tensor._version}, expected {version}"
                )


class Ledger:
    """The calls of the backward passes since the last step, and what stands in ``.grad`` for their gradients.

    A gradient whose stand-in somebody took out of ``.grad`` is not owed to that parameter any more. One that finds
    another in ``.grad`` is added to it at once, since nobody could see that it is missing there.
    """

    def __init__(self) -> None:
        self.calls: list[DeferredCall] = []
        # By the parameters' ids: a tensor's hash costs more than the rest of the look-up.
        self._stand_ins: dict[int, LazyGradient] = {}
        self._closed = False

    def add(self, call: DeferredCall) -> None:
        """Enters the call of a backward pass that is running."""
        if not self._all_stand():
            self.make()
        call.stand_ins = self._stand_ins_for(call.parameters)
        self.calls.append(call)
        if self._closed or any([stand_in is None for stand_in in call.stand_ins]):
            self.make()

    @torch.no_grad()
    def make(self) -> None:
        """Computes the gradients that are owed, into ``.grad``."""
        for call in self.calls:
            call.check_unchanged()
        while self.calls:
            if any(p.grad is not None for p in self.calls[0].parameters):
                self._make(self.calls[0])
            del self.calls[0]

    def take_whole(self) -> DeferredCall | None:
        """The only call, if it is all of its parameters' gradients, and each one's once; then none is owed any more."""
        if len(self.calls) != 1 or self.calls[0].reads_parameters() or not self._all_stand():
            return None
        call = self.calls[0]
        call.check_unchanged()
        self.calls.clear()
        for p in call.parameters:
            p.grad = None
        return call

    def clear(self) -> None:
        """Drops the calls."""
        for call in self.calls:
            for p, stand_in in zip(call.parameters, call.stand_ins, strict=True):
                if stand_in is not None and p.grad is stand_in:
                    p.grad = None
        self.calls.clear()

    def owns(self, stand_in: LazyGradient) -> bool:
        """Whether it stands, or stood, for a gradient of this ledger."""
        return stand_in.made_by == self.make

    def close(self) -> None:
        """Nobody will step any more: the calls are made, and those to come at once.

        Here nobody could catch an error: calls that need what was overwritten are dropped, whose gradients then raise.
        """
        self._closed = True
        try:
            self.make()
        except RuntimeError:
            self.clear()

    def _stand_ins_for(self, parameters: Sequence[nn.Parameter]) -> list[LazyGradient | None]:
        """What stands in each one's ``.grad`` from now on, if it is the ledger's."""
        stand_ins: list[LazyGradient | None] = []
        for p in parameters:
            held, kept = p.grad, self._stand_ins.get(id(p))
            if held is not None:
                stand_ins.append(kept if held is kept else None)
                continue
            # One that somebody kept from an earlier pass must not turn into the gradient of this one.
            if kept is None or sys.getrefcount(kept) != _REFERENCES_BY_DICTIONARY_AND_NAME:
                kept = self._new_stand_in(p)
            try:
                p.grad = kept
            except RuntimeError:
                # Of a parameter that has moved, or was cast.
                p.grad = kept = self._new_stand_in(p)
            stand_ins.append(kept)
        return stand_ins

    def _new_stand_in(self, p: nn.Parameter) -> LazyGradient:
        made = self._stand_ins[id(p)] = LazyGradient(p, self.make)
        return made

    def _all_stand(self) -> bool:
        return all([all(map(is_, map(_grad, call.parameters), call.stand_ins)) for call in self.calls])

    def _make(self, call: DeferredCall) -> None:
        # The products belong to the backward pass, which autocast does not reach.
        with without_autocast(call.parameters[0].device):
            grads = backends.BACKENDS[call.plan.backend].layer_grads(call.layers(), call.plan.dtype)
        for p, stand_in, grad in zip(call.parameters, call.stand_ins, grads, strict=True):
            if stand_in is None:
                if p.grad is not None:
                    p.grad.add_(grad)
            elif stand_in.made is None:
                # Wherever it is by now, in another parameter's .grad perhaps.
                stand_in.made = grad.to(p)
                self._stand_ins.pop(id(p), None)
                if p.grad is stand_in:
                    p.grad = stand_in.made
            else:
                stand_in.made.add_(grad)


def _references_by_dictionary_and_name() -> int:
    """What sys.getrefcount says of a value that nothing but a dictionary and a local name holds."""
    only = {0: object()}
    kept = only.get(0)
    return sys.getrefcount(kept)


_REFERENCES_BY_DICTIONARY_AND_NAME = _references_by_dictionary_and_name()
