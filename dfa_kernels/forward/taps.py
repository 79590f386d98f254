"""Where the error is injected: taps, and the forward-pass observer that finds them.

A tap is a point of the network whose true gradient ∂L/∂h is replaced by the projected error e B_iᵀ. Points are found
while the network runs, from the torch functions that it calls, so that any module works, functional activations
included. `ForwardPass` decides only *where* a tap is; what happens there is up to its subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch_internals import checkpointed_region
from ..activations import is_activation
from .arguments import Args, Call, Kwargs, input_first, replaced
from .known import KnownTensors, Operand
from .layer_outputs import Layer, LayerOutputs, Tapped, taps_of
from .weight_layers import FORMING, LAYERS, WEIGHT_CALLS, WeightCall, bind, form

T: Any = Tensor

# They make no tensor, and say the same of one that is cut.
SIZES: frozenset[Call] = frozenset({T.shape.__get__, T.dtype.__get__, T.device.__get__, T.ndim.__get__, T.dim, T.size})

_library = torch.library.Library("dfa_kernels", "FRAGMENT")
_library.define("tap(Tensor(a) x, str name) -> Tensor(a)")
_library.impl("tap", lambda x, name: x, "CompositeImplicitAutograd")

TAP: Callable[[Tensor, str], Tensor] = torch.ops.dfa_kernels.tap
"""The identity, to everything but a `ForwardPass`, which sees the call as a place for a tap."""


class Tap(nn.Module):
    """Marks a place inside a network: what passes through it learns from the projected error.

    Outside `dfa.DFA` it is the identity. Input and output are the same tensor, of any shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def forward(self, x: Tensor) -> Tensor:
        return TAP(x, self.name)


@dataclass(frozen=True)
class TapInfo:
    """A tap as the network met it: its name, its shape without the rows, and its number of units."""

    name: str
    shape: tuple[int, ...]
    size: int
    bypassed: bool = False
    """Whether a path goes around it (a residual stream): its layers then learn by a chain past it as well."""


@dataclass(frozen=True)
class TapPolicy:
    """Which points of a network are taps."""

    kind: str
    """"nonlinearity", "layer_input" or "named"."""
    names: frozenset[str] = field(default=frozenset())
    """The names a "named" policy accepts."""


