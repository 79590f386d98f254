"""What can only be seen of a network by running it before its first pass counts.

The number of its weight layers, in which modules they are, and which dimensions of its tensors are the rows of its
output: those that change with the output's when the batch does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from .._torch_internals import map_tensors
from ..autocast import WithoutGraph
from .arguments import Args, Call, Kwargs
from .restore import restored
from .segments import SegmentedPass
from .taps import ForwardPass, TapPolicy
from .weight_layers import MODULES

Run = Callable[..., Tensor]
"""The network, or whatever else makes one tensor of its arguments."""

Change = Callable[[Tensor, int, tuple[int, ...]], Tensor]
"""(x, size, dims) → x with another size in these of its dimensions."""


@dataclass(frozen=True)
class Varied:
    """A pass in which one of the output's dimensions had another size: that size, and the shapes of all taps."""

    size: int
    shapes: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Survey:
    """What is known of a network."""

    weight_layers: int
    names: tuple[str, ...] = ()
    """Of the modules that call the weight layers, one for each call."""
    varied: tuple[Varied | None, ...] = ()
    """For each of the output's dimensions that are rows; None where nothing that was tried changes it."""


def survey(net: nn.Module, run: Run, policy: TapPolicy, batch_dims: int | None, args: Args, kwargs: Kwargs) -> Survey:
    """Runs the network, with all its random numbers and buffer changes undone, once as it is and once for each row.

    run: calls the network. A compiler cannot undo what they do, so under it the modules are only counted.
    """
    if torch.compiler.is_compiling():
        return Survey(sum(isinstance(module, MODULES) for module in _call_order(net)))
    with restored(net), WithoutGraph(), warnings.catch_warnings(), _Count(net) as counted:
        # A module that torch.compile made runs uncompiled here; its warning is of hooks that meet it compiled.
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        # Copies, since a network may overwrite what it is given.
        copied_args, copied_kwargs = map_tensors(torch.clone, (args, kwargs))
        shape = tuple(run(*copied_args, **copied_kwargs).shape)
    rows = range(len(shape))[: row_count(len(shape), batch_dims)]
    taken = tuple([_varied(net, run, policy, counted.weight_layers_seen, k, shape[k], args, kwargs) for k in rows])
    return Survey(counted.weight_layers_seen, tuple(counted.names), taken)


def row_count(dims: int, batch_dims: int | None) -> int:
    """How many leading dimensions of an output with that many are rows."""
    if batch_dims is not None:
        return batch_dims
    return 2 if dims == 3 else 1


class _Count(ForwardPass):
    """Counts weight layers, and asks which module is running when they are called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(TapPolicy("named"))
        self.names: list[str] = []
        self._known = {module: name for name, module in net.named_modules()}
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []
        # Hooks of all modules see the calls of other threads too.
        self._thread = get_ident()

    def weight_layer(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        self.names.append(self._known.get(self._running[-1], "") if self._running else "")
        return super().weight_layer(func, args, kwargs)

    def __enter__(self) -> _Count:
        self._hooks = [
            register_module_forward_pre_hook(lambda module, _: self._entered(module)),
            register_module_forward_hook(lambda *_: self._left(), always_call=True),
        ]
        super().__enter__()
        return self

    def _entered(self, module: nn.Module) -> None:
        if get_ident() == self._thread:
            self._running.append(module)

    def _left(self) -> None:
        if get_ident() == self._thread:
            self._running.pop()

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)


def _varied(
    net: nn.Module, run: Run, policy: TapPolicy, weight_layers: int, k: int, size: int, args: Args, kwargs: Kwargs
) -> Varied | None:
    """A pass in which dimension k of the output, now of that size, has another."""
    change = _one_more if k == 0 or size == 1 else _one_less
    for chosen in _candidates(size, args, kwargs):
        changed_args, changed_kwargs = map_tensors(_Changed(change, size, chosen), (args, kwargs))
        watched = SegmentedPass(policy, weight_layers)
        try:
            with restored(net), torch.enable_grad(), watched:
                shape = run(*changed_args, **changed_kwargs).shape
        except Exception:
            continue
        if shape[k] != size:
            return Varied(shape[k], watched.shapes)
    return None


class _Changed:
    """A function of the input tensors, called with one after the other: ``change`` of those chosen."""

    def __init__(self, change: Change, size: int, chosen: dict[int, tuple[int, ...]]) -> None:
        self._change, self._size, self._chosen, self._numbers = change, size, chosen, count()

    def __call__(self, x: Tensor) -> Tensor:
        return self._change(x, self._size, self._chosen.get(next(self._numbers), ()))


def _candidates(size: int, args: Args, kwargs: Kwargs) -> Iterator[dict[int, tuple[int, ...]]]:
    """Dimensions of that size to change, by the numbers of the network's input tensors.

    One tensor by itself, since what does not change with it is not its rows; then all, first in one dimension and in
    the end in every. A single row would be broadcast to others, so there it is all at once.
    """
    shapes: list[tuple[int, ...]] = []
    map_tensors(lambda x: shapes.append(tuple(x.shape)), (args, kwargs))
    fitting = {n: tuple(i for i, length in enumerate(shape) if length == size) for n, shape in enumerate(shapes)}
    places = sorted({i for dims in fitting.values() for i in dims})
    tried: list[dict[int, tuple[int, ...]]] = []
    if size > 1:
        tried += [{n: (i,)} for i in places for n, dims in fitting.items() if i in dims]
    tried += [{n: (i,) for n, dims in fitting.items() if i in dims} for i in places]
    tried.append({n: dims for n, dims in fitting.items() if dims})
    yield from (chosen for i, chosen in enumerate(tried) if chosen and chosen not in tried[:i])


def _one_more(x: Tensor, size: int, dims: tuple[int, ...]) -> Tensor:
    for i in dims:
        if i < x.dim() and x.shape[i] == size and size > 0:
            x = torch.cat([x, x.narrow(i, 0, 1)], i)
    return x.clone()


def _one_less(x: Tensor, size: int, dims: tuple[int, ...]) -> Tensor:
    for i in dims:
        if i < x.dim() and x.shape[i] == size:
            x = x.narrow(i, 0, size - 1)
    return x.clone()


def _call_order(net: nn.Module) -> Iterator[nn.Module]:
    """Leaf modules in the order of registration; those of a Sequential that stand in it twice come twice."""
    children = list(net._modules.values())
    if not children:
        yield net
    for child in children:
        if child is not None:
            yield from _call_order(child)
