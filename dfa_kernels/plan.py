"""Which of the node's tensors is what: the plan that `DFANode` follows, built from the segments of a pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .feedback_spec import FeedbackSpec
from .segments import Convolution, FusedLayer, Segment


@dataclass(slots=True)
class LayerSlot:
    """Where one fused layer's tensors stand among the node's; ``kept`` is None for the output layer."""

    x: int
    kept: int | None
    noise: int | None
    weight: int
    bias: int | None
    activation: str
    p: float
    q: float
    units: tuple[int, ...]
    convolution: Convolution | None


@dataclass(slots=True)
class RootSlot:
    """Where a root stands among the node's tensors, and the shape of its tap without the rows."""

    root: int
    units: tuple[int, ...]


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


def error_shape(output: Tensor) -> tuple[tuple[int, ...], int]:
    """(leading dimensions that are rows, number of error components) of an output [..., E] or [b]."""
    if output.dim() == 0:
        raise ValueError("net: the output must be [b, E] or [b], got a scalar; compute the loss outside the network")
    if not output.is_floating_point():
        raise TypeError(f"net: the output must be real and floating, got {output.dtype}")
    if output.dim() > 3:
        raise ValueError(
            f"net: the output must be [b, E], [b] or [b, T, E], got shape {list(output.shape)}; flatten it to [b, E]"
        )
    if output.dim() == 1:
        return tuple(output.shape), 1
    return tuple(output.shape[:-1]), output.shape[-1]


def as_error(gradient: Tensor) -> Tensor:
    """∂L/∂output as e [R, E]."""
    if gradient.dim() == 2:
        return gradient
    rows, error_size = error_shape(gradient)
    return gradient.reshape(math.prod(rows), error_size)


def as_rows(tensor: Tensor) -> Tensor:
    """[..., features] as [n, features]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def check_units(segments: list[Segment], last: FusedLayer | None, rows: tuple[int, ...]) -> None:
    """Refuses shapes in which rows and units cannot be told apart."""
    layers = [last, *[segment.layer for segment in segments]]
    for layer in layers:
        if layer is not None and layer.x.dim() < 2:
            raise ValueError(
                f"x: a weight layer got an input of shape {list(layer.x.shape)}, without a batch dimension"
            )
        if layer is not None and layer.convolution is not None and len(rows) > 1:
            raise ValueError(
                f"net: the output's leading dimensions {list(rows)} would be rows of a convolution, whose channels are "
                "units; flatten the output to [b, E]"
            )


def tap_units(segment: Segment, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The tap's shape without the rows that it shares with the error."""
    shape = tuple(segment.tap.shape)
    if shape[: len(rows)] != rows:
        raise ValueError(
            f"taps: a tap of shape {list(shape)} must begin with the output's rows {list(rows)}; flatten the output "
            "to [b, E], or choose other taps"
        )
    return shape[len(rows) :]


class TensorTable:
    """The node's tensors, none of them twice: a layer's output is the next one's input."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def index(self, tensor: Tensor) -> int:
        if torch.compiler.is_compiling():
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


def make_plan(
    table: TensorTable,
    segments: list[Segment],
    last: FusedLayer | None,
    stored: list[Tensor],
    feedback: FeedbackSpec,
    backend: str,
) -> NodePlan:
    roots, linears, convolutions = [], [], []
    dtype = grouped_dtype(segments, last)
    for segment in segments:
        units, layer = segment.units, segment.layer
        if layer is None or (layer.convolution is None and not shares_launch(layer, dtype)):
            roots.append(RootSlot(table.index(segment.root), units))
        elif layer.convolution is None:
            linears.append(_layer_slot(table, layer, units, is_output=False))
        else:
            convolutions.append(_layer_slot(table, layer, units, is_output=False))
    if last is not None:
        linears.append(_layer_slot(table, last, (), is_output=True))
    kept = [i for slot in (*linears, *convolutions) for i in (slot.x, slot.kept, slot.noise) if i is not None]
    stored_at = tuple(table.index(u) for u in stored)
    return NodePlan(
        roots=tuple(roots),
        linears=tuple(linears),
        convolutions=tuple(convolutions),
        stored=stored_at,
        saved=tuple(dict.fromkeys([*kept, *stored_at, *(slot.weight for slot in convolutions)])),
        dtype=dtype,
        feedback=feedback,
        backend=backend,
    )


def shares_launch(layer: FusedLayer, dtype: torch.dtype) -> bool:
    """Whether `layer_grads` computes the layer's gradients together with those of the others."""
    return layer.convolution is None and layer.weight.dtype == dtype


def grouped_dtype(segments: list[Segment], last: FusedLayer | None) -> torch.dtype:
    """The one parameter dtype of the layers that share a launch; the output layer's, which has to be among them."""
    layers = [last, *(s.layer for s in segments)]
    return next((f.weight.dtype for f in layers if f is not None and f.convolution is None), torch.float32)


def _layer_slot(table: TensorTable, layer: FusedLayer, units: tuple[int, ...], is_output: bool) -> LayerSlot:
    return LayerSlot(
        x=table.index(layer.x),
        kept=None if is_output else table.index(layer.kept),
        noise=table.optional(layer.noise),
        weight=table.index(layer.weight),
        bias=table.optional(layer.bias),
        activation=layer.activation,
        p=layer.p,
        q=layer.q,
        units=units,
        convolution=layer.convolution,
    )