class OutputTap:
    """Forward hook that offers a module's output as a tap. Holds nothing but the name, so it copies and pickles."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"taps: the output of submodule {self.name!r} must be one tensor, got {type(output).__name__}; put a "
                "dfa_kernels.Tap() behind the one of its tensors that the network goes on with"
            )
        return TAP(output, self.name)


class ForwardPass(TorchFunctionMode):
    """Runs beside one forward pass and finds its taps.

    Subclasses override `at_tap`, called with the tensor at a tap and returning it with its graph, and what the network
    goes on with; its ``origin`` is what the tap is named after: the weight of the layer it teaches, or the name given
    to the place. Taps are numbered: ``point`` is the newest one's number. ``weight_layers`` is the number of
    weight-layer calls of a whole pass. Only the "nonlinearity" policy must know it ahead: an activation after the last
    of them belongs to the output.
    """

    def __init__(self, policy: TapPolicy, weight_layers: int = -1) -> None:
        super().__init__()
        self.policy = policy
        self.is_traced = torch.compiler.is_compiling()
        self.weight_layers = weight_layers
        self.point = -1
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.points_without_grad = 0
        self.names_seen: set[str] = set()
        self.newest: WeightCall | None = None
        self.calls: list[WeightCall] = []
        self._tapped_region: Any = None
        self._before_last = weight_layers > 0
        self._follows = policy.kind == "nonlinearity"
        self._tensors = KnownTensors()
        self._outputs = LayerOutputs(self._tensors)

    @property
    def weight_layers_seen(self) -> int:
        return len(self.calls)

    @property
    def points_seen(self) -> int:
        return self.point + 1

    def chained(self) -> list[Layer]:
        """At the end: the weight layers that only a chain through others connects with the tap that teaches them."""
        return self._outputs.chained()

    def at_tap(self, origin: Tensor | str, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, z

    def give_up_taps(self, points: list[int]) -> None:
        """These taps are none: the path that they were to cut goes around them."""

    def overwritten(self, z: Tensor) -> None:
        """z, where a tap is to be, has overwritten what was there: the network may go on with z itself."""

    def weight_layer(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        return func(*args, **kwargs)

    def activation(self, func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        return cast(Tensor, func(*args, **kwargs))

    def other(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        return func(*args, **kwargs)

    def __torch_function__(self, func: Call, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if func in WEIGHT_CALLS:
            if func in LAYERS:
                args, kwargs = input_first(args, kwargs)
            call = bind(func, args, kwargs, self._tensors)
            if call is not None:
                return self._on_weight_layer(call, func, args, kwargs)
        if func in SIZES:
            return func(*args, **kwargs)
        if func is TAP:
            return self._on_mark(*args)
        activates = is_activation(func, args[1:], kwargs)
        if activates:
            args, kwargs = input_first(args, kwargs)
        if self._follows:
            return self._on_path(func, args, kwargs, activates)
        return self._run(func, args, kwargs, self._tensors.operands(args, kwargs), activates)

    def _run(self, func: Call, args: Args, kwargs: Kwargs, operands: list[Operand], activates: bool) -> Any:
        result = self.activation(func, args, kwargs) if activates else self.other(func, args, kwargs)
        if func in FORMING and isinstance(result, Tensor):
            parameters = form(func, args, operands, result)
            if parameters:
                self._tensors.record(result).weights = parameters
        return result

    def _on_weight_layer(self, call: WeightCall, func: Call, args: Args, kwargs: Kwargs) -> Any:
        _check_same_device(call.inputs[0], call.weights[0])
        if self._outputs.any_moved:
            args, kwargs = self._whole(args, kwargs)
            call = bind(func, args, kwargs, self._tensors) or call
        if self.policy.kind == "layer_input" or self._outputs.any_opaque:
            args, kwargs = self._cut_inputs(call.inputs, args, kwargs)
        if self._tapped_region is not None:
            self._check_region()
        result = self.weight_layer(func, args, kwargs)
        self.newest = call
        self.calls.append(call)
        self._before_last = len(self.calls) < self.weight_layers
        if self._follows:
            self._outputs.made(call, result)
        return result

    def _check_region(self) -> None:
        """What is computed again after a tap would be without its cut, and saved tensors would change places."""
        if self._tapped_region == checkpointed_region():
            raise RuntimeError(
                "net: torch.utils.checkpoint goes across a tap, and what it computes again would not be cut there; "
                "checkpoint from one tap to the next at most"
            )

    def _cut_inputs(self, inputs: tuple[Tensor, ...], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        for i, x in enumerate(inputs):
            if not any(x is earlier for earlier in inputs[:i]):
                cut = self._at_input(x)
                if cut is not x:
                    args, kwargs = _with(args, kwargs, x, cut)
        return args, kwargs

    def _at_input(self, x: Tensor) -> Tensor:
        """What a weight layer gets as its input."""
        if self.policy.kind == "layer_input":
            return x if self.newest is None else self._tap(self.newest.weights[0], x)[1]
        # What is behind such a layer ends in a product of its own, or in an activation that nobody saw.
        layers = self._outputs.opaque(x)
        return self._tap_behind(layers, x) if layers else x

    def _whole(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments without the cuts of taps that have moved: what they lead to is a path around the new tap."""
        moved = [tap for tap in taps_of(self._tensors.operands(args, kwargs)) if tap.moved]
        return self._without(moved, args, kwargs) if moved else (args, kwargs)

    def _without(self, taps: list[Tapped], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return replaced(args, kwargs, lambda x: self._outputs.without(taps, x))

    def _on_path(self, func: Call, args: Args, kwargs: Kwargs, activates: bool) -> Any:
        """Any call but a weight layer's, under the "nonlinearity" policy."""
        if self._outputs.any_moved:
            args, kwargs = self._whole(args, kwargs)
        operands = self._tensors.operands(args, kwargs)
        taps = taps_of(operands)
        if taps:
            around = self._outputs.around(func, operands, taps, self._before_last)
            if around:
                return self._move(around, func, args, kwargs)
        layers = self._outputs.awaiting(*operands[0]) if activates and operands else ()
        result = self._run(func, args, kwargs, operands, activates)
        if layers and self._before_last:
            return self._tap_behind(layers, result)
        self._outputs.follow(func, args, kwargs, operands, taps, result)
        return result

    def _tap_behind(self, layers: tuple[Layer, ...], z: Tensor) -> Tensor:
        whole, cut = self._tap(layers[-1].call.weights[0], z)
        # In a custom function's forward method, for example, nothing can be cut.
        if torch.is_grad_enabled():
            self._outputs.tapped(self.point, layers, whole, cut)
        return cut

    def _move(self, taps: list[Tapped], func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        """The taps become one, at the result of this call."""
        args, kwargs = self._without(taps, args, kwargs)
        self.give_up_taps([tap.point for tap in taps])
        self._outputs.move(taps)
        gates = self._outputs.gated(func, self._tensors.operands(args, kwargs)) if self._before_last else []
        layers = (*gates, *[layer for tap in taps for layer in tap.layers])
        z = func(*args, **kwargs)
        if any(z is x for x in args):
            self.overwritten(z)
        return self._tap_behind(layers, z)

    def _tap(self, origin: Tensor | str, z: Tensor) -> tuple[Tensor, Tensor]:
        self.point += 1
        self.shapes[self.point] = tuple(z.shape)
        self.points_without_grad += not torch.is_grad_enabled()
        self._tapped_region = None if self.is_traced else checkpointed_region()
        return self.at_tap(origin, z)

    def _on_mark(self, x: Tensor, name: str) -> Tensor:
        if self.policy.kind != "named" or name not in self.policy.names:
            return x
        self.names_seen.add(name)
        return self._tap(name, x)[1]


def tap_names(net: nn.Module, origins: list[Tensor | str], called: Sequence[tuple[WeightCall, str]]) -> list[str]:
    """Names of the taps of one pass: the taught layer's, or the place's own; a repeated one gets "#2", "#3" …

    called: the pass's weight layers, with the modules that call them; for weights that are no parameters of ``net``.
    """
    layers = {id(call.weights[0]): name for call, name in called if name}
    layers |= {id(p): _layer_of(name) for name, p in net.named_parameters(remove_duplicate=False)}
    names: list[str] = []
    for i, origin in enumerate(origins):
        name = origin if isinstance(origin, str) else layers.get(id(origin), f"tap{i}")
        earlier = sum(n.partition("#")[0] == name for n in names)
        names.append(f"{name}#{earlier + 1}" if earlier else name)
    return names


def _layer_of(parameter: str) -> str:
    """The name of the module that has a parameter, or is parametrized by it; of the network's own, their own."""
    layer, parametrized, _ = parameter.partition(".parametrizations.")
    return layer if parametrized else parameter.rpartition(".")[0] or parameter


def _with(args: Args, kwargs: Kwargs, x: Tensor, cut: Tensor) -> tuple[Args, Kwargs]:
    return replaced(args, kwargs, lambda y: cut if y is x else y)


def _check_same_device(x: Tensor, weight: Tensor) -> None:
    if x.device != weight.device:
        raise ValueError(
            f"x: a weight layer on {weight.device} got an input on {x.device}; move the input or the network"
        )
