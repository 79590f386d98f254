"""Runs a network for what can be seen of it, and leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def restored(net: nn.Module) -> Iterator[None]:
    """Undoes, at its end, what happened to the random number generators and to the buffers of ``net``."""
    before = list(_buffers_with_values(net))
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        for module, name, buffer, values in before:
            module._buffers[name] = buffer.copy_(values)


def _buffers_with_values(net: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not torch.nn.parameter.is_lazy(buffer):
                yield module, name, buffer, buffer.clone()
