"""What a call of the CPU's library takes, but for the addresses; or why the torch backend computes it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cuda.arguments import MOST_LAYERS, POINTERS, SHARED_POINTERS, arguments_of
from ..cuda.looks import Looks
from ..cuda.plan import Plan, layer_addresses, layers_told
from .library import library

MOST_PRODUCTS = 2**19
"""Multiplications and additions for each layer beyond which torch's products, which know more of a processor, are worth
their calls. Measured, with vectors of 8 numbers: see bench/NOTES.md."""
MOST_STORED = 2**13
"""Entries of a stored U from which on torch makes e Uᵀ: products with it are faster than U is turned, or made anew from
its seed as here packed signs and non-zeros are. Measured."""
HALF_TOO = 80
"""No dtype is left out for lack of this much compute capability: which ones are says the plan."""


@dataclass(frozen=True)
class SmallPlan:
    """A call of the library; without one the torch backend, for ``reason``."""

    reason: str = ""
    run: Callable[[bytes], None] = lambda addresses: None
    """Takes the addresses as `pack` packs them, in the operator's order."""
    pack: Callable[..., bytes] = struct.pack
    gradients: tuple[Tensor, ...] = ()
    """What each of them is to be like."""
    reads_projection: bool = False
    """Whether the torch backend makes e Uᵀ first."""
    widest: int = 0
    """Units of the widest tap."""
    has_gaps: bool = False
    """Whether something that is read, but for the error, has to be copied first."""


@lru_cache(maxsize=512)
def small_plan(looks: Looks) -> SmallPlan:
    """The plan of every call that looks like this, if there are no gaps in what it reads."""
    if len(looks.inputs) > MOST_LAYERS:
        return SmallPlan(f"{len(looks.inputs)} layers are more than the {MOST_LAYERS} of a call")
    told = layers_told(looks, HALF_TOO)
    if isinstance(told, Plan):
        return SmallPlan(told.reason or "no gradient is wanted")
    plan, numbers, layers = told
    if looks.error.is_stored and plan.widest * numbers["error_size"] > MOST_STORED and plan.source != "projection":
        plan, numbers, layers = layers_told(looks, HALF_TOO, "projection")  # type: ignore[misc]
    if lacking := {looks.dtype, looks.error.dtype, plan.dtype} - {torch.float32}:
        return SmallPlan(f"it computes in float32, not in {', '.join(sorted(map(str, lacking)))}")
    if (products := _products(plan, numbers, layers)) > (most := MOST_PRODUCTS * len(layers)):
        return SmallPlan(f"{products} products, more than {most}, are worth calls of their own")
    places = _places(plan, looks.rule, len(layers))
    # A number that seems to be as many: what a new tensor is to be like takes no memory.
    number = torch.zeros((), dtype=torch.float32, device="cpu")
    return SmallPlan(
        run=library().bound(arguments_of(numbers, layers), (ctypes.c_int * len(places))(*places)),
        pack=struct.Struct(f"{len(places)}Q").pack,
        gradients=tuple([number.expand(shape) for shape in plan.shapes]),
        reads_projection=plan.source == "projection" and plan.widest > 0,
        widest=plan.widest,
    )


def _products(plan: Plan, numbers: dict[str, Any], layers: list[dict[str, Any]]) -> int:
    """Multiplications and additions for the gradients, and for e Uᵀ where the library makes it."""
    projection = 0 if plan.source == "projection" else plan.widest * numbers["error_size"]
    each = [
        layer["positions"] * layer["width_out"] * (layer["width_in"] if weight >= 0 else 1)
        for layer, weight in zip(layers, plan.weights, strict=True)
    ]
    return int(numbers["rows"] * (sum(each) + projection))


def _places(plan: Plan, rule: str, layers: int) -> list[int]:
    """Which pointer of the arguments each address is."""
    shared, names = layer_addresses(plan, rule)
    wanted: list[Any] = [*SHARED_POINTERS, *[(name, i) for i in range(layers) for name in POINTERS]]
    return [wanted.index(name) for name in (*shared, *names)]
