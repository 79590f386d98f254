"""The short way through a plain `nn.Sequential` of Linear layers and activations, the most common DFA network.

Its segments are known before it runs, so nothing has to be observed: no autograd graph is built only to be dropped,
and an activation may overwrite its pre-activation. The result is the same as a `SegmentedPass`'s.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_internals import call_hooks, likeness_of, module_calls_are_observed
from ..activations import ACTIVATIONS, Activation, module_parameters
from ..autocast import WithoutGraph, autocast_dtype
from .segments import FusedLayer, Segment
from .survey import row_count

_forward = attrgetter("forward")
_ROW_OF_MODULE: dict[type[nn.Module], Activation] = {m: row for row in ACTIVATIONS.values() for m in row.modules}
_CODE: dict[type[nn.Module], str] = {
    nn.Linear: "L",
    nn.Dropout: "D",
    nn.Flatten: "F",
    **dict.fromkeys(_ROW_OF_MODULE, "A"),
}
_WITH_OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Dropout: ("training", "p"),
    nn.Flatten: ("start_dim", "end_dim"),
    **{kind: tuple([name for name, _ in row.parameters]) for kind, row in _ROW_OF_MODULE.items() if row.parameters},
}
# A class whose forward somebody has replaced since is not what its name says.
_FORWARDS: dict[type[nn.Module], Any] = {kind: getattr(kind, "forward") for kind in (*_CODE, nn.Sequential)}  # noqa: B009
# Hidden layers with one activation each, dropout on either side of it, and the output layer.
_PLAIN = re.compile("[FD]*(?:LD?AD?)+L")


class PlainLayer(NamedTuple):
    """A Linear module and what follows it up to the next one. Numbers of dropout are 0 where none is drawn."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    dropout_before: float
    activation: Activation | None
    p: float
    q: float
    keeps_output: bool
    """Whether the activation's derivative follows from its output."""
    dropout_behind: float


def plain_sequence(net: nn.Module, x: Tensor, batch_dims: int | None, tap_at_activation: bool) -> PlainSequence | None:
    """``net`` if it is plain and x is a batch for it, else None."""
    if type(net) is not nn.Sequential or not isinstance(x, Tensor) or x.requires_grad:
        return None
    containers, leaves = _unfolded(net)
    kinds = "".join([_CODE.get(type(module), "?") for module in leaves])
    if _PLAIN.fullmatch(kinds) is None or not all([*map(_runs_as_its_class, (*containers, *leaves))]):
        return None
    dims = x.dim() - sum([_dims_less(module, x.dim()) for module in leaves if type(module) is nn.Flatten])
    if dims < 2 or row_count(dims, batch_dims) != dims - 1:
        return None
    if not _share_a_launch([module for module in leaves if type(module) is nn.Linear], x.device):
        return None
    found = PlainSequence(containers, leaves, x, batch_dims, tap_at_activation)
    return None if module_calls_are_observed() else found


