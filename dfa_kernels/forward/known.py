"""What one forward pass knows of the tensors it has met: a record for each, found once for every call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .arguments import Args, Kwargs, tensors_of

if TYPE_CHECKING:
    from .layer_outputs import Layer, Past


@dataclass(slots=True, eq=False)
class Known:
    """What is known of one tensor."""

    weights: tuple[Tensor, ...] = ()
    """The parameters that it is a form of; none of an activation."""
    layers: tuple[Layer, ...] = ()
    """The weight layers whose output it carries on, in their order."""
    result_of: Layer | None = None
    """The weight layer whose output it is."""
    past: Past | None = None
    """How it was made from taps."""
    apart: bool = False
    """Whether it was seen to be made without any layer's output, of inputs and parameters alone."""


Operand = tuple[Tensor, Known]
"""A tensor among a call's arguments, and what is known of it; not to be written to."""

_NOTHING = Known()


class KnownTensors:
    """The records of one pass. They keep no tensor alive, but for as long as a compiler traces the pass."""

    def __init__(self) -> None:
        # A tensor that is being traced has no id, nor weak references.
        self._is_traced = torch.compiler.is_compiling()
        self._records: dict[int, tuple[Any, Known]] = {}
        self._traced: list[Operand] = []

    def of(self, x: Tensor) -> Known:
        """What is known of x, to be read only."""
        return self._found(x) or _at_first(x)

    def record(self, x: Tensor) -> Known:
        """What is known of x, to be written to."""
        known = self._found(x)
        if known is None:
            known = _at_first(x)
            if known is _NOTHING:
                known = Known()
            if self._is_traced:
                self._traced.append((x, known))
            else:
                self._records[id(x)] = weakref.ref(x), known
        return known

    def operands(self, args: Args, kwargs: Kwargs) -> list[Operand]:
        """The tensors of a call, those in lists included."""
        values = (*args, *kwargs.values()) if kwargs else args
        if self._is_traced:
            return [(x, self.of(x)) for value in values for x in tensors_of(value)]
        operands, records = [], self._records
        for value in values:
            if isinstance(value, Tensor):
                # As `of`, without a call for each.
                entry = records.get(id(value))
                operands.append((value, entry[1] if entry is not None and entry[0]() is value else _at_first(value)))
            elif isinstance(value, (list, tuple)):
                operands += [(x, self.of(x)) for x in tensors_of(value)]
        return operands

    def _found(self, x: Tensor) -> Known | None:
        if self._is_traced:
            return next((known for other, known in self._traced if other is x), None)
        entry = self._records.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None


def _at_first(x: Tensor) -> Known:
    # By its class first: what else nn.Parameter counts as its own is slow to find.
    return Known((x,), apart=True) if type(x) is not Tensor and isinstance(x, nn.Parameter) else _NOTHING
