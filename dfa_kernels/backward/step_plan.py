"""What a backward pass will run, in words: `DFA.plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from ..forward.record import Pass
from .deltas import describe
from .node import layer_call, taps_call
from .node_plan import NodePlan, TensorTable, make_plan


@dataclass(frozen=True)
class StepPlan:
    """One line for each thing that a backward pass runs, and why it runs so."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


@dataclass(slots=True)
class Sketch:
    """A pass without its values: enough to tell what its backward pass runs."""

    plan: NodePlan
    tensors: dict[int, Tensor]
    """What the node saves, on the meta device."""
    error: Tensor
    wanted: list[bool]
    device: torch.device


def sketch(seen: Pass) -> Sketch:
    """A pass by its shapes, strides and dtypes."""
    table = TensorTable()
    plan = make_plan(table, seen)
    device = seen.output.device
    return Sketch(
        plan,
        {i: _without_values(table.tensors[i], device) for i in plan.saved},
        torch.empty(math.prod(seen.rows), seen.error_size, dtype=seen.output.dtype, device="meta"),
        [tensor.requires_grad for tensor in table.tensors],
        device,
    )


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
    plan, backend = seen.plan, backends.BACKENDS[seen.plan.backend]
    lines = [f"backend {plan.backend} on {seen.device}"]
    if plan.linears:
        call = layer_call(plan, seen.tensors, seen.error, seen.wanted)
        widths = ", ".join(f"{x.shape[1]}→{out}" for x, out in zip(call.inputs, call.widths_out(), strict=True))
        update = "" if rule is None else f", {rule} update included"
        said = backend.describe_layers(call, plan.dtype, rule or "store", seen.device)
        lines.append(f"linear layers {widths}{update}: {said}")
    if plan.convolutions:
        lines.append(f"fused convolutions ({len(plan.convolutions)}): δ below, weight gradients from torch")
    if plan.roots:
        lines.append(f"segments with local graphs ({len(plan.roots)}): δ below, then autograd")
    if plan.roots or plan.convolutions:
        taps = taps_call(plan, seen.tensors, seen.error)
        lines.append(f"δ of these taps: {describe(plan.backend, taps, seen.device)}")
    if chained:
        lines.append(f"taught by a chain through later layers, up to a tap: {', '.join(chained)}")
    if bypassed:
        lines.append(f"reached by a chain past their tap, too: what is taught at {', '.join(bypassed)}")
    return StepPlan(tuple(lines))
