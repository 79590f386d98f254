"""An update's numbers where kernels read them: in the device's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from ..._torch_internals import raw_stream
from ...updates import RULES, UpdateRule
from .library import library
from .stream import on_stream


@lru_cache(maxsize=16)
def numbers_and_sets(name: str, hyper: tuple[float, ...], parameters: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Rows of numbers that a rule's kernel reads, and where among them each parameter's begins; () if there is one."""
    rule, each = RULES[name], len(hyper) // parameters
    if hyper == hyper[:each] * parameters:
        return _row(rule, hyper[:each]), ()
    firsts: dict[tuple[float, ...], int] = {}
    sets = []
    for first in range(0, len(hyper), each):
        row = _row(rule, hyper[first : first + each])
        sets.append(firsts.setdefault(row, len(firsts) * len(row)))
    return tuple(chain.from_iterable(firsts)), tuple(sets)


def _row(rule: UpdateRule, hyper: Sequence[float]) -> tuple[float, ...]:
    return (*rule.row(*hyper[:-1]), hyper[-1]) if rule.counts else rule.row(*hyper)


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
