"""What a call of the CPU's library takes, but for the addresses; or why the torch backend computes it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..csrc.arguments import MOST_LAYERS, POINTERS, SHARED_POINTERS, arguments_of
from ..csrc.looks import Looks
from ..csrc.projected import source_of
from ..csrc.told import Gradients, Told, gradients_of, tensors_of, told, units_of
from .library import library

MOST_PRODUCTS = 2**19
"""Multiplications and additions for each layer beyond which torch's products, which know more of a processor, are worth
their calls. Measured on one thread, with vectors of 8 numbers: see bench/NOTES.md."""
MOST_STORED, MOST_MADE = 2**13, 2**16
"""Entries of a stored U, and of one of signs or non-zeros that is made anew, from which on torch makes e Uᵀ: with a
stored U by products that are faster than U is turned here, of the other two it makes many at once. Measured."""


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
    if reason := _why_torch(looks):
        return SmallPlan(reason)
    gradients, source = gradients_of(looks), _source_of(looks)
    call = told(looks, gradients, source)
    if (products := _products(call, gradients, source)) > (most := MOST_PRODUCTS * len(call.layers)):
        return SmallPlan(f"{products} products, more than {most}, are worth calls of their own")
    places = _places(tensors_of(looks, gradients), len(call.layers))
    return SmallPlan(
        run=library().bound(arguments_of(call.numbers, call.layers), (ctypes.c_int * len(places))(*places)),
        pack=struct.Struct(f"{len(places)}Q").pack,
        gradients=tuple([_like(shape) for shape in gradients.shapes]),
        reads_projection=source == "projection" and call.widest > 0,
        widest=call.widest,
    )


def _why_torch(looks: Looks) -> str:
    """Why the torch backend has to compute this, however small it is; empty if it has not."""
    if lacking := {looks.error.dtype, looks.dtype, *looks.dtypes} - {torch.float32}:
        return f"the library computes in float32 without gaps, not in {', '.join(sorted(map(str, lacking)))}"
    if len(looks.inputs) > MOST_LAYERS:
        return f"{len(looks.inputs)} layers are more than the {MOST_LAYERS} of a call"
    return "" if any(looks.weight_grads + looks.bias_grads) else "no gradient is wanted"


def _source_of(looks: Looks) -> str:
    """Where the library gets U from; "projection" where the torch backend has to make e Uᵀ, or had better."""
    source = source_of(looks.error)
    entries = looks.error.shape[1] * max(units_of(looks), default=0)
    if looks.error.is_stored:
        return source if entries <= MOST_STORED else "projection"
    return "projection" if source in ("signs", "nonzeros") and entries > MOST_MADE else source


def _like(shape: tuple[int, ...]) -> Tensor:
    """What a new tensor of this shape is to be like: one number that seems to be as many, if that has their strides."""
    number = torch.zeros((), dtype=torch.float32, device="cpu")
    return number.expand(shape) if min(shape) > 1 else number.new_zeros(shape)


def _products(call: Told, gradients: Gradients, source: str) -> int:
    """Multiplications and additions for the gradients, and for e Uᵀ where the library makes it."""
    projection = 0 if source == "projection" else call.widest * call.numbers["error_size"]
    each = [
        layer["positions"] * layer["width_out"] * (layer["width_in"] if weight >= 0 else 1)
        for layer, weight in zip(call.layers, gradients.weights, strict=True)
    ]
    return int(call.numbers["rows"] * (sum(each) + projection))


def _places(names: Sequence[tuple[str, int]], layers: int) -> list[int]:
    """Which pointer of the arguments each address is: those of all layers, then these."""
    pointers: list[Any] = [*SHARED_POINTERS, *[(name, i) for i in range(layers) for name in POINTERS]]
    return [pointers.index(name) for name in (*SHARED_POINTERS, *names)]
