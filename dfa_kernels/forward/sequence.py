"""The short way through a plain `nn.Sequential` of Linear layers and activations, the most common DFA network.

Its segments are known before it runs, so nothing has to be observed: no autograd graph is built only to be dropped,
and an activation may overwrite its pre-activation. The result is the same as a `SegmentedPass`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_internals import calls_are_observed, module_calls_are_observed
from ..activations import ACTIVATIONS, Activation, module_parameters
from ..autocast import WithoutGraph, autocast_dtype
from .segments import FusedLayer, Segment
from .survey import row_count

_ROW_OF_MODULE: dict[type[nn.Module], Activation] = {m: row for row in ACTIVATIONS.values() for m in row.modules}
_CODE: dict[type[nn.Module], str] = {
    nn.Linear: "L",
    nn.Dropout: "D",
    nn.Flatten: "F",
    **dict.fromkeys(_ROW_OF_MODULE, "A"),
}
# A class whose forward somebody has replaced since is not what its name says.
_FORWARDS: dict[type[nn.Module], Any] = {kind: getattr(kind, "forward") for kind in (*_CODE, nn.Sequential)}  # noqa: B009
# Hidden layers with one activation each, dropout on either side of it, and the output layer.
_PLAIN = re.compile("[FD]*(?:LD?AD?)+L")


@dataclass(slots=True)
class PlainSequence:
    """The leaves of a network, and how they and the input looked in one pass.

    A parameter is known by its id, which stays its own only as long as somebody keeps it.
    """

    leaves: list[nn.Module]
    looks: list[Any]

    def is_plain(self, x: Tensor, batch_dims: int | None) -> bool:
        """Whether `run_sequence` may run it on x."""
        kinds = "".join([_CODE[type(module)] for module in self.leaves])
        if _PLAIN.fullmatch(kinds) is None:
            return False
        dims = x.dim() - sum([_dims_less(module, x.dim()) for module in self.leaves if type(module) is nn.Flatten])
        if dims < 2 or row_count(dims, batch_dims) != dims - 1:
            return False
        return _share_a_launch([module for module in self.leaves if type(module) is nn.Linear], x.device)


def plain_sequence(
    net: nn.Module, batch_dims: int | None, args: tuple[Any, ...], kwargs: dict[str, Any], last: PlainSequence | None
) -> PlainSequence | None:
    """``net``, if `run_sequence` may run it on ``args``; what the last pass was given, if this one looks the same."""
    if type(net) is not nn.Sequential or kwargs or len(args) != 1 or torch.compiler.is_compiling():
        return None
    x = args[0]
    if not isinstance(x, Tensor) or x.requires_grad or module_calls_are_observed() or not _runs_as_its_class(net):
        return None
    leaves = _leaves(net)
    looks = _looks_of(leaves, x)
    if looks is None:
        return None
    if last is None or last.looks != looks:
        last = PlainSequence(leaves, looks)
        return last if last.is_plain(x, batch_dims) else None
    return last


def _looks_of(leaves: list[nn.Module], x: Tensor) -> list[Any] | None:
    """All that a pass depends on beside values, in one frame; None if a leaf is not what the name of its class says."""
    device = x.device
    looks: list[Any] = [x.shape, x.dtype, device, autocast_dtype(device)]
    for module in leaves:
        kind = type(module)
        if not _runs_as_its_class(module):
            return None
        looks.append(module)
        if kind is nn.Linear:
            # What else may change about parameters, a product refuses.
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if weight is not None:
                looks += (id(weight), weight.requires_grad, weight.shape, weight.dtype)
            if bias is not None:
                looks += (id(bias), bias.requires_grad)
        elif (row := _ROW_OF_MODULE.get(kind)) is not None:
            looks += module_parameters(row, module)
        elif kind is nn.Dropout:
            looks += (module.training, module.p)
        else:
            looks += (module.start_dim, module.end_dim)
    return looks


def run_sequence(
    modules: list[nn.Module], x: Tensor, tap_at_activation: bool
) -> tuple[Tensor, list[Segment], FusedLayer]:
    """Output, segments and last layer. A tap is at the activation, or behind the dropout that follows it.

    All in one frame, as every module of a narrow network takes no longer than a few of them.
    """
    segments: list[Segment] = []
    # The newest layer, as long as no tap follows it.
    layer: FusedLayer | None = None
    with WithoutGraph():
        for module in modules:
            kind = type(module)
            if kind is nn.Linear:
                if layer is not None:
                    segments.append(Segment(layer.weight, x, x, layer))
                # Not by the module's own attributes, which are slow to find.
                weight, bias = module._parameters["weight"], module._parameters["bias"]
                a = F.linear(x, weight, bias)  # type: ignore[arg-type]
                x = x if x.dtype == a.dtype else x.to(a.dtype)
                layer = FusedLayer(x, weight, bias, None, "identity", 0.0, 0.0, a, None)  # type: ignore[arg-type]
                x = a
            elif (row := _ROW_OF_MODULE.get(kind)) is not None:
                assert layer is not None
                p, q = module_parameters(row, module)
                h = row.apply(x, p, q)
                layer.activation, layer.p, layer.q = row.name, p, q
                layer.saved = h if row.keeps_output(p, q) else x
                x = h
                if tap_at_activation:
                    segments.append(Segment(layer.weight, h, h, layer))
                    layer = None
            elif kind is nn.Dropout:
                x = _dropped_out(module, x, layer)
            else:
                x = x.flatten(module.start_dim, module.end_dim)  # type: ignore[arg-type]
    assert layer is not None
    return x, segments, layer


def _dropped_out(module: Any, x: Tensor, layer: FusedLayer | None) -> Tensor:
    if not module.training or module.p == 0:
        return x
    mask = F.dropout(torch.ones_like(x), module.p)
    if layer is not None:
        layer.dropout_mask = mask if layer.dropout_mask is None else layer.dropout_mask * mask
    return x * mask


def _dims_less(module: Any, dims: int) -> int:
    """How many dimensions fewer it leaves of so many."""
    return int(module.end_dim % dims - module.start_dim % dims)


def _leaves(net: nn.Module) -> list[nn.Module]:
    leaves: list[nn.Module] = []
    for module in net._modules.values():
        if type(module) is nn.Sequential and _runs_as_its_class(module):
            leaves += _leaves(module)
        elif module is not None:
            leaves.append(module)
    return leaves


def _runs_as_its_class(module: nn.Module) -> bool:
    """Whether calling it runs its class's own forward, and nothing else but what all modules' calls run."""
    kind = type(module)
    return not calls_are_observed(module) and "forward" not in module.__dict__ and kind.forward is _FORWARDS.get(kind)


def _share_a_launch(layers: list[nn.Module], device: torch.device) -> bool:
    """Whether all of them learn, with plain parameters of one dtype on the device."""
    dtype = None
    for layer in layers:
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is None or weight.device != device:
            return False
        dtype = dtype or weight.dtype
        for p in (weight, bias):
            if p is not None and not (type(p) is nn.Parameter and p.requires_grad and p.dtype == dtype):
                return False
    return True
