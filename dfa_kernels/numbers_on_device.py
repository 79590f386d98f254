"""The numbers of a capturable optimizer in device memory: kernels read there what they are when a graph is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .backends.calls import DeviceNumbers
from .updates import UpdateRule

_device, _dtype = attrgetter("device"), attrgetter("dtype")
Numbers = Sequence[Any]
"""A group's, as the rule's `row` takes them; the first, a learning rate, may be a tensor."""


class NumbersOnDevice:
    """A row for each parameter, in the order of the groups: the rule's numbers, and how often it was updated.

    Numbers come there by kernels that carry them, in the order of the stream, so that no replay sees those of a later
    step, and only those that have changed.
    """

    def __init__(self, rule: UpdateRule, groups: list[dict[str, Any]], numbers: Sequence[Numbers]) -> None:
        parameters = [p for group in groups for p in group["params"]]
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"capturable: the parameters are on {sorted(map(str, devices))}, expected one device")
        _check_not_captured(parameters[0].device)
        self._layout = _layout(groups)
        self._rule = rule
        self._row_of = {p: i for i, p in enumerate(parameters)}
        # Of float64 parameters no number may lose half of its digits.
        dtype = reduce(torch.promote_types, [p.dtype for p in parameters], torch.float32)
        width = len(rule.row(*numbers[0])) + rule.counts
        self.table = torch.zeros(len(parameters), width, dtype=dtype, device=devices.pop())
        self._rows: list[tuple[Tensor, ...]] = [row.unbind() for row in self.table]
        ends = [sum(len(group["params"]) for group in groups[: i + 1]) for i in range(len(groups))]
        self._columns = [
            self.table[end - len(group["params"]) : end].unbind(1) for end, group in zip(ends, groups, strict=True)
        ]
        self._written: list[list[float]] = [[float("nan")] * width for _ in groups]

    def suits(self, groups: list[dict[str, Any]]) -> bool:
        """Whether these are the parameters that there is a row for, where they were."""
        return self._layout == _layout(groups)

    def write(self, numbers: Sequence[Numbers]) -> None:
        """Brings the numbers of each group to its rows, but for those that are on the device already.

        Raises:
            RuntimeError: under capture, if any has changed.
        """
        for given, written, columns in zip(numbers, self._written, self._columns, strict=True):
            rate, *others = given
            on_host = None if is_on_device(rate) else float(rate)
            for i, value in enumerate(self._rule.row(on_host, *others)):
                if value is not None and value != written[i]:
                    _check_not_captured(self.table.device)
                    columns[i].fill_(value)
                    written[i] = value

    def copy_rates(self, numbers: Sequence[Numbers]) -> None:
        """Brings learning rates that are on the device to the rows. A captured graph does it at each of its replays."""
        for (rate, *_), columns in zip(numbers, self._columns, strict=True):
            if is_on_device(rate):
                columns[0].copy_(rate.reshape(()))

    def count(self, parameters: Sequence[Tensor]) -> None:
        """Counts an update of each."""
        if self._rule.counts and parameters:
            torch._foreach_add_([self.step_of(p) for p in parameters], 1)

    def step_of(self, p: Tensor) -> Tensor:
        """How often it was updated, a view of the table."""
        return self._rows[self._row_of[p]][-1]

    def row(self, p: Tensor) -> tuple[Tensor, ...]:
        return self._rows[self._row_of[p]]

    def rows(self, parameters: Sequence[Tensor]) -> DeviceNumbers:
        return DeviceNumbers(self.table, [self._row_of[p] for p in parameters])


def _layout(groups: list[dict[str, Any]]) -> list[tuple[list[Any], ...]]:
    """Asked for in each step, so what is called for each parameter is C."""
    return [tuple([*map(look, group["params"])] for look in (id, _device, _dtype)) for group in groups]


def is_captured(device: torch.device) -> bool:
    """Whether what is called on this device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_not_captured(device: torch.device) -> None:
    """What comes to the device under capture would come there again at each replay."""
    if is_captured(device):
        raise RuntimeError(
            "capturable: param_groups have changed since the last step, or there was none; call the optimizer's "
            "refresh() before a capture"
        )


def is_on_device(number: object) -> bool:
    """Whether it is a tensor whose value no host knows."""
    return isinstance(number, Tensor) and number.device.type != "cpu"
