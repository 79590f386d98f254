"""What a backward pass will run, in words: `DFA.plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends
from .node import linear_arguments, tap_arguments
from .plan import NodePlan, TensorTable, make_plan
from .record import Pass


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


def step_plan(seen: Sketch, rule: str | None) -> StepPlan:
    """What the backward pass of such a pass runs; rule: of the fused optimizer that finishes it, if there is one."""
    plan, backend = seen.plan, backends.BACKENDS[seen.plan.backend]
    lines = [f"backend {plan.backend} on {seen.device}"]
    if plan.linears:
        arguments = linear_arguments(plan, seen.tensors, seen.error, seen.wanted)
        widths = ", ".join(f"{x.shape[1]}→{_width(arguments, i)}" for i, x in enumerate(arguments[3]))
        update = "" if rule is None else f", {rule} update included"
        said = backend.describe_layers(arguments, plan.dtype, rule or "store", seen.device)
        lines.append(f"linear layers {widths}{update}: {said}")
    if plan.convolutions:
        lines.append(f"fused convolutions ({len(plan.convolutions)}): δ below, weight gradients from torch")
    if plan.roots:
        lines.append(f"segments with local graphs ({len(plan.roots)}): δ below, then autograd")
    if plan.roots or plan.convolutions:
        lines.append(
            f"δ of these taps: {backend.describe_taps(tap_arguments(plan, seen.tensors, seen.error), seen.device)}"
        )
    return StepPlan(tuple(lines))


def _width(arguments: tuple[Any, ...], i: int) -> int:
    error, kept = arguments[0], arguments[4]
    return int(kept[i].shape[1] if i < len(kept) else error.shape[1])
