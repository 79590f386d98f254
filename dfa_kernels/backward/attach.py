"""The end of a forward pass: its output gets the nodes that turn its gradient into every segment's.

The nodes hold everything that the segments saved, the module nothing, so passes may interleave, and several may be
alive before their backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import any_gradient_is_awaited, eager_apply
from ..feedback import Feedback
from ..forward.record import Pass
from ..forward.segments import FusedLayer, Segment
from .deferred import Ledger
from .layers_node import LayersNode
from .node_plan import LayersPlan, layers_plan, meet_numbers, numbered, sharing_layers, taps_plan
from .taps_node import TapsNode

_apply_layers, _apply_taps = eager_apply(LayersNode), eager_apply(TapsNode)


def attach(seen: Pass, ledger: Ledger | None) -> Tensor:
    """The pass's output with its nodes. ledger: a fused optimizer's, which gets the linear layers' calls."""
    if torch.compiler.is_compiling():
        # The compiler of torch 2.13 loses a number of both nodes that it first meets in one of them.
        meet_numbers(seen.feedback, [segment.units for segment in seen.segments], [])
    layers, others = sharing_layers(seen)
    output = seen.output if seen.last is None else seen.output.detach()
    # A deferred call has no gradients for hooks that wait for them.
    at_once = [layer for layer in layers if ledger is None or _is_awaited(layer)]
    deferred = [layer for layer in layers if ledger is not None and not _is_awaited(layer)]
    for group, owner in ((at_once, None), (deferred, ledger)):
        if group:
            output = _with_layers(output, *layers_plan(seen, group), owner)
    if others:
        # The last node is the first to run: convolutions let go of activations before linear layers get gradients.
        plan, tensors = taps_plan(seen, others)
        apply = TapsNode.apply if torch.compiler.is_compiling() else _apply_taps
        output = apply(plan, output, *tensors)
    return output


def _is_awaited(layer: FusedLayer) -> bool:
    """Whether somebody waits for a gradient of the layer's parameters."""
    return any_gradient_is_awaited([layer.weight] if layer.bias is None else [layer.weight, layer.bias])


def _with_layers(output: Tensor, plan: LayersPlan, kept: Sequence[Tensor | None], ledger: Ledger | None) -> Tensor:
    if not plan.parameters:
        return output
    apply = LayersNode.apply if plan.is_traced else _apply_layers
    attached: Tensor = apply(plan, ledger, output, *kept, *plan.parameters)
    return attached


@dataclass(slots=True)
class Repeated:
    """How passes end that look like an earlier one: all layers share one node."""

    plan: LayersPlan
    places: list[int]
    """Where the plan's tensors, but those stored, stand among the layers' own."""
    stored: list[Tensor]
    error_size: int
    asked: str
    """The backend that the model was told."""
    device: torch.device

    def suits(self, feedback: Feedback, backend: str, ledger: Ledger | None) -> bool:
        """Whether what a model was told is still the same, and nobody waits for a gradient that is to be deferred."""
        if self.asked != backend or self.plan.feedback is not feedback.spec:
            return False
        # What is kept for these rows may only have grown, procedurally it is nothing.
        if self.stored and feedback.kept(self.error_size, self.device) is not self.stored:
            return False
        return ledger is None or not any_gradient_is_awaited(self.plan.parameters)

    def attach(self, output: Tensor, own: Sequence[Tensor | None], ledger: Ledger | None) -> Tensor:
        """`attach` for such a pass, whose layers have these tensors of their own."""
        return _with_layers(output, self.plan, [*map(own.__getitem__, self.places), *self.stored], ledger)


def shares_one_node(seen: Pass) -> bool:
    """Whether all the pass's segments and its output layer are linear layers that share a launch."""
    layers, others = sharing_layers(seen)
    return bool(layers) and layers[-1] is seen.last and not others


def repeated(seen: Pass, own: list[Tensor | None], backend: str) -> Repeated:
    """For passes that look like this one, whose layers have these tensors of their own."""
    layers, _ = sharing_layers(seen)
    plan, kept = layers_plan(seen, layers)
    passing = kept[: len(kept) - len(seen.stored)]
    places = [next(i for i, tensor in enumerate(own) if tensor is each) for each in passing]
    return Repeated(plan, places, seen.stored, seen.error_size, backend, seen.output.device)


@dataclass(slots=True)
class Looks:
    """What the end of an observed pass depends on: passes with equal looks end by the same `Repeated`."""

    looks: list[Any]
    own: list[Tensor | None]
    """The layers' own tensors, none twice."""


def looks_of(
    output: Tensor, segments: Sequence[Segment], last: FusedLayer | None, batch_dims: int | None
) -> Looks | None:
    """Of a pass of linear layers that all learn, the output layer among them; of others None."""
    if last is None or not segments:
        return None
    looks: list[Any] = [output.shape, output.dtype, output.device, batch_dims]
    hidden = []
    for segment in segments:
        if segment.layer is None:
            return None
        hidden.append(segment.layer)
        looks += (segment.point, segment.tap.shape)
    layers = [*hidden, last]
    for layer in layers:
        weight, bias = layer.weight, layer.bias
        if layer.convolution is not None or not weight.requires_grad or not (bias is None or bias.requires_grad):
            return None
        # Tensors are equal element by element, so they are compared by their ids: a plan keeps those that learn alive.
        looks += (id(weight), id(bias), weight.dtype, layer.x.dtype, layer.activation, layer.p, layer.q)
    table, *wiring = numbered(layers, hidden)
    return Looks([*looks, *wiring], [*table.tensors])
