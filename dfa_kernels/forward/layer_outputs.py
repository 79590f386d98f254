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
from torch import Tensor, nn

from .elementwise import ELEMENTWISE
from .tensor_map import TensorMap
from .weight_layers import Args, Call, Kwargs, WeightCall, replaced, tensors_in


@dataclass(slots=True, eq=False)
class Layer:
    """One call of a weight layer."""

    call: WeightCall
    number: int
    open: bool = True
    """Whether no activation has followed yet."""


@dataclass(slots=True, eq=False)
class Tapped:
    """A tap: its number in the pass, the layers that it teaches, and its tensor before the cut."""

    point: int
    layers: list[Layer]
    whole: Tensor
    used: bool = False
    """Whether something has used the cut tensor that cannot be made again without the cut."""


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
        self._open: list[Layer] = []
        self._carried: TensorMap[list[Layer]] = TensorMap()
        self._past: TensorMap[Past] = TensorMap()
        self._apart: TensorMap[bool] = TensorMap()

    def made(self, call: WeightCall, result: Any) -> None:
        """A weight layer ran: what its inputs carried has arrived."""
        arrived = self._taps_of(call.inputs)
        if arrived:
            self._past.keep(lambda known: all(tap not in arrived for tap in known.taps))
        layer = Layer(call, self._layers)
        self._layers += 1
        self._open.append(layer)
        for x in tensors_in((result,), {}):
            self._carried.set(x, [layer])

    def awaiting(self, z: Tensor) -> list[Layer]:
        """The layers whose output an activation of z follows, in their order.

        Where z comes from a function that nobody saw, that is every layer without an activation.
        """
        layers = self._carried.get(z)
        if layers is None and self._past.get(z) is None and not self._is_apart(z):
            return list(self._open)
        return layers or []

    def opaque(self, x: Tensor) -> list[Layer]:
        """The open layers that make x together, if one of them is opaque."""
        layers = [layer for layer in self._carried.get(x) or [] if layer.open]
        return layers if any(layer.call.opaque for layer in layers) else []

    def tapped(self, point: int, layers: list[Layer], whole: Tensor, cut: Tensor) -> None:
        """A tap was placed behind these layers: ``cut`` goes on."""
        for layer in layers:
            layer.open = False
        self._open = [layer for layer in self._open if layer.open]
        self._carried.discard(cut)
        self._past.set(cut, Past([Tapped(point, layers, whole)]))

    def around(self, func: Call, args: Args, kwargs: Kwargs) -> list[Tapped]:
        """The taps that this call goes around: it joins what comes from them with more of the same layers' output."""
        if not len(self._past) or func not in ELEMENTWISE:
            return []
        tensors = list(tensors_in(args, kwargs))
        taps = self._taps_of(tensors)
        beside = [layer for x in tensors for layer in self._carried.get(x) or ()]
        return [
            tap
            for tap in taps
            if not tap.used
            and any(
                layer in beside or any(layer in other.layers for other in taps if other is not tap)
                for layer in tap.layers
            )
        ]

    def _taps_of(self, tensors: Iterable[Tensor]) -> list[Tapped]:
        """The taps from which elementwise functions made some of these."""
        taps: list[Tapped] = []
        for x in tensors:
            past = self._past.get(x)
            taps += [tap for tap in (past.taps if past else ()) if tap not in taps]
        return taps

    def without(self, taps: list[Tapped], x: Tensor) -> Tensor:
        """x as it would be without the cuts at these taps."""
        past = self._past.get(x)
        if past is None or not any(tap in taps for tap in past.taps):
            return x
        return past.again(lambda y: self.without(taps, y))

    def follow(self, func: Call, args: Args, kwargs: Kwargs, result: Any) -> None:
        """Any other call: its results carry on what its tensors carried."""
        if not isinstance(result, (Tensor, tuple, list)) or not (len(self._carried) or len(self._past)):
            return
        tensors = list(tensors_in(args, kwargs))
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

    def _is_apart(self, x: Tensor) -> bool:
        """Whether x is made without any layer's output, of inputs and parameters alone, as far as was seen."""
        return not x.requires_grad or isinstance(x, nn.Parameter) or self._apart.get(x) is not None
