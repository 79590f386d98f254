"""The short way through a plain `nn.Sequential` of Linear layers and activations, the most common DFA network.

Its segments are known before it runs, so nothing has to be observed: no autograd graph is built only to be dropped,
and an activation may overwrite its pre-activation. The result is the same as a `SegmentedPass`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    modules = list(_leaves(net))
    if not _PLAIN.fullmatch("".join(_CODE.get(type(module), "?") for module in modules)):
        return None
    x = args[0]
    if not isinstance(x, Tensor) or x.requires_grad or not _unhooked(net, modules):
        return None
    dims = x.dim() - sum(_dims_less(module, x.dim()) for module in modules if type(module) is nn.Flatten)
    if dims < 2 or row_count(dims, batch_dims) != dims - 1:
        return None
    layers = [module for module in modules if type(module) is nn.Linear]
    first = layers[0].weight
    return modules if all(_fits(layer, first) for layer in layers) and x.device == first.device else None


def run_sequence(
    modules: list[nn.Module], x: Tensor, tap_at_activation: bool
) -> tuple[Tensor, list[Segment], FusedLayer]:
    """Output, segments and last layer. A tap is at the activation, or behind the dropout that follows it."""
    run = _Run(tap_at_activation)
    with WithoutGraph():
        for module in modules:
            x = _STEPS[_CODE[type(module)]](run, module, x)
    assert run.layer is not None
    return x, run.segments, run.layer


class _Run:
    """One pass. ``layer`` is the newest layer as long as no tap follows it."""

    def __init__(self, tap_at_activation: bool) -> None:
        self.tap_at_activation = tap_at_activation
        self.segments: list[Segment] = []
        self.layer: FusedLayer | None = None

    def flatten(self, module: Any, x: Tensor) -> Tensor:
        return x.flatten(module.start_dim, module.end_dim)

    def linear(self, module: Any, x: Tensor) -> Tensor:
        if self.layer is not None:
            self.tap(x)
        a = F.linear(x, module.weight, module.bias)
        x = x if x.dtype == a.dtype else x.to(a.dtype)
        self.layer = FusedLayer(x, module.weight, module.bias, None, "identity", 0.0, 0.0, a, None)
        return a

    def activation(self, module: Any, a: Tensor) -> Tensor:
        layer, row = self.layer, _ROW_OF_MODULE[type(module)]
        assert layer is not None
        layer.activation = row.name
        layer.p, layer.q = module_parameters(row, module)
        h = row.apply(a, layer.p, layer.q)
        layer.saved = h if row.keeps_output(layer.p, layer.q) else a
        if self.tap_at_activation:
            self.tap(h)
        return h

    def dropout(self, module: Any, x: Tensor) -> Tensor:
        if not module.training or module.p == 0:
            return x
        mask = F.dropout(torch.ones_like(x), module.p)
        if self.layer is not None:
            before = self.layer.dropout_mask
            self.layer.dropout_mask = mask if before is None else before * mask
        return x * mask

    def tap(self, h: Tensor) -> None:
        assert self.layer is not None
        self.segments.append(Segment(self.layer.weight, h, h, self.layer))
        self.layer = None


def _dims_less(module: Any, dims: int) -> int:
    """How many dimensions fewer it leaves of so many."""
    return int(module.end_dim % dims - module.start_dim % dims)


_STEPS = {"F": _Run.flatten, "L": _Run.linear, "A": _Run.activation, "D": _Run.dropout}


def _leaves(net: nn.Module) -> Iterator[nn.Module]:
    for module in net._modules.values():
        if type(module) is nn.Sequential and _unhooked(module, ()):
            yield from _leaves(module)
        elif module is not None:
            yield module


def _unhooked(net: nn.Module, modules: Any) -> bool:
    """Whether calling the modules runs their class's own forward and nothing else."""
    if module_calls_are_observed():
        return False
    for module in (net, *modules):
        if calls_are_observed(module):
            return False
        if "forward" in module.__dict__ or type(module).forward is not _FORWARDS.get(type(module)):
            return False
    return True


def _fits(layer: nn.Linear, first: Tensor) -> bool:
    """Whether the layer learns, with plain parameters that share a launch with the first one's."""
    for p in (layer.weight, layer.bias):
        if p is not None and not (type(p) is nn.Parameter and p.requires_grad and p.dtype == first.dtype):
            return False
    return layer.weight.device == first.device
