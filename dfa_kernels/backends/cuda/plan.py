"""Which launches a call takes: from what it looks like to the library's arguments, complete but for the addresses.

Plans are saved: in every step the looks are read and compared, nothing else.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ...feedback.spec import FeedbackSpec
from ..csrc.arguments import (
    ACTIVATIONS,
    DTYPES,
    POINTERS,
    SHARED_POINTERS,
    TASKS,
    Arguments,
    arguments_of,
)
from ..csrc.looks import Looks, TapsLooks
from ..csrc.projected import projected, reason_for_torch, source_of, too_large
from ..csrc.told import NO_GRADIENTS, Gradients, gradients_of, sizes_of, tensors_of, told
from ..gradient_memory import GradientMemory
from .library import library

LARGEST_STRIP_ERROR = 64
"""Components of the error up to which every strip makes P anew. Estimated, not measured."""
LEAST_RESIDENT, MOST_RESIDENT = 2, 3
"""Strips on a multiprocessor at once: one alone would have nothing to do while it waits for memory, and for more there
are no registers. Estimated, not measured."""
STRIP, WIDE, UNITS, DELTA_ROWS = 64, 128, 64, 64
"""Sides of the tiles of `csrc/`: of gradients, by strips and by grouped products, and of P."""
ALIGNMENT = 16
"""Bytes to whose multiples every layer's δ is aligned in the workspace."""


class Target(NamedTuple):
    """The GPU a plan is for."""

    capability: int
    multiprocessors: int
    shared: int
    """Bytes of shared memory that a multiprocessor has."""

    def resident(self, size: int) -> int:
        """How many programs that take so many bytes a multiprocessor has room for. The driver takes some as well."""
        return self.shared // (size + (1024 if self.capability >= 80 else 0))


@dataclass(frozen=True)
class Plan:
    """What a call of the library takes, but for the addresses; without arguments the torch backend, for a reason."""

    arguments: Arguments | None = None
    reason: str = ""
    task: str = ""
    why: str = ""
    feedback: FeedbackSpec = field(default_factory=FeedbackSpec)
    source: str = ""
    dtype: torch.dtype = torch.float32
    """Of the activations."""
    widest: int = 0
    """Units of the widest tap: rows of U that are needed."""
    gradients: Gradients = NO_GRADIENTS
    delta_offsets: tuple[int, ...] = ()
    """Bytes before each layer's δ in the workspace of delta_numbers, if there is one."""
    delta_numbers: int = 0
    sums: int = 0
    """float32 numbers for sums of δ over tiles of rows."""
    order: Any = None
    """Of the addresses of all tensors, as the operator lists them: those that the arguments begin with."""
    pack: Any = None
    """Writes these into the arguments."""

    @cached_property
    def memory(self) -> GradientMemory:
        """What the gradients are made from."""
        return GradientMemory(self.gradients.shapes)


@lru_cache(maxsize=512)
def plan_layers(looks: Looks, target: Target) -> Plan:
    """The plan of every call that looks like this."""
    gradients, source = gradients_of(looks), source_of(looks.error)
    plan = Plan(gradients=gradients, feedback=looks.error.feedback, source=source)
    if reason := _why_torch(looks, target.capability):
        return replace(plan, reason=reason)
    if not gradients.shapes:
        return plan
    numbers, layers, dtype, widest = told(looks, gradients, source)
    plan = replace(plan, dtype=dtype, widest=widest)
    why_wide = _why_wide(plan, arguments_of(numbers, layers), target)
    plan = _wide(plan, numbers, layers, why_wide) if why_wide else _strips(plan, numbers, layers, target)
    names = tensors_of(looks, gradients) + [("delta", i) for i in range(len(layers)) if plan.delta_offsets]
    return _addressed(plan, SHARED_POINTERS, names)


def _why_torch(looks: Looks, capability: int) -> str:
    """Why the torch backend has to compute this; empty if it has not."""
    sizes = sizes_of(looks)
    return reason_for_torch(looks.error.dtype, looks.dtypes, looks.dtype, capability) or too_large(
        *[rows * t for rows, t, _, _ in sizes], *[width for _, _, width, _ in sizes], sum(t * m for _, t, _, m in sizes)
    )


def _why_wide(plan: Plan, arguments: Arguments, target: Target) -> str:
    """Why this cannot or should not be done by strips; empty if it should."""
    size = library().strip_bytes(ctypes.byref(arguments))
    if target.resident(size) < LEAST_RESIDENT:
        return f"two programs with δ of the whole batch, {size} bytes each, do not fit into {target.shared}"
    if arguments.hidden and plan.source != "projection" and arguments.error_size > LARGEST_STRIP_ERROR:
        return f"products with {arguments.error_size} error components would be made anew in every strip"
    return ""


def _strips(plan: Plan, numbers: dict[str, Any], layers: list[dict[str, Any]], target: Target) -> Plan:
    """No more programs than the GPU holds at once, if that can be; each has a run of tiles, as short as that allows."""
    size = library().strip_bytes(ctypes.byref(arguments_of(numbers, layers)))
    most = target.multiprocessors * min(MOST_RESIDENT, target.resident(size))
    tiles = _tiles(plan, layers, STRIP)
    run = 1
    while sum(m * _runs(n, run) for m, n in tiles) > most and run < max(n for _, n in tiles):
        run += 1
    chunks = [_runs(n, run) for _, n in tiles]
    made = _finished(plan, "strip", numbers, layers, tiles, chunks)
    return replace(made, why=f"δ of the whole batch fits beside a tile; {run} of these to a program")


