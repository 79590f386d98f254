"""A dictionary with tensors as its keys, by identity."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


class TensorMap(Generic[V]):
    """What is known of tensors; it keeps none of them alive, but for as long as a compiler traces a pass."""

    def __init__(self) -> None:
        # A tensor that is being traced has no id, nor weak references.
        self._is_traced = torch.compiler.is_compiling()
        self._known: dict[int, tuple[Any, V]] = {}
        self._traced: list[tuple[Tensor, V]] = []

    def __len__(self) -> int:
        return len(self._known) + len(self._traced)

    def get(self, key: Any) -> V | None:
        """What is known of ``key``, which may be no tensor at all."""
        if self._is_traced:
            return self._search(key)
        entry = self._known.get(id(key))
        return entry[1] if entry is not None and entry[0]() is key else None

    def _search(self, key: Any) -> V | None:
        if isinstance(key, Tensor):
            for known, value in self._traced:
                if known is key:
                    return value
        return None

    def set(self, key: Tensor, value: V) -> None:
        if self._is_traced:
            self._traced = [(known, v) for known, v in self._traced if known is not key] + [(key, value)]
        else:
            self._known[id(key)] = weakref.ref(key), value

    def discard(self, key: Tensor) -> None:
        if self._is_traced:
            self._traced = [(known, v) for known, v in self._traced if known is not key]
        else:
            self._known.pop(id(key), None)

    def keep(self, wanted: Any) -> None:
        """Forgets the tensors of whose values ``wanted`` is not true."""
        self._known = {number: entry for number, entry in self._known.items() if wanted(entry[1])}
        self._traced = [entry for entry in self._traced if wanted(entry[1])]
