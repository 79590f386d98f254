"""How many weight-layer calls one forward pass makes: what "the last weight layer" means before it has run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..autocast import WithoutGraph
from .restore import restored
from .taps import ForwardPass, TapPolicy

WEIGHT_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def count_weight_layers(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of weight-layer calls in ``net(*args, **kwargs)``.

    Read off the modules where they tell (nested `nn.Sequential`), else counted in one extra pass whose random numbers
    and buffer changes are undone. A compiler cannot undo them, so under it the weight modules are counted.
    """
    if torch.compiler.is_compiling() or _is_plain_sequence(net):
        return sum(_calls(module) for module in _call_order(net))
    with restored(net), WithoutGraph(), ForwardPass(TapPolicy("named")) as counting:
        net(*args, **kwargs)
    seen: int = counting.weight_layers_seen
    return seen


def _call_order(net: nn.Module) -> Iterator[nn.Module]:
    """Leaf modules in the order of registration; those of a Sequential that stand in it twice come twice."""
    children = list(net._modules.values())
    if not children:
        yield net
    for child in children:
        if child is not None:
            yield from _call_order(child)


def _calls(module: nn.Module) -> int:
    return int(isinstance(module, WEIGHT_MODULES))


def _is_plain_sequence(net: nn.Module) -> bool:
    if type(net) is nn.Sequential:
        return all(_is_plain_sequence(child) for child in net)
    return not net._modules and type(net).__module__.startswith(("torch.nn.modules.", "dfa_kernels."))
