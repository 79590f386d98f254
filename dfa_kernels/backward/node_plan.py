"""Which of the node's tensors is what: the plan that `DFANode` follows, built from the segments of a pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..feedback.spec import FeedbackSpec
from ..forward.record import Pass
from ..forward.segments import Convolution, FusedLayer


@dataclass(slots=True)
class LayerSlot:
    """Where one fused layer's tensors stand among the node's; ``saved`` is None for the output layer."""

    x: int
    saved: int | None
    dropout_mask: int | None
    weight: int
    bias: int | None
    activation: str
    p: float
    q: float
    units: tuple[int, ...]
    convolution: Convolution | None


@dataclass(slots=True)
class RootSlot:
    """Where a root stands among the node's tensors, and the shape of its tap without the rows.

    Roots with as many units have the same δ.
    """

    root: int
    units: tuple[int, ...]
    rows: tuple[int, ...]
    """Which of the tap's dimensions are rows."""
    tap: int | None
    """Where the tap stands, for its shape: compilers may lose a plan's numbers on their way to the backward pass."""

    def sizes(self, tensors: dict[int, Tensor]) -> tuple[int, ...]:
        """The tap's shape without the rows, in the backward pass."""
        if self.tap is None:
            return self.units
        return tuple([size for i, size in enumerate(tensors[self.tap].shape) if i not in self.rows])


@dataclass(slots=True)
class NodePlan:
    """What `DFANode` does with its tensors. ``saved`` are the indices of those it keeps until the backward pass."""

    roots: tuple[RootSlot, ...]
    linears: tuple[LayerSlot, ...]
    convolutions: tuple[LayerSlot, ...]
    stored: tuple[int, ...]
    saved: tuple[int, ...]
    dtype: torch.dtype
    feedback: FeedbackSpec
    backend: str
    batch_dims: int
    """How many leading dimensions of the output are rows."""

    def root_sizes(self, tensors: dict[int, Tensor]) -> list[int]:
        """The numbers of units of the roots, each once."""
        return list(dict.fromkeys([math.prod(root.sizes(tensors)) for root in self.roots]))


def as_error(gradient: Tensor, batch_dims: int) -> Tensor:
    """∂L/∂output, of whose dimensions so many are rows, as e [R, E]."""
    if gradient.dim() == 2 and batch_dims == 1:
        return gradient
    shape = tuple(gradient.shape)
    return gradient.reshape(math.prod(shape[:batch_dims]), math.prod(shape[batch_dims:]))


def same(output: Tensor) -> Tensor:
    """The output as a node returns it: no view, so that it can be changed in place as any other."""
    return output.view_as(output) if torch.compiler.is_compiling() else output.detach()


def as_rows(tensor: Tensor) -> Tensor:
    """[..., features] as [n, features]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


class TensorTable:
    """The node's tensors, none of them twice: a layer's output is the next one's input."""

    def __init__(self) -> None:
        self._is_traced = torch.compiler.is_compiling()
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def index(self, tensor: Tensor) -> int:
        if self._is_traced:
            return self._search(tensor)
        number = self._numbers.setdefault(id(tensor), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        return number

    def _search(self, tensor: Tensor) -> int:
        """A tensor that is still being traced has no id."""
        for i, known in enumerate(self.tensors):
            if known is tensor:
                return i
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def optional(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self.index(tensor)


def make_plan(table: TensorTable, seen: Pass) -> NodePlan:
    roots, linears, convolutions = [], [], []
    dtype = grouped_dtype(seen)
    for segment in seen.segments:
        units, layer = segment.units, segment.layer
        if layer is None or (layer.convolution is None and not shares_launch(layer, dtype)):
            tap = table.index(segment.tap) if torch.compiler.is_compiling() else None
            roots.append(RootSlot(table.index(segment.root), units, segment.rows, tap))
        elif layer.convolution is None:
            linears.append(_layer_slot(table, layer, units, is_output=False))
        else:
            convolutions.append(_layer_slot(table, layer, units, is_output=False))
    if seen.last is not None:
        linears.append(_layer_slot(table, seen.last, (), is_output=True))
    saved = [i for slot in (*linears, *convolutions) for i in (slot.x, slot.saved, slot.dropout_mask) if i is not None]
    saved += [root.tap for root in roots if root.tap is not None]
    stored_at = tuple(table.index(u) for u in seen.stored)
    return NodePlan(
        roots=tuple(roots),
        linears=tuple(linears),
        convolutions=tuple(convolutions),
        stored=stored_at,
        saved=tuple(dict.fromkeys([*saved, *stored_at, *(slot.weight for slot in convolutions)])),
        dtype=dtype,
        feedback=seen.feedback,
        backend=seen.backend,
        batch_dims=len(seen.rows),
    )


def shares_launch(layer: FusedLayer, dtype: torch.dtype) -> bool:
    """Whether `layer_grads` computes the layer's gradients together with those of the others."""
    return layer.convolution is None and layer.weight.dtype == dtype


def grouped_dtype(seen: Pass) -> torch.dtype:
    """The one parameter dtype of the layers that share a launch; the output layer's, which has to be among them."""
    for layer in (seen.last, *[segment.layer for segment in seen.segments]):
        if layer is not None and layer.convolution is None:
            return layer.weight.dtype
    return torch.float32


def _layer_slot(table: TensorTable, layer: FusedLayer, units: tuple[int, ...], is_output: bool) -> LayerSlot:
    return LayerSlot(
        x=table.index(layer.x),
        saved=None if is_output else table.index(layer.saved),
        dropout_mask=table.optional(layer.dropout_mask),
        weight=table.index(layer.weight),
        bias=table.optional(layer.bias),
        activation=layer.activation,
        p=layer.p,
        q=layer.q,
        units=units,
        convolution=layer.convolution,
    )
