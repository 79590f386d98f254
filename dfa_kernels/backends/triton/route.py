"""Which way a call of `layer_grads` or `layer_update_` goes: from what it looks like to a launch, or to torch.

In every step the looks are read and compared, nothing else: routes are saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import LayerCall
from .choice import plan_grouped
from .launch import target_of
from .launch_plan import LaunchPlan
from .plan_taps import plan_taps
from .problem import GroupedProblem, TapsProblem, Target
from .source import ErrorLooks, mask_of, projected_for, reason_for_torch, unnamed_looks

# Which layers want what travels as bits of an int32; and twice the layers take more than twice as long to compile.
MOST_LAYERS = 31

Picker = Callable[[Sequence[Any]], tuple[Any, ...]]
Planner = Callable[[Any, Target], LaunchPlan]
planners: dict[type, Planner] = {GroupedProblem: plan_grouped, TapsProblem: plan_taps}
"""What makes the plan for each type of problem."""


@contextmanager
def planned_by(planner: Planner, problem: type = GroupedProblem) -> Iterator[None]:
    """Within it, on every thread, launches for problems of this type are what this planner says."""
    before, planners[problem] = planners[problem], planner
    route_of.cache_clear()
    try:
        yield
    finally:
        planners[problem] = before
        route_of.cache_clear()


class Looks(NamedTuple):
    """All of a call that decides its route; plain values, cheap to hash."""

    error: ErrorLooks
    inputs: tuple[torch.Size, ...]
    saved: tuple[torch.Size, ...]
    noisy: tuple[bool, ...]
    activation_dtypes: frozenset[torch.dtype]
    activations: tuple[str, ...]
    parameters: tuple[float, ...]
    weight_grads: tuple[bool, ...]
    bias_grads: tuple[bool, ...]
    dtype: torch.dtype | None
    """Of the parameters; None if they differ in it or have gaps in memory."""
    rule: str
    sets: tuple[int, ...]
    """Where each parameter's numbers for the rule begin; empty if all share one set."""
    numbers_in_memory: bool


