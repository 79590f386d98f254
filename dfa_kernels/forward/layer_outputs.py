"""Where the output of a weight layer goes in a forward pass: to an activation, and perhaps around it.

The tap of a layer is at the activation that follows it. In ``h * torch.sigmoid(h)`` a product goes around that
activation, and a tap there would leave a path open. So a tap moves to the first tensor through which all of the
layer's output passes, as far as elementwise functions carry it around.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import CLAMP_MIN, CLAMPS
from .arguments import Args, Call, Kwargs, replaced, tensors_of
from .elementwise import ELEMENT_PRODUCTS, ELEMENTWISE
from .known import Known, KnownTensors, Operand
from .weight_layers import WeightCall

HIDDEN = "a function that is hidden"
# Right behind a layer they stand where an activation would; elsewhere they have other purposes.
MISTAKEN: frozenset[Call] = (
    CLAMPS | CLAMP_MIN | {torch.softmax, Tensor.softmax, F.softmax, torch.maximum, Tensor.maximum, torch.minimum}
)


@dataclass(slots=True, eq=False)
class Layer:
    """One call of a weight layer."""

    call: WeightCall
    number: int
    learns: bool
    shape: tuple[int, ...] | None
    """Of its result, if that is one tensor."""
    open: bool = True
    """Whether no tap has followed yet."""
    taken: int | None = None
    """The newest tap's number when another weight layer took its output, without a tap between."""
    unknown: str = ""
    """What follows it in an activation's place and is not known as one."""


@dataclass(slots=True, eq=False)
class Tapped:
    """A tap: its number in the pass, the layers that it teaches, and its tensor before the cut."""

    point: int
    layers: tuple[Layer, ...]
    whole: Tensor
    used: bool = False
    """Whether something has used the cut tensor that cannot be made again without the cut."""
    moved: bool = False
    """Whether another tap has taken its place."""


@dataclass(slots=True, eq=False)
class Past:
    """A tensor made from taps by elementwise functions alone, and how; without a function a tap's own."""

    taps: list[Tapped]
    func: Call | None = None
    args: Args = ()
    kwargs: Kwargs | None = None
    with_graph: bool = True

    def again(self, whole: Callable[[Tensor], Tensor]) -> Tensor:
        """The tensor once more, without the cut."""
        if self.func is None:
            return self.taps[0].whole
        args, kwargs = replaced(self.args, self.kwargs or {}, whole)
        with torch.set_grad_enabled(self.with_graph):
            result: Tensor = self.func(*args, **kwargs)
        return result


