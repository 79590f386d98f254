"""Which way a call of `layer_grads` or `layer_update_` goes: from what it looks like to a launch, or to torch.

In every step the looks are read and compared, nothing else: routes are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ..calls import LayerCall
from .choice import plan_grouped
from .launch_plan import LaunchPlan
from .plan_taps import plan_taps
from .problem import GroupedProblem, TapsProblem, Target
from .source import ErrorLooks, looks_of_error, mask_of, projected_for, reason_for_torch

# Which layers want what travels as bits of an int32; and twice the layers take more than twice as long to compile.
MOST_LAYERS = 31

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


def split(call: LayerCall) -> Iterator[LayerCall]:
    """The call in parts of at most MOST_LAYERS layers, in their order; the last one has the output layer."""
    for first in range(0, len(call.inputs), MOST_LAYERS):
        here = slice(first, first + MOST_LAYERS)
        yield call._replace(
            inputs=call.inputs[here],
            saved=call.saved[here],
            dropout_mask=call.dropout_mask[here],
            activations=call.activations[here],
            parameters=call.parameters[2 * first : 2 * here.stop],
            weight_grads=call.weight_grads[here],
            bias_grads=call.bias_grads[here],
        )


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
    shapes: tuple[tuple[int, ...], ...]
    """Of the gradients, in the order of the operators."""
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    """Which of them belongs to each layer; the first stands in where a layer wants none."""


def looks_of(
    call: LayerCall, dtype: torch.dtype | None, rule: str, sets: tuple[int, ...] = (), numbers_in_memory: bool = False
) -> Looks:
    """What the call looks like. Reads no values, so meta tensors do."""
    dropout_mask = [mask for mask in call.dropout_mask if mask is not None]
    return Looks(
        looks_of_error(call.error, call.stored, call.feedback),
        tuple([x.shape for x in call.inputs]),
        tuple([h.shape for h in call.saved]),
        tuple([mask is not None for mask in call.dropout_mask]),
        frozenset([tensor.dtype for tensor in (*call.inputs, *call.saved, *dropout_mask)]),
        tuple(call.activations),
        tuple(call.parameters),
        tuple(call.weight_grads),
        tuple(call.bias_grads),
        dtype,
        rule,
        sets,
        numbers_in_memory,
    )


@lru_cache(maxsize=512)
def route_of(looks: Looks, target: Target) -> Route:
    """The route of every call that looks like this."""
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
    return Route(plan, reason, tuple(shapes), weights, biases)


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
