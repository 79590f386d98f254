"""What feedback costs in memory, by the way it is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from . import Feedback
from .kinds import FEEDBACK_KINDS
from .spec import check_integer


def feedback_memory(model_or_sizes: Any, error_size: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes that feedback keeps between steps, for layers of these sizes (units) and an error of error_size
    components.

    model_or_sizes: the units of each hidden layer, or a wrapped model after one forward pass (its taps' sizes
    are used; nothing is allocated, so the meta device will do). dtype: of the unpacked matrices.
    Keys: naive (a matrix per layer), unified (one for the largest layer), rademacher (its sign bits), sparse
    (ceil(sqrt(E)) entries a row), fastfood (its diagonals), procedural (the seed only: 0).
    """
    sizes = _sizes(model_or_sizes)
    unified = Feedback(dtype=dtype).nbytes(max(sizes), error_size)
    naive = sum(Feedback(dtype=dtype).nbytes(size, error_size) for size in sizes)
    kinds = [name for name, kind in FEEDBACK_KINDS.items() if kind.stored_source != "matrix"]
    packed = {kind: Feedback(kind, dtype=dtype).nbytes(max(sizes), error_size) for kind in kinds}
    procedural = Feedback(storage="procedural", dtype=dtype).nbytes(max(sizes), error_size)
    return {"naive": naive, "unified": unified, **packed, "procedural": procedural}


def _sizes(model_or_sizes: Any) -> list[int]:
    taps = getattr(model_or_sizes, "taps", None)
    if taps is None and (isinstance(model_or_sizes, torch.nn.Module) or not isinstance(model_or_sizes, Iterable)):
        got = type(model_or_sizes).__name__
        raise TypeError(f"model_or_sizes must be a model wrapped by DFA or an iterable of layer sizes, got {got}")
    sizes = [check_integer("size", size, 1) for size in model_or_sizes] if taps is None else [tap.size for tap in taps]
    if not sizes:
        raise ValueError("model_or_sizes has no layer sizes; a wrapped model knows them after one forward pass")
    return sizes
