"""Which of a node's tensors is what, built from the segments of a pass: the plans that the two nodes follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._torch_internals import has_memory, memory_of
from ..backends.calls import LayerCall
from ..feedback.spec import FeedbackSpec
from ..forward.record import Pass
from ..forward.segments import Convolution, FusedLayer, Segment


@dataclass(slots=True)
class LayersPlan:
    """Linear layers that share a launch, without the tensors that every pass makes anew: those stand by number.

    ``saved``, ``dropout_mask`` and ``activations`` are of hidden layers only; one more input is the output layer's.
    """

    inputs: tuple[int, ...]
    saved: tuple[int, ...]
    dropout_mask: tuple[int | None, ...]
    stored: tuple[int, ...]
    kept: int
    """How many tensors the numbers count: those that a pass keeps until its backward pass."""
    activations: list[str]
    numbers: list[float]
    """Two for each activation."""
    parameters: list[nn.Parameter]
    """Those that learn, in the order of `layer_grads`' result."""
    weight_grads: list[bool]
    bias_grads: list[bool]
    feedback: FeedbackSpec
    backend: str
    batch_dims: int
    """How many leading dimensions of the output are rows."""
    dtype: torch.dtype
    """Of the parameters."""
    has_shared: bool
    """Whether a parameter is more than one layer's, or shares memory with the feedback matrix."""
    outer: tuple[int, ...]
    """The inputs with memory that are no saved tensors, and may be anybody's."""
    memory: set[int]
    """What the parameters lie in; see `memory_of`."""
    places: list[tuple[torch.Size, torch.device]]
    """Shape and device of each parameter."""
    is_traced: bool
    """Whether a compiler traces the pass."""

    def call(self, error: Tensor, kept: Sequence[Tensor]) -> LayerCall:
        rows = [tensor if tensor.dim() == 2 else as_rows(tensor) for tensor in kept]
        return LayerCall(
            error,
            [*map(kept.__getitem__, self.stored)],
            self.feedback,
            [*map(rows.__getitem__, self.inputs)],
            [*map(rows.__getitem__, self.saved)],
            [None if i is None else rows[i] for i in self.dropout_mask],
            self.activations,
            self.numbers,
            self.weight_grads,
            self.bias_grads,
        )


def meet_numbers(feedback: FeedbackSpec, units: Iterable[Sequence[int]], numbers: Iterable[float]) -> float:
    """Shows a compiler, in a forward pass, numbers that may vary from call to call and that a backward pass reads.

    The compiler of torch 2.10 confuses them with each other if it first meets some in the backward pass.
    """
    return sum([math.prod(each) for each in units]) + sum(numbers) + feedback.gain


def layers_plan(seen: Pass, layers: Sequence[FusedLayer]) -> tuple[LayersPlan, list[Tensor]]:
    """The plan for these layers of the pass, and the tensors that it numbers. The output layer is the last, if any."""
    hidden = [layer for layer in layers if layer is not seen.last]
    table, inputs, saved, dropout_mask = numbered(layers, hidden)
    learning = [(layer.weight.requires_grad, layer.bias is not None and layer.bias.requires_grad) for layer in layers]
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
    is_traced = torch.compiler.is_compiling()
    # A compiler's tensors have none, nor does it put gradients off.
    memory = set() if is_traced else memory_of(parameters)
    feedback_changes = not is_traced and not memory.isdisjoint(memory_of(seen.stored))
    plan = LayersPlan(
        inputs=inputs,
        saved=saved,
        dropout_mask=dropout_mask,
        stored=tuple([table.index(part) for part in seen.stored]),
        kept=len(table.tensors),
        activations=[layer.activation for layer in hidden],
        numbers=[number for layer in hidden for number in (layer.p, layer.q)],
        parameters=parameters,
        weight_grads=[weight for weight, _ in learning],
        bias_grads=[bias for _, bias in learning],
        feedback=seen.feedback,
        backend=seen.backend,
        batch_dims=len(seen.rows),
        dtype=layers[0].weight.dtype,
        has_shared=len({id(p) for p in parameters}) < len(parameters) or feedback_changes,
        outer=() if is_traced else tuple([i for i in {*inputs} - {*saved} if has_memory(table.tensors[i])]),
        memory=memory,
        places=[(p.shape, p.device) for p in parameters],
        is_traced=is_traced,
    )
    return plan, table.tensors


