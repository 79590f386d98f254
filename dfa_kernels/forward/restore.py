"""Runs a network for what can be seen of it, and leaves no trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin


@contextlib.contextmanager
def restored(net: nn.Module) -> Iterator[None]:
    """Undoes, at its end, what happened to random number generators and to what the modules of ``net`` keep.

    That is their buffers and attributes: of tensors the values, of lists, dicts and sets what is in them. Modules that
    waited for their first input to take shape have taken it.
    """
    undo = [step for module in net.modules() if not _is_lazy(module) for step in _undo(module)]
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for step in undo:
            step()


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _undo(module: nn.Module) -> Iterator[Callable[[], None]]:
    # Parameters and modules are the network itself, and its hooks are others'.
    kept = {name: value for name, value in module.__dict__.items() if name not in _OWN}
    yield _attributes_as_in(module.__dict__, kept)
    yield _contents_as_in(module._buffers)
    for value in (*kept.values(), *module._buffers.values()):
        if isinstance(value, Tensor):
            yield _values_as_in(value)
        elif type(value) in (list, dict, set):
            yield _contents_as_in(value)


_OWN = frozenset(nn.Module().__dict__) - {"training"}


def _attributes_as_in(now: dict[str, Any], before: dict[str, Any]) -> Callable[[], None]:
    def step() -> None:
        for name in set(now) - set(before) - _OWN:
            del now[name]
        now.update(before)

    return step


def _contents_as_in(container: Any) -> Callable[[], None]:
    before = container.copy()

    def step() -> None:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(before)

    return step


def _values_as_in(tensor: Tensor) -> Callable[[], None]:
    before = tensor.detach().clone()

    def step() -> None:
        # Whether or not its version tells: batch norm's does not.
        with torch.no_grad():
            tensor.detach().copy_(before)

    return step
