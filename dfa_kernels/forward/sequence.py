"""The short way through a plain `nn.Sequential` of Linear layers and activations, the most common DFA network.

Its segments are known before it runs, so nothing has to be observed: no autograd graph is built only to be dropped,
and an activation may overwrite its pre-activation. The result is the same as a `SegmentedPass`'s.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_internals import calls_are_observed, module_calls_are_observed
from ..activations import ACTIVATIONS, Activation, module_parameters
from ..autocast import WithoutGraph
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


def plain_modules(
    net: nn.Module, batch_dims: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[nn.Module] | None:
    """The leaves of ``net`` if `run_sequence` may run them on ``args``, else None."""
    if type(net) is not nn.Sequential or kwargs or len(args) != 1 or torch.compiler.is_compiling():
        return None
    x, modules = args[0], _leaves(net)
    if not _is_plain(tuple([type(module) for module in modules])) or not isinstance(x, Tensor) or x.requires_grad:
        return None
    if module_calls_are_observed() or not (_runs_as_its_class(net) and all([*map(_runs_as_its_class, modules)])):
        return None
    dims = x.dim() - sum([_dims_less(module, x.dim()) for module in modules if type(module) is nn.Flatten])
    if dims < 2 or row_count(dims, batch_dims) != dims - 1:
        return None
    return modules if _share_a_launch([m for m in modules if type(m) is nn.Linear], x.device) else None


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


@lru_cache(maxsize=64)
def _is_plain(kinds: tuple[type[nn.Module], ...]) -> bool:
    return _PLAIN.fullmatch("".join([_CODE.get(kind, "?") for kind in kinds])) is not None


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