def _wide(plan: Plan, numbers: dict[str, Any], layers: list[dict[str, Any]], why: str) -> Plan:
    """A program for each tile; δ of all layers in a workspace, and its sums if there are biases."""
    rows, itemsize = numbers["rows"], plan.dtype.itemsize
    each = ALIGNMENT // itemsize
    spans = [-(-rows * layer["positions"] * layer["width_out"] // each) * each for layer in layers]
    *offsets, total = accumulate(spans, initial=0)
    *firsts, sums = accumulate([layer["positions"] * layer["width_out"] for layer in layers], initial=0)
    for layer, first in zip(layers, firsts, strict=True):
        layer["first_sum"] = first
    tiles = _tiles(plan, layers, WIDE)
    made = _finished(plan, "wide", numbers, layers, tiles, [max(1, n) for _, n in tiles])
    row_tiles = -(-rows // DELTA_ROWS)
    return replace(
        made,
        why=why,
        delta_offsets=tuple([at * itemsize for at in offsets]),
        delta_numbers=total,
        sums=row_tiles * sums,
    )


def _tiles(plan: Plan, layers: list[dict[str, Any]], side: int) -> list[tuple[int, int]]:
    """Tiles along each layer's outputs, none if no gradient of it is wanted, and along its inputs, none for a bias."""
    found = []
    for layer, weight, bias in zip(layers, plan.gradients.weights, plan.gradients.biases, strict=True):
        wanted = weight >= 0 or bias >= 0
        down, across = -(-layer["width_out"] // side), -(-layer["width_in"] // side)
        found.append((down if wanted else 0, across if weight >= 0 else 0))
    return found


def _runs(tiles: int, run: int) -> int:
    return max(1, -(-tiles // run))


def _finished(
    plan: Plan, task: str, numbers: dict[str, Any], layers: list[dict[str, Any]], tiles: list[tuple[int, int]],
    chunks: list[int],
) -> Plan:  # fmt: skip
    *firsts, programs = accumulate([m * chunk for (m, _), chunk in zip(tiles, chunks, strict=True)], initial=0)
    for layer, first, chunk in zip(layers, firsts, chunks, strict=True):
        layer |= dict(first_program=first, chunks=chunk)
    return replace(plan, task=task, arguments=arguments_of(numbers | dict(task=TASKS[task], programs=programs), layers))


@lru_cache(maxsize=512)
def plan_taps(looks: TapsLooks, target: Target) -> Plan:
    """The plan of every call that looks like this, of at most MOST_LAYERS taps."""
    dtype = next(iter(looks.dtypes), looks.error.dtype)
    if reason := reason_for_torch(looks.error.dtype, looks.dtypes, looks.error.dtype, target.capability):
        return Plan(reason=reason)
    if reason := too_large(looks.error.shape[0], *looks.sizes):
        return Plan(reason=reason)
    source = source_of(looks.error)
    numbers, scales = projected(looks.error, looks.sizes, source)
    layers: list[dict[str, Any]] = [
        dict(width_in=0, width_out=size, positions=1, channels=channels, channels_last=last)
        for size, channels, last in zip(looks.sizes, looks.channels, looks.channels_last, strict=True)
    ]
    for i, (name, scale) in enumerate(zip(looks.activations, scales, strict=True)):
        p, q = looks.parameters[2 * i : 2 * i + 2]
        layers[i] |= dict(activation=ACTIVATIONS[name], scale=scale, p=p, q=q)
    numbers |= dict(task=TASKS["taps"], hidden=len(layers), dtype=DTYPES[dtype])
    why = f"a tile of the projection serves all {len(layers)} taps" if len(layers) > 1 else "a tile of the projection"
    plan = Plan(
        arguments_of(numbers, layers),
        task="taps",
        why=why,
        feedback=looks.error.feedback,
        source=source,
        dtype=dtype,
        widest=max(looks.sizes),
    )
    names = [("saved", i) for i, there in enumerate(looks.has_saved) if there]
    names += [("mask", i) for i, there in enumerate(looks.masks) if there]
    names += [("delta", i) for i in range(len(layers))]
    return _addressed(plan, ["error", "stored"], names)


def _addressed(plan: Plan, shared: Sequence[str], names: Sequence[tuple[str, int]]) -> Plan:
    """The plan for addresses that come as a 0, those of `shared`, then those of `names`; 0 is that of what is not."""
    assert plan.arguments is not None
    at = {name: 1 + i for i, name in enumerate((*shared, *names))}
    wanted: list[Any] = [*SHARED_POINTERS, *[(name, i) for i in range(plan.arguments.layers) for name in POINTERS]]
    order = itemgetter(*[at.get(name, 0) for name in wanted])
    return replace(plan, order=order, pack=struct.Struct(f"{len(wanted)}Q").pack_into)
