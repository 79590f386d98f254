"""An update's numbers where kernels read them: in the device's memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..._torch_internals import raw_stream
from .library import library
from .stream import on_stream

_numbers: dict[tuple[torch.device, int], tuple[tuple[float, ...], Tensor]] = {}


def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers where kernels read them; written only if they changed since the last call on this stream.

    A graph under capture gets its own, written by the graph.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = device, raw_stream(device.index) if device.type == "cuda" else 0
    if not capturing and key in _numbers and _numbers[key][0] == numbers:
        return _numbers[key][1]
    made = torch.empty(len(numbers), dtype=torch.float32, device=device)
    values = (ctypes.c_float * len(numbers))(*numbers)
    on_stream(device, library().write_numbers, made.data_ptr(), values)
    if not capturing:
        _numbers[key] = numbers, made
    return made