def numbered(
    layers: Sequence[FusedLayer], hidden: Sequence[FusedLayer]
) -> tuple[TensorTable, tuple[int, ...], tuple[int, ...], tuple[int | None, ...]]:
    """The tensors that these layers keep, and the numbers of their inputs and of what hidden ones saved."""
    table = TensorTable()
    return (
        table,
        tuple([table.index(layer.x) for layer in layers]),
        tuple([table.index(layer.saved) for layer in hidden]),
        tuple([table.optional(layer.dropout_mask) for layer in hidden]),
    )


@dataclass(slots=True)
class ConvolutionSlot:
    """Where one fused convolution's tensors stand among the node's."""

    x: int
    saved: int
    dropout_mask: int | None
    weight: int
    bias: int | None
    activation: str
    p: float
    q: float
    numbers: Convolution


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
class TapsPlan:
    """The segments that need their δ itself. ``kept`` are the numbers of the tensors kept until the backward pass."""

    roots: tuple[RootSlot, ...]
    convolutions: tuple[ConvolutionSlot, ...]
    stored: tuple[int, ...]
    kept: tuple[int, ...]
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


def same(output: Tensor, is_traced: bool) -> Tensor:
    """The output as a node returns it: no view, so that it can be changed in place as any other."""
    return output.view_as(output) if is_traced else output.detach()


def as_rows(tensor: Tensor) -> Tensor:
    """[..., features] as [n, features]."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


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


def taps_plan(seen: Pass, segments: Sequence[Segment]) -> tuple[TapsPlan, list[Tensor]]:
    """The plan for these segments of the pass, and the tensors that it numbers."""
    table = TensorTable()
    roots, convolutions = [], []
    for segment in segments:
        if segment.layer is not None and segment.layer.convolution is not None:
            convolutions.append(_convolution_slot(table, segment.layer, segment.layer.convolution))
        else:
            tap = table.index(segment.tap) if torch.compiler.is_compiling() else None
            roots.append(RootSlot(table.index(segment.root), segment.units, segment.rows, tap))
    kept = [i for slot in convolutions for i in (slot.x, slot.saved, slot.dropout_mask, slot.weight) if i is not None]
    kept += [root.tap for root in roots if root.tap is not None]
    stored = tuple([table.index(part) for part in seen.stored])
    plan = TapsPlan(
        roots=tuple(roots),
        convolutions=tuple(convolutions),
        stored=stored,
        kept=tuple(dict.fromkeys([*kept, *stored])),
        feedback=seen.feedback,
        backend=seen.backend,
        batch_dims=len(seen.rows),
    )
    return plan, table.tensors


def sharing_layers(seen: Pass) -> tuple[list[FusedLayer], list[Segment]]:
    """The linear layers that share a launch, the output layer last; and the segments that are none."""
    dtype, layers, others = _shared_dtype(seen), [], []
    for segment in seen.segments:
        layer = segment.layer
        if layer is not None and layer.convolution is None and layer.weight.dtype == dtype:
            layers.append(layer)
        else:
            others.append(segment)
    return (layers if seen.last is None else [*layers, seen.last]), others


def _shared_dtype(seen: Pass) -> torch.dtype | None:
    """The one parameter dtype of the layers that share a launch; the output layer's, which has to be among them."""
    for layer in (seen.last, *[segment.layer for segment in seen.segments]):
        if layer is not None and layer.convolution is None:
            return layer.weight.dtype
    return None


def _convolution_slot(table: TensorTable, layer: FusedLayer, numbers: Convolution) -> ConvolutionSlot:
    return ConvolutionSlot(
        x=table.index(layer.x),
        saved=table.index(layer.saved),
        dropout_mask=table.optional(layer.dropout_mask),
        weight=table.index(layer.weight),
        bias=table.optional(layer.bias),
        activation=layer.activation,
        p=layer.p,
        q=layer.q,
        numbers=numbers,
    )
