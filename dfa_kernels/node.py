"""The one autograd node: the error comes in, the gradients of every segment go out.

`attach` ends a forward pass: it hands the node everything the segments kept. Nothing stays on the module, so passes
may interleave, and several may be alive before their backward passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .feedback import Feedback
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


@dataclass(slots=True)
class LayerCall:
    """The arguments of `layer_grads` and the parameters they lead to: what a fused optimizer gets for a gradient."""

    arguments: tuple[Any, ...]
    weights: list[nn.Parameter]
    backend: str


def attach(
    output: Tensor,
    segments: list[Segment],
    last: FusedLayer | None,
    feedback: Feedback,
    backend: str,
    ledger: list[LayerCall] | None,
) -> Tensor:
    """The output [..., E], now with an autograd node that turns its gradient into every segment's."""
    rows, error_size = error_shape(output)
    backend = backends.resolve(backend, output.device)
    widest = max([0, *(math.prod(tap_units(s, rows)) for s in segments)])
    stored = feedback.stored(widest, error_size, output.device) if segments else []
    table = _TensorTable()
    plan = _plan(table, segments, last, stored, rows, feedback, backend)
    result: Tensor = DFANode.apply(plan, ledger, output if last is None else output.detach(), *table.tensors)
    return result


def error_shape(output: Tensor) -> tuple[tuple[int, ...], int]:
    """(leading dimensions that are rows, number of error components) of an output [..., E] or [b]."""
    if output.dim() == 0:
        raise ValueError("net: the output must be [b, E] or [b], got a scalar; compute the loss outside the network")
    if output.dim() == 1:
        return tuple(output.shape), 1
    return tuple(output.shape[:-1]), output.shape[-1]


def tap_units(segment: Segment, rows: tuple[int, ...]) -> tuple[int, ...]:
    """The tap's shape without the rows that it shares with the error."""
    shape = tuple(segment.tap.shape)
    if shape[: len(rows)] != rows:
        raise ValueError(
            f"taps: a tap of shape {list(shape)} must begin with the output's rows {list(rows)}; flatten the output "
            "to [b, E], or choose other taps"
        )
    return shape[len(rows) :]


class _TensorTable:
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


def _plan(
    table: _TensorTable,
    segments: list[Segment],
    last: FusedLayer | None,
    stored: list[Tensor],
    rows: tuple[int, ...],
    feedback: Feedback,
    backend: str,
) -> NodePlan:
    roots, linears, convolutions = [], [], []
    dtype = _grouped_dtype(segments, last)
    for segment in segments:
        units = tap_units(segment, rows)
        layer = segment.layer
        if layer is None or (layer.convolution is None and layer.weight.dtype != dtype):
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
        feedback=feedback.spec,
        backend=backend,
    )


def _grouped_dtype(segments: list[Segment], last: FusedLayer | None) -> torch.dtype:
    """The one parameter dtype of the layers that share a launch; the output layer's, which has to be among them."""
    layers = [last, *(s.layer for s in segments)]
    return next((f.weight.dtype for f in layers if f is not None and f.convolution is None), torch.float32)


def _layer_slot(table: _TensorTable, layer: FusedLayer, units: tuple[int, ...], is_output: bool) -> LayerSlot:
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


