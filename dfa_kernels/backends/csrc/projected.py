"""Where the kernels get e Uᵀ from, and what they leave to the torch backend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch

from .arguments import DTYPES, SOURCES
from .looks import ErrorLooks

OLDEST_FOR_BFLOAT16 = 80


def source_of(looks: ErrorLooks) -> str:
    """Where the kernels get U from; "projection" where the torch backend has to make e Uᵀ first."""
    feedback = looks.feedback
    kind = feedback.row
    if kind.tile == "blocks" or feedback.dtype not in DTYPES or looks.is_elsewhere:
        return "projection"
    if kind.tile in ("signs", "nonzeros"):
        return kind.tile
    return "matrix" if looks.is_stored else kind.name


def projected(looks: ErrorLooks, sizes: Sequence[int], source: str) -> tuple[dict[str, Any], tuple[float, ...]]:
    """What the library is told of the projection from this source, and the factor to e Bᵀ for each size."""
    feedback, (rows, error_size), widest = looks.feedback, looks.shape, max(sizes, default=1)
    if source == "projection":
        scales = tuple([math.sqrt(widest / size) if feedback.normalize else 1.0 for size in sizes])
    else:
        value = float(feedback.row.value(feedback, error_size))
        scales = tuple([value * feedback.scale(size, error_size) for size in sizes])
    numbers = dict(
        source=SOURCES[source],
        error_dtype=DTYPES[looks.dtype],
        stored_dtype=DTYPES.get(feedback.dtype, 0),
        rows=rows,
        error_size=error_size,
        stride_row=looks.strides[0],
        stride_column=looks.strides[1],
        widest=widest,
        nonzeros=feedback.nonzeros_per_row(error_size) if source == "nonzeros" else 0,
        key0=feedback.seed & 0xFFFFFFFF,
        key1=feedback.seed >> 32,
    )
    return numbers, scales


def reason_for_torch(
    error: torch.dtype, activations: Set[torch.dtype], parameters: torch.dtype | None, capability: int
) -> str:
    """Why the torch backend has to compute with these dtypes; empty if it has not."""
    if parameters is None:
        return "the parameters and their state differ in dtype or have gaps in memory"
    if lacking := {error, parameters, *activations} - set(DTYPES):
        return f"the kernels compute in {_names(DTYPES)}, not in {_names(lacking)}"
    if len(activations) > 1:
        return f"the layers' activations differ in dtype: {_names(activations)}"
    if torch.bfloat16 in activations and capability < OLDEST_FOR_BFLOAT16:
        return f"sm_{capability} has no products of bfloat16"
    return ""


def too_large(*counts: int) -> str:
    """Why the library's 32-bit counts are not enough; empty if they are. Offsets in memory have 64 bits."""
    return f"{max(counts)} rows or units are more than the kernels count" if max(counts) >= 2**31 else ""


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
