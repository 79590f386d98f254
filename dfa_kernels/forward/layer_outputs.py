"""Where the output of a weight layer goes in a forward pass: to an activation, and perhaps around it.

The tap of a layer is at the activation that follows it. In ``h * torch.sigmoid(h)`` a product goes around that
activation, and a tap there would leave a path open. So a tap moves to the first tensor through which all of the
layer's output passes, as far as elementwise functions carry it around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import CLAMP_MIN, CLAMPS
from .elementwise import ELEMENT_PRODUCTS, ELEMENTWISE
from .tensor_map import TensorMap
from .weight_layers import Args, Call, Kwargs, WeightCall, replaced, tensors_in

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
    layers: list[Layer]
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

    def __init__(self) -> None:
        self._layers = 0
        self._point = -1
        self._open: list[Layer] = []
        self._results: TensorMap[Layer] = TensorMap()
        self._carried: TensorMap[list[Layer]] = TensorMap()
        self._past: TensorMap[Past] = TensorMap()
        self._apart: TensorMap[bool] = TensorMap()

    def made(self, call: WeightCall, result: Any) -> None:
        """A weight layer ran: what its inputs carried has arrived."""
        for x in call.inputs:
            self._taken(x)
        arrived = self._taps_of(call.inputs)
        if arrived:
            self._past.keep(lambda known: all(tap not in arrived for tap in known.taps))
        learns = any(x.requires_grad for x in tensors_in((result,), {}))
        layer = Layer(call, self._layers, learns, result.shape if isinstance(result, Tensor) else None)
        self._layers += 1
        self._open.append(layer)
        for x in tensors_in((result,), {}):
            self._carried.set(x, [layer])
            self._results.set(x, layer)

    def _taken(self, x: Tensor) -> None:
        """A weight layer takes x: what makes it is taught by a chain, if no tap comes between yet."""
        layers = self._carried.get(x) or []
        if self._comes_from_nowhere(x):
            # As an activation's, its shape is that of what it was made from.
            layers = [layer for layer in self._open if layer.shape == x.shape]
            for layer in layers:
                layer.unknown = layer.unknown or HIDDEN
        for layer in layers:
            if layer.taken is None:
                layer.taken = self._point

    def chained(self) -> list[Layer]:
        """At the end of a pass: the layers that only a chain through others connects with the tap that teaches them."""
        return [x for x in self._open if x.learns and x.taken is not None and x.taken < self._point]

    def awaiting(self, z: Tensor) -> list[Layer]:
        """The layers whose output an activation of z follows, in their order.

        Where z comes from a function that nobody saw, that is every layer without an activation.
        """
        return list(self._open) if self._comes_from_nowhere(z) else self._carried.get(z) or []

    def opaque(self, x: Tensor) -> list[Layer]:
        """The open layers that make x together, if one of them is opaque."""
        layers = [layer for layer in self._carried.get(x) or [] if layer.open]
        return layers if any(layer.call.opaque for layer in layers) else []

    def tapped(self, point: int, layers: list[Layer], whole: Tensor, cut: Tensor) -> None:
        """A tap was placed behind these layers: ``cut`` goes on."""
        for layer in layers:
            layer.open = False
        self._point = point
        self._open = [layer for layer in self._open if layer.open]
        self._carried.discard(cut)
        self._past.set(cut, Past([Tapped(point, layers, whole)]))

    def around(self, func: Call, args: Args, kwargs: Kwargs, before_last: bool) -> list[Tapped]:
        """The taps that have to move behind this call.

        It joins what comes from them with more of the same layers' output; or it is a gate, the product with another
        layer's output that no activation follows. before_last: whether there are weight layers still to come; the last
        one's output is no gate's.
        """
        if not len(self._past) or func not in ELEMENTWISE or not torch.is_grad_enabled():
            return []
        tensors = list(tensors_in(args, kwargs))
        taps = self._taps_of(tensors)
        beside = [layer for x in tensors for layer in self._carried.get(x) or ()]
        gated = before_last and bool(self.gated(func, args, kwargs))
        return [
            tap
            for tap in taps
            if not tap.used
            and (
                gated
                or any(
                    layer in beside or any(layer in other.layers for other in taps if other is not tap)
                    for layer in tap.layers
                )
            )
        ]

    def gated(self, func: Call, args: Args, kwargs: Kwargs) -> list[Layer]:
        """The layers whose output, as it is, this call multiplies by numbers of the same shape."""
        tensors = list(tensors_in(args, kwargs))
        if func not in ELEMENT_PRODUCTS or len(tensors) != 2 or tensors[0].shape != tensors[1].shape:
            return []
        layers = [self._results.get(x) for x in tensors]
        return [layer for layer in layers if layer is not None and layer.open]

    def _taps_of(self, tensors: Iterable[Tensor]) -> list[Tapped]:
        """The taps from which elementwise functions made some of these."""
        taps: list[Tapped] = []
        for x in tensors:
            past = self._past.get(x)
            taps += [tap for tap in (past.taps if past else ()) if tap not in taps]
        return taps

    def given_up(self, tensors: Iterable[Tensor]) -> list[Tapped]:
        """The taps behind these tensors that have moved: without a path through the new one, theirs has to be whole."""
        return [tap for tap in self._taps_of(tensors) if tap.moved] if len(self._past) else []

    def without(self, taps: list[Tapped], x: Tensor) -> Tensor:
        """x as it would be without the cuts at these taps."""
        past = self._past.get(x)
        if past is None or not any(tap in taps for tap in past.taps):
            return x
        whole = past.again(lambda y: self.without(taps, y))
        self._carried.set(whole, [layer for tap in past.taps if tap in taps for layer in tap.layers])
        return whole

    def follow(self, func: Call, args: Args, kwargs: Kwargs, result: Any) -> None:
        """Any other call: its results carry on what its tensors carried."""
        if not isinstance(result, (Tensor, tuple, list)) or not (len(self._carried) or len(self._past)):
            return
        tensors = list(tensors_in(args, kwargs))
        if func in MISTAKEN and tensors and (layer := self._results.get(tensors[0])):
            layer.unknown = func.__name__
        layers = {layer for x in tensors for layer in self._carried.get(x) or ()}
        if layers:
            for x in tensors_in((result,), {}):
                self._carried.set(x, sorted(layers, key=lambda layer: layer.number))
        if not isinstance(result, Tensor):
            return
        taps = self._taps_of(tensors)
        if taps:
            self._follow_past(taps, tensors, func, args, kwargs, result)
        elif not layers and result.requires_grad and all(map(self._is_apart, tensors)):
            self._apart.set(result, True)

    def _follow_past(
        self, taps: list[Tapped], tensors: list[Tensor], func: Call, args: Args, kwargs: Kwargs, result: Tensor
    ) -> None:
        overwrites = any(x is result for x in tensors)
        if func in ELEMENTWISE and not overwrites:
            self._past.set(result, Past(taps, func, args, kwargs, torch.is_grad_enabled()))
            return
        if overwrites:
            self._past.discard(result)
        for tap in taps:
            tap.used = True

    def _comes_from_nowhere(self, x: Tensor) -> bool:
        """Whether a function that nobody saw made x."""
        return self._carried.get(x) is None and self._past.get(x) is None and not self._is_apart(x)

    def _is_apart(self, x: Tensor) -> bool:
        """Whether x is made without any layer's output, of inputs and parameters alone, as far as was seen."""
        return not x.requires_grad or isinstance(x, nn.Parameter) or x.is_leaf or self._apart.get(x) is not None