class DFANode(torch.autograd.Function):
    """Identity on the output; its backward pass is the whole of DFA.

    Inputs: the plan, the ledger of a fused optimizer (or None), the output, then the tensors that the plan's slots
    number: roots of local graphs, parameters and saved tensors of fused layers, what the feedback stores.
    """

    @staticmethod
    def forward(ctx: Any, plan: NodePlan, ledger: list[LayerCall] | None, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.ledger = ledger
        ctx.output_shape = error_shape(output)
        ctx.parameters = tensors if ledger is not None else ()
        ctx.save_for_backward(*(tensors[i] for i in plan.saved))
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        device = gradient.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _backward(ctx, gradient)
        return _backward(ctx, gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    plan: NodePlan = ctx.plan
    saved = dict(zip(plan.saved, ctx.saved_tensors, strict=True))
    wanted = ctx.needs_input_grad[3:]
    grads: list[Tensor | None] = [None] * len(wanted)
    rows, error_size = ctx.output_shape
    error = gradient.reshape(math.prod(rows), error_size)
    if plan.roots or plan.convolutions:
        _finish_taps(plan, saved, error, rows, wanted, grads)
    if plan.linears:
        arguments, indices = _layer_arguments(plan, saved, error, wanted)
        if ctx.ledger is not None:
            ctx.ledger.append(LayerCall(arguments, [ctx.parameters[i] for i in indices], plan.backend))
        else:
            layer_grads = backends.BACKENDS[plan.backend].layer_grads(*arguments, plan.dtype)
            for i, grad in zip(indices, layer_grads, strict=True):
                _add(grads, i, grad)
    return (None, None, gradient, *grads)


def _finish_taps(
    plan: NodePlan,
    saved: dict[int, Tensor],
    error: Tensor,
    rows: tuple[int, ...],
    wanted: tuple[bool, ...],
    grads: list[Tensor | None],
) -> None:
    """δ for every root, for autograd to go on with, and the gradients of the fused convolutions."""
    taps: list[tuple[Any, ...]] = [(slot.units, None, None, "identity", 0.0, 0.0) for slot in plan.roots]
    for slot in plan.convolutions:
        taps.append((slot.units, _get(saved, slot.kept), _get(saved, slot.noise), slot.activation, slot.p, slot.q))
    units, kept, noise, activations, p, q = zip(*taps, strict=True)
    deltas = backends.BACKENDS[plan.backend].project_taps(
        error,
        [saved[i] for i in plan.stored],
        plan.feedback,
        [math.prod(u) for u in units],
        kept,
        noise,
        activations,
        [number for pair in zip(p, q, strict=True) for number in pair],
    )
    free = len(plan.roots)
    for root, delta in zip(plan.roots, deltas[:free], strict=True):
        _add(grads, root.root, delta.reshape(rows + root.units))
    for slot, delta in zip(plan.convolutions, deltas[free:], strict=True):
        _convolution_grads(slot, saved, delta, wanted, grads)


def _convolution_grads(
    slot: LayerSlot, saved: dict[int, Tensor], delta: Tensor, wanted: tuple[bool, ...], grads: list[Tensor | None]
) -> None:
    """ΔW and Δb of a convolution. Its input mask stays off: nothing flows to the layer before."""
    x, weight, numbers = saved[slot.x], saved[slot.weight], slot.convolution
    assert numbers is not None
    wants_bias = slot.bias is not None and wanted[slot.bias]
    _, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        delta,
        x,
        weight.to(x.dtype),
        [weight.shape[0]],
        numbers.stride,
        numbers.padding,
        numbers.dilation,
        False,
        [0] * len(numbers.stride),
        numbers.groups,
        [False, wanted[slot.weight], wants_bias],
    )
    if wanted[slot.weight]:
        _add(grads, slot.weight, weight_grad.to(weight.dtype))
    if slot.bias is not None and wants_bias:
        _add(grads, slot.bias, bias_grad.to(weight.dtype))


def _layer_arguments(
    plan: NodePlan, saved: dict[int, Tensor], error: Tensor, wanted: tuple[bool, ...]
) -> tuple[tuple[Any, ...], list[int]]:
    """The arguments of `layer_grads` up to its dtype, and which of the node's tensors each gradient belongs to."""
    hidden = [slot for slot in plan.linears if slot.kept is not None]
    weight_grads = [wanted[slot.weight] for slot in plan.linears]
    bias_grads = [slot.bias is not None and wanted[slot.bias] for slot in plan.linears]
    arguments = (
        error,
        [saved[i] for i in plan.stored],
        plan.feedback,
        [_rows(saved[slot.x]) for slot in plan.linears],
        [_rows(saved[slot.kept]) for slot in hidden if slot.kept is not None],
        [None if slot.noise is None else _rows(saved[slot.noise]) for slot in hidden],
        [slot.activation for slot in hidden],
        [number for slot in hidden for number in (slot.p, slot.q)],
        weight_grads,
        bias_grads,
    )
    indices = []
    for slot, wants_weight, wants_bias in zip(plan.linears, weight_grads, bias_grads, strict=True):
        indices += [slot.weight] * wants_weight
        indices += [slot.bias] * wants_bias if slot.bias is not None else []
    return arguments, indices


def _rows(tensor: Tensor) -> Tensor:
    """[..., features] as [n, features]."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _add(grads: list[Tensor | None], i: int, grad: Tensor) -> None:
    before = grads[i]
    grads[i] = grad if before is None else before + grad


def _get(saved: dict[int, Tensor], i: int | None) -> Tensor | None:
    return None if i is None else saved[i]
