"""What a backward pass will run, in words: `DFA.plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends
from ..forward.record import Pass
from .deltas import describe
from .node_plan import LayersPlan, TapsPlan, layers_plan, sharing_layers, taps_plan
from .taps_node import taps_call


@dataclass(frozen=True)
class StepPlan:
    """One line for each thing that a backward pass runs, and why it runs so."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


@dataclass(slots=True)
class Sketch:
    """A pass without its values: enough to tell what its backward pass runs."""

    layers: tuple[LayersPlan, list[Tensor]] | None
    """With the tensors that the plan numbers, on the meta device; so are those of the taps."""
    taps: tuple[TapsPlan, dict[int, Tensor]] | None
    error: Tensor
    backend: str
    device: torch.device


def sketch(seen: Pass) -> Sketch:
    """A pass by its shapes, strides and dtypes."""
    layers, others = sharing_layers(seen)
    device, layers_found, taps_found = seen.output.device, None, None
    if layers:
        plan, kept = layers_plan(seen, layers)
        # Only what a shape is: a sketch keeps no parameter alive.
        layers_found = replace(plan, parameters=[]), [_without_values(tensor, device) for tensor in kept]
    if others:
        taps, tensors = taps_plan(seen, others)
        taps_found = taps, {i: _without_values(tensors[i], device) for i in taps.kept}
    error = torch.empty(math.prod(seen.rows), seen.error_size, dtype=seen.output.dtype, device="meta")
    return Sketch(layers_found, taps_found, error, seen.backend, device)


def _without_values(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the meta device. What lives on another device than the network says so still."""
    if tensor.device != device:
        return tensor.new_empty(0)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def step_plan(seen: Sketch, rule: str | None, bypassed: Sequence[str], chained: Sequence[str]) -> StepPlan:
    """What the backward pass of such a pass runs.

    rule: of the fused optimizer that finishes it, if there is one; bypassed: the names of taps that paths go around;
    chained: of layers that a chain through others teaches.
    """
    backend = backends.BACKENDS[seen.backend]
    lines = [f"backend {seen.backend} on {seen.device}"]
    if seen.layers is not None:
        layers, kept = seen.layers
        call = layers.call(seen.error, kept)
        widths = ", ".join(f"{x.shape[1]}→{out}" for x, out in zip(call.inputs, call.widths_out(), strict=True))
        update = "" if rule is None else f", {rule} update included"
        said = backend.describe_layers(call, layers.dtype, rule or "store", seen.device)
        lines.append(f"linear layers {widths}{update}: {said}")
    if seen.taps is not None:
        lines += _lines_of_taps(*seen.taps, seen.error, seen.device)
    if chained:
        lines.append(f"taught by a chain through later layers, up to a tap: {', '.join(chained)}")
    if bypassed:
        lines.append(f"reached by a chain past their tap, too: what is taught at {', '.join(bypassed)}")
    return StepPlan(tuple(lines))


def _lines_of_taps(plan: TapsPlan, kept: dict[int, Tensor], error: Tensor, device: torch.device) -> list[str]:
    lines = []
    if plan.convolutions:
        lines.append(f"fused convolutions ({len(plan.convolutions)}): δ below, weight gradients from torch")
    if plan.roots:
        lines.append(f"segments with local graphs ({len(plan.roots)}): δ below, then autograd")
    return [*lines, f"δ of these taps: {describe(plan.backend, taps_call(plan, kept, error), device)}"]