class LayerOutputs:
    """What is on its way in one forward pass."""

    def __init__(self, tensors: KnownTensors) -> None:
        self._tensors = tensors
        self._layers = 0
        self._point = -1
        self._open: list[Layer] = []
        self._with_past: list[Known] = []
        self.any_opaque = False
        self.any_moved = False

    def made(self, call: WeightCall, result: Any) -> None:
        """A weight layer ran: what its inputs carried has arrived."""
        inputs = [(x, self._tensors.of(x)) for x in call.inputs]
        for x, known in inputs:
            self._taken(x, known)
        if self._with_past:
            self._arrived(taps_of(inputs))
        results = tensors_of(result)
        learns = any([x.requires_grad for x in results])
        layer = Layer(call, self._layers, learns, result.shape if isinstance(result, Tensor) else None)
        self._layers += 1
        self._open.append(layer)
        self.any_opaque = self.any_opaque or call.opaque
        for x in results:
            known = self._tensors.record(x)
            known.layers, known.result_of = (layer,), layer

    def _taken(self, x: Tensor, known: Known) -> None:
        """A weight layer takes x: what makes it is taught by a chain, if no tap comes between yet."""
        layers: Sequence[Layer] = known.layers
        if _comes_from_nowhere(x, known):
            # As an activation's, its shape is that of what it was made from.
            layers = [layer for layer in self._open if layer.shape == x.shape]
            for layer in layers:
                layer.unknown = layer.unknown or HIDDEN
        for layer in layers:
            if layer.taken is None:
                layer.taken = self._point

    def _arrived(self, taps: list[Tapped]) -> None:
        """A weight layer takes what was made from these taps: what else was has nothing to close any more."""
        if not taps:
            return
        for known in self._with_past:
            if known.past is not None and any([tap in taps for tap in known.past.taps]):
                known.past = None
        self._with_past = [known for known in self._with_past if known.past is not None]

    def chained(self) -> list[Layer]:
        """At the end of a pass: the layers that only a chain through others connects with the tap that teaches them."""
        return [x for x in self._open if x.learns and x.taken is not None and x.taken < self._point]

    def awaiting(self, z: Tensor, known: Known) -> tuple[Layer, ...]:
        """The layers whose output an activation of z follows, in their order.

        Where z comes from a function that nobody saw, that is every layer without an activation.
        """
        return tuple(self._open) if _comes_from_nowhere(z, known) else known.layers

    def opaque(self, x: Tensor) -> tuple[Layer, ...]:
        """The open layers that make x together, if one of them is opaque."""
        layers = tuple([layer for layer in self._tensors.of(x).layers if layer.open])
        return layers if any([layer.call.opaque for layer in layers]) else ()

    def tapped(self, point: int, layers: tuple[Layer, ...], whole: Tensor, cut: Tensor) -> None:
        """A tap was placed behind these layers: ``cut`` goes on."""
        for layer in layers:
            layer.open = False
        self._point = point
        self._open = [layer for layer in self._open if layer.open]
        known = self._tensors.record(cut)
        known.layers = ()
        self._made_from(known, Past([Tapped(point, layers, whole)]))

    def _made_from(self, known: Known, past: Past) -> None:
        known.past = past
        self._with_past.append(known)

    def around(self, func: Call, operands: list[Operand], taps: list[Tapped], before_last: bool) -> list[Tapped]:
        """The taps that have to move behind this call, of those from which its tensors were made.

        It joins what comes from them with more of the same layers' output; or it is a gate, the product with another
        layer's output that no activation follows. before_last: whether there are weight layers still to come; the last
        one's output is no gate's.
        """
        if func not in ELEMENTWISE or not torch.is_grad_enabled():
            return []
        gated = before_last and bool(self.gated(func, operands))
        beside = [layer for _, known in operands for layer in known.layers]
        return [tap for tap in taps if not tap.used and (gated or _meets(tap, taps, beside))]

    def gated(self, func: Call, operands: list[Operand]) -> list[Layer]:
        """The layers whose output, as it is, this call multiplies by numbers of the same shape."""
        if func not in ELEMENT_PRODUCTS or len(operands) != 2 or operands[0][0].shape != operands[1][0].shape:
            return []
        layers = [known.result_of for _, known in operands]
        return [layer for layer in layers if layer is not None and layer.open]

    def move(self, taps: list[Tapped]) -> None:
        """Another tap takes the place of these."""
        self.any_moved = True
        for tap in taps:
            tap.moved = True

    def without(self, taps: list[Tapped], x: Tensor) -> Tensor:
        """x as it would be without the cuts at these taps."""
        past = self._tensors.of(x).past
        if past is None or not any(tap in taps for tap in past.taps):
            return x
        whole = past.again(lambda y: self.without(taps, y))
        layers = tuple([layer for tap in past.taps if tap in taps for layer in tap.layers])
        self._tensors.record(whole).layers = layers
        return whole

    def follow(
        self, func: Call, args: Args, kwargs: Kwargs, operands: list[Operand], taps: list[Tapped], result: Any
    ) -> None:
        """Any other call: its results carry on what its tensors carried, and were made from these taps."""
        if not self._layers or not isinstance(result, (Tensor, tuple, list)):
            return
        if func in MISTAKEN and operands and (layer := operands[0][1].result_of):
            layer.unknown = func.__name__
        layers = _layers_of(operands)
        if layers:
            for x in tensors_of(result):
                self._tensors.record(x).layers = layers
        if not isinstance(result, Tensor):
            return
        if taps:
            self._follow_past(taps, func, args, kwargs, operands, result)
        elif not layers and result.requires_grad and all([_is_apart(x, known) for x, known in operands]):
            self._tensors.record(result).apart = True

    def _follow_past(
        self, taps: list[Tapped], func: Call, args: Args, kwargs: Kwargs, operands: list[Operand], result: Tensor
    ) -> None:
        overwrites = any([x is result for x, _ in operands])
        if func in ELEMENTWISE and not overwrites:
            past = Past(taps, func, args, kwargs, torch.is_grad_enabled())
            self._made_from(self._tensors.record(result), past)
            return
        if overwrites:
            self._tensors.record(result).past = None
        for tap in taps:
            tap.used = True


def taps_of(operands: list[Operand]) -> list[Tapped]:
    """The taps from which elementwise functions made some of these."""
    taps: list[Tapped] = []
    for _, known in operands:
        if known.past is not None:
            taps += [tap for tap in known.past.taps if tap not in taps]
    return taps


def _layers_of(operands: list[Operand]) -> tuple[Layer, ...]:
    """The layers whose output some of these carry."""
    carried = [known.layers for _, known in operands if known.layers]
    if not carried:
        return ()
    if len(carried) == 1 and len(carried[0]) == 1:
        return carried[0]
    return tuple(sorted({layer for layers in carried for layer in layers}, key=lambda layer: layer.number))


def _meets(tap: Tapped, taps: list[Tapped], beside: list[Layer]) -> bool:
    """Whether more of its layers' output comes beside this tap, or from others of these."""
    others = [layer for other in taps if other is not tap for layer in other.layers]
    return any([layer in beside or layer in others for layer in tap.layers])


def _comes_from_nowhere(x: Tensor, known: Known) -> bool:
    """Whether a function that nobody saw made x."""
    # Not by `not`: the compiler of torch 2.13 cannot negate a tuple.
    return len(known.layers) == 0 and known.past is None and not _is_apart(x, known)


def _is_apart(x: Tensor, known: Known) -> bool:
    """Whether x is made without any layer's output, of inputs and parameters alone, as far as was seen."""
    return known.apart or not x.requires_grad or x.is_leaf
