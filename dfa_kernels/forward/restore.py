"""Runs a network for what can be seen of it, and leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


@contextlib.contextmanager
def restored(net: nn.Module) -> Iterator[None]:
    """Undoes, at its end, what happened to the random number generators and to the tensors that ``net`` keeps.

    Those are its buffers, and tensors that its modules hold as attributes or in lists that are attributes.
    """
    buffers = list(_buffers_with_values(net))
    attributes = [(module, dict(module.__dict__), _lists(module)) for module in net.modules()]
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        for module, name, buffer, values in buffers:
            module._buffers[name] = buffer.copy_(values)
        for module, before, lists in attributes:
            _restore(module, before, lists)


def _restore(module: nn.Module, before: dict[str, Any], lists: list[tuple[list[Any], list[Any]]]) -> None:
    for name, value in list(module.__dict__.items()):
        earlier = before.get(name, _ABSENT)
        if value is not earlier and _holds_tensors(value):
            if earlier is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = earlier
    for kept, values in lists:
        kept[:] = values


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value))


def _lists(module: nn.Module) -> list[tuple[list[Any], list[Any]]]:
    return [(value, list(value)) for value in module.__dict__.values() if isinstance(value, list)]


def _buffers_with_values(net: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not torch.nn.parameter.is_lazy(buffer):
                yield module, name, buffer, buffer.clone()
