"""Where the error is injected: taps, and the forward-pass observer that finds them.

A tap is a point of the network whose true gradient ∂L/∂h is replaced by the projected error e B_iᵀ. Points are found
while the network runs, from the torch functions that it calls, so that any module works, functional activations
included. `ForwardPass` decides only *where* a tap is; what happens there is up to its subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..activations import FUSED_CALLS, UNFUSED_CALLS

_library = torch.library.Library("dfa_kernels", "FRAGMENT")
_library.define("tap(Tensor(a) x, str name) -> Tensor(a)")
_library.impl("tap", lambda x, name: x, "CompositeImplicitAutograd")

TAP: Callable[[Tensor, str], Tensor] = torch.ops.dfa_kernels.tap
"""The identity, to everything but a `ForwardPass`, which sees the call as a place for a tap."""

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

LINEAR = F.linear
CONVOLUTIONS: frozenset[Call] = frozenset({F.conv1d, F.conv2d, F.conv3d})
TRANSPOSED: frozenset[Call] = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
WEIGHT_LAYERS: frozenset[Call] = frozenset({LINEAR}) | CONVOLUTIONS | TRANSPOSED
ACTIVATION_CALLS = frozenset(FUSED_CALLS) | UNFUSED_CALLS


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
    """A tap as the network met it: its name, its shape without the batch's rows, and its number of units."""

    name: str
    shape: tuple[int, ...]
    size: int


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
                f"taps: the output of submodule {self.name!r} must be one tensor, got {type(output).__name__}"
            )
        return TAP(output, self.name)


class ForwardPass(TorchFunctionMode):
    """Runs beside one forward pass and finds its taps.

    Subclasses override `at_tap`, called with the tensor at a tap and returning what the network goes on with; its
    ``origin`` is what the tap is named after: the weight of the layer it teaches, or the name given to the place.
    ``weight_layers`` is the number of weight-layer calls of a whole pass. Only the "nonlinearity" policy must know it
    ahead: an activation after the last of them belongs to the output.
    """

    def __init__(self, policy: TapPolicy, weight_layers: int = -1) -> None:
        super().__init__()
        self.policy = policy
        self.weight_layers = weight_layers
        self.weight_layers_seen = 0
        self.points_seen = 0
        self.points_without_grad = 0
        self.names_seen: set[str] = set()
        self._newest: Tensor | None = None  # weight of the newest layer
        self._untapped: list[tuple[Tensor, Tensor]] = []  # (weight, result) of layers that no activation followed yet

    def at_tap(self, origin: Tensor | str, z: Tensor) -> Tensor:
        return z

    def weight_layer(self, func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        return cast(Tensor, func(*args, **kwargs))

    def activation(self, func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        return cast(Tensor, func(*args, **kwargs))

    def other(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        return func(*args, **kwargs)

    def __torch_function__(self, func: Call, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if func in WEIGHT_LAYERS:
            return self._on_weight_layer(func, *_input_first(args, kwargs))
        if func in ACTIVATION_CALLS:
            return self._on_activation(func, *_input_first(args, kwargs))
        if func is TAP:
            return self._on_mark(*args)
        return self.other(func, args, kwargs)

    def _on_weight_layer(self, func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        x, *rest = args
        weight = rest[0] if rest else kwargs["weight"]
        _check_same_device(x, weight)
        if self.policy.kind == "layer_input" and self._newest is not None:
            x = self.at_tap(self._newest, x)
        self.weight_layers_seen += 1
        result = self.weight_layer(func, (x, *rest), kwargs)
        self._newest = weight
        if self.policy.kind == "nonlinearity":
            self._untapped.append((weight, result))
        return result

    def _on_activation(self, func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        h = self.activation(func, args, kwargs)
        if self.policy.kind != "nonlinearity" or not self._untapped or self._past_last_layer():
            return h
        self.points_seen += 1
        self.points_without_grad += not torch.is_grad_enabled()
        return self.at_tap(self._take_followed(args[0]), h)

    def _take_followed(self, z: Tensor) -> Tensor:
        """The weight of the layer that an activation of z follows: the one that made z, or all up to the newest."""
        for i, (weight, result) in enumerate(self._untapped):
            if result is z:
                del self._untapped[i]
                return weight
        weight = self._untapped[-1][0]
        self._untapped.clear()
        return weight

    def _on_mark(self, x: Tensor, name: str) -> Tensor:
        if self.policy.kind != "named" or name not in self.policy.names:
            return x
        self.names_seen.add(name)
        return self.at_tap(name, x)

    def _past_last_layer(self) -> bool:
        return self.weight_layers_seen >= self.weight_layers


def tap_names(net: nn.Module, origins: list[Tensor | str]) -> list[str]:
    """Names of the taps of one pass: the taught layer's, or the place's own; a repeated one gets "#2", "#3" …"""
    layers = {id(p): name.rpartition(".")[0] for name, p in net.named_parameters(remove_duplicate=False)}
    names: list[str] = []
    for i, origin in enumerate(origins):
        name = origin if isinstance(origin, str) else layers.get(id(origin), f"tap{i}")
        earlier = sum(n.partition("#")[0] == name for n in names)
        names.append(f"{name}#{earlier + 1}" if earlier else name)
    return names


def _input_first(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    if args:
        return args, kwargs
    rest = dict(kwargs)
    return (rest.pop("input"),), rest


def _check_same_device(x: Tensor, weight: Tensor) -> None:
    if x.device != weight.device:
        raise ValueError(
            f"x: a weight layer on {weight.device} got an input on {x.device}; move the input or the network"
        )