@dataclass(frozen=True)
class Route:
    """What ``plan`` launches; without one the torch backend, for ``reason``."""

    plan: LaunchPlan | None
    reason: str
    gradients: int
    blocks: tuple[Block, ...]
    weights: Picker
    biases: Picker
    """From a list in the order of the operators, each layer's; the first stands in where a layer wants none."""
    reads_projection: bool
    """Whether e Uᵀ has to be made first."""
    _templates: dict[tuple[torch.device, torch.dtype], list[tuple[int | slice, Tensor]]] = field(default_factory=dict)

    def allocate(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Memory for the gradients, in the order of the operators."""
        templates = self._templates.get((device, dtype))
        if templates is None:
            templates = self._templates[device, dtype] = [(b.slots, _template(b, device, dtype)) for b in self.blocks]
        found: list[Any] = [None] * self.gradients
        for slots, template in templates:
            block = torch.empty_like(template)
            found[slots] = block if type(slots) is int else block.unbind()
        return found


class Block(NamedTuple):
    """Gradients of one shape in one piece of memory, so that the allocator is asked once for all of them."""

    shape: tuple[int, ...]
    """Their number first, if it is not a single one, for which ``slots`` is an int."""
    slots: int | slice
    """Where they stand in the order of the operators."""


def _template(block: Block, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One number that seems to be as many: what a new tensor is to be like takes less time to say by it."""
    return torch.zeros((), dtype=dtype, device=device).expand(block.shape)


def looks_of(
    call: LayerCall, dtype: torch.dtype | None, rule: str, sets: tuple[int, ...] = (), numbers_in_memory: bool = False
) -> Looks:
    """What the call looks like. Reads no values, so meta tensors do."""
    return _named(_unnamed(call, dtype, rule, sets, numbers_in_memory))


def route_for(
    call: LayerCall, dtype: torch.dtype | None, rule: str, sets: tuple[int, ...] = (), numbers_in_memory: bool = False
) -> Route:
    """The call's route on its device."""
    return route_of(_unnamed(call, dtype, rule, sets, numbers_in_memory), target_of(call.error.device))


def _unnamed(
    call: LayerCall, dtype: torch.dtype | None, rule: str, sets: tuple[int, ...], numbers_in_memory: bool
) -> tuple[Any, ...]:
    """As `looks_of`, plain tuples: they are equal, and made in each step."""
    error, stored, feedback, inputs, saved, dropout_mask, activations, parameters, weight_grads, bias_grads = call
    dtypes = {tensor.dtype for tensor in (*inputs, *saved)}
    noisy = [mask is not None for mask in dropout_mask]
    if True in noisy:
        dtypes |= {mask.dtype for mask in dropout_mask if mask is not None}
    return (
        unnamed_looks(error, stored, feedback),
        tuple([x.shape for x in inputs]),
        tuple([h.shape for h in saved]),
        tuple(noisy),
        frozenset(dtypes),
        tuple(activations),
        tuple(parameters),
        tuple(weight_grads),
        tuple(bias_grads),
        dtype,
        rule,
        sets,
        numbers_in_memory,
    )


def _named(looks: tuple[Any, ...]) -> Looks:
    error, *others = looks
    return Looks(ErrorLooks(*error), *others)


@lru_cache(maxsize=512)
def route_of(unnamed: tuple[Any, ...], target: Target) -> Route:
    """The route of every call that looks like this."""
    looks = _named(unnamed)
    widths_out = [shape[1] for shape in looks.saved]
    widths_out += [looks.error.shape[1]] * (len(looks.inputs) - len(looks.saved))
    shapes: list[tuple[int, ...]] = []
    for x, out, wants_weight, wants_bias in zip(
        looks.inputs, widths_out, looks.weight_grads, looks.bias_grads, strict=True
    ):
        shapes += [(out, x[1])] * wants_weight + [(out,)] * wants_bias
    weights, biases = _slots(looks.weight_grads, looks.bias_grads)
    reason = reason_for_torch(looks.error.dtype, looks.activation_dtypes, looks.dtype)
    plan = None
    if shapes and not reason:
        plan = planners[GroupedProblem](_problem(looks, widths_out, weights, biases), target)
    reads_projection = plan is not None and plan.problem.projected.source == "projection"
    blocks = _blocks(shapes, looks.dtype)
    return Route(plan, reason, len(shapes), blocks, _picker(weights), _picker(biases), reads_projection)


def _blocks(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype | None) -> tuple[Block, ...]:
    """Each gradient begins at a multiple of 16 bytes, or has a block for itself."""
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        of_shape.setdefault(shape, []).append(i)
    blocks = []
    for shape, slots in of_shape.items():
        step = slots[-1] - slots[-2] if len(slots) > 1 else 1
        evenly = slots == list(range(slots[0], slots[-1] + 1, step))
        if len(slots) > 1 and evenly and dtype is not None and math.prod(shape) * dtype.itemsize % 16 == 0:
            blocks.append(Block((len(slots), *shape), slice(slots[0], slots[-1] + 1, step)))
        else:
            blocks += [Block(shape, slot) for slot in slots]
    return tuple(blocks)


def _picker(slots: Sequence[int]) -> Picker:
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda values: tuple([values[slot] for slot in slots])


def _slots(weight_grads: Sequence[bool], bias_grads: Sequence[bool]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where each layer's weight and bias stand in the order of the operators; 0 if they do not."""
    counts = [sum(pair) for pair in zip(weight_grads, bias_grads, strict=True)]
    firsts = list(accumulate(counts, initial=0))[:-1]
    weights = [first * wanted for first, wanted in zip(firsts, weight_grads, strict=True)]
    biases = [
        (first + has_weight) * wanted
        for first, has_weight, wanted in zip(firsts, weight_grads, bias_grads, strict=True)
    ]
    return tuple(weights), tuple(biases)


def _problem(
    looks: Looks, widths_out: Sequence[int], weights: tuple[int, ...], biases: tuple[int, ...]
) -> GroupedProblem:
    rows = looks.error.shape[0]
    positions = [x[0] // rows if rows else 1 for x in looks.inputs]
    sizes = [t * out for t, out in zip(positions, widths_out, strict=True)][: len(looks.saved)]
    (dtype,) = looks.activation_dtypes
    assert looks.dtype is not None
    return GroupedProblem(
        projected_for(looks.error, max(sizes, default=0), dtype),
        tuple([x[1] for x in looks.inputs]),
        tuple(widths_out),
        tuple(positions),
        looks.activations,
        tuple([float(number) for number in looks.parameters]),
        mask_of(looks.noisy),
        mask_of(looks.weight_grads),
        mask_of(looks.bias_grads),
        looks.dtype,
        looks.rule,
        tuple([looks.sets[i] if looks.sets else 0 for i in weights]),
        tuple([looks.sets[i] if looks.sets else 0 for i in biases]),
    )