class PlainSequence:
    """A plain network as one pass has found it: whether another finds it so still, and its run.

    A tap is at the activation, or behind the dropout that follows it.
    """

    def __init__(
        self,
        containers: list[nn.Module],
        leaves: list[nn.Module],
        x: Tensor,
        batch_dims: int | None,
        tap_at_activation: bool,
    ) -> None:
        self._net, self._batch_dims = containers[0], batch_dims
        self._containers = [(module._modules, [*module._modules.values()]) for module in containers]
        self._leaves, self._everything = leaves, [*containers, *leaves]
        everything = self._everything
        self._kinds = [*map(type, everything)]
        self._hooks = [hooks for module in everything for hooks in call_hooks(module)]
        self._forwards = [*map(_forward, everything)]
        linears: list[dict[str, Any]] = [module._parameters for module in leaves if type(module) is nn.Linear]
        self._parameters = [(own, own["weight"], own["bias"]) for own in linears]
        self._learning = [p for _, *both in self._parameters for p in both if p is not None]
        self._with_options = [(each, _WITH_OPTIONS[type(each)]) for each in leaves if type(each) in _WITH_OPTIONS]
        self._are_like, self._options = likeness_of([x, *self._learning]), self._options_now(x)
        self._first = next(i for i, module in enumerate(leaves) if type(module) is nn.Linear)
        self._late = not tap_at_activation
        self.layers = self._plain_layers()

    def holds(self, net: nn.Module, x: Tensor, batch_dims: int | None) -> bool:
        """Whether a pass of x would find everything but values as it was. Nothing here calls a function per module."""
        if net is not self._net or batch_dims != self._batch_dims:
            return False
        for modules, children in self._containers:
            if [*modules.values()] != children:
                return False
        if any(self._hooks) or module_calls_are_observed() or [*map(type, self._everything)] != self._kinds:
            return False
        if [*map(_forward, self._everything)] != self._forwards:
            return False
        for parameters, weight, bias in self._parameters:
            if parameters.get("weight") is not weight or parameters.get("bias") is not bias:
                return False
        return isinstance(x, Tensor) and self._are_like(x, *self._learning) and self._options_now(x) == self._options

    def _options_now(self, x: Tensor) -> list[Any]:
        """What may change in place beside tensors."""
        options: list[Any] = [autocast_dtype(x.device)]
        for module, names in self._with_options:
            options += [getattr(module, name) for name in names]
        return options

    def _plain_layers(self) -> list[PlainLayer]:
        layers: list[PlainLayer] = []
        for module in self._leaves[self._first :]:
            kind, row = type(module), _ROW_OF_MODULE.get(type(module))
            if kind is nn.Linear:
                own = module._parameters
                layers.append(PlainLayer(own["weight"], own["bias"], 0.0, None, 0.0, 0.0, True, 0.0))  # type: ignore[arg-type]
            elif row is not None:
                p, q = module_parameters(row, module)
                layers[-1] = layers[-1]._replace(activation=row, p=p, q=q, keeps_output=row.keeps_output(p, q))
            else:
                p = float(cast(nn.Dropout, module).p) if module.training else 0.0
                last = layers[-1]
                layers[-1] = (
                    last._replace(dropout_before=p) if last.activation is None else last._replace(dropout_behind=p)
                )
        return layers

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The output; and of each layer the input, what f' is computed from, and the dropout mask up to the tap."""
        own: list[Tensor | None] = []
        with WithoutGraph():
            for module in self._leaves[: self._first]:
                x = module(x)
            for weight, bias, dropout_before, row, p, q, keeps_output, dropout_behind in self.layers:
                a, mask = F.linear(x, weight, bias), None
                x = x if x.dtype is a.dtype else x.to(a.dtype)
                if dropout_before:
                    mask = F.dropout(torch.ones_like(a), dropout_before)
                    a = a * mask
                h = a if row is None else row.apply(a, p, q)
                own += (x, h if keeps_output else a)
                x = h
                if dropout_behind:
                    behind = F.dropout(torch.ones_like(h), dropout_behind)
                    x = h * behind
                    if self._late:
                        mask = behind if mask is None else mask * behind
                own.append(mask)
        return x, own

    def segments(self, own: list[Tensor | None]) -> tuple[list[Segment], FusedLayer]:
        """Segments and last layer of a run."""
        tensors = iter(own)
        layers = [
            FusedLayer(x, layer.weight, layer.bias, None, _name(layer.activation), layer.p, layer.q, saved, mask)  # type: ignore[arg-type]
            for layer, x, saved, mask in zip(self.layers, tensors, tensors, tensors, strict=True)
        ]
        return [Segment(layer.weight, layer.saved, layer.saved, layer) for layer in layers[:-1]], layers[-1]


def _name(row: Activation | None) -> str:
    return "identity" if row is None else row.name


def _dims_less(module: Any, dims: int) -> int:
    """How many dimensions fewer it leaves of so many."""
    return int(module.end_dim % dims - module.start_dim % dims)


def _unfolded(net: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """A Sequential and those inside it; and the modules inside all of them that are none."""
    containers, leaves = [net], []
    for module in net._modules.values():
        if type(module) is nn.Sequential:
            inner, own = _unfolded(module)
            containers += inner
            leaves += own
        elif module is not None:
            leaves.append(module)
    return containers, leaves


def _runs_as_its_class(module: nn.Module) -> bool:
    """Whether calling it runs its class's own forward, and nothing else but what all modules' calls run."""
    kind = type(module)
    return not any(call_hooks(module)) and "forward" not in module.__dict__ and kind.forward is _FORWARDS.get(kind)


def _share_a_launch(layers: list[nn.Module], device: torch.device) -> bool:
    """Whether all of them learn, with plain parameters of one dtype on the device, each bias one number an output."""
    dtype = None
    for layer in layers:
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is None or weight.device != device:
            return False
        if bias is not None and bias.shape != weight.shape[:1]:
            return False
        dtype = dtype or weight.dtype
        for p in (weight, bias):
            if p is not None and not (type(p) is nn.Parameter and p.requires_grad and p.dtype == dtype):
                return False
    return True
