"""Which way a call of `layer_grads` or `layer_update_` goes: from what it looks like to a launch, or to torch.

In every step the call is compared with those before it, nothing else: routes are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch_internals import cuda_matmul_precision
from ...updates import RULES
from ..calls import LayerCall
from ..gradient_memory import GradientMemory
from ..known import Known
from ..layout import dense_dtype
from .choice import plan_grouped
from .launch import Picker, check_device, target_of
from .launch_plan import LaunchPlan
from .plan_taps import plan_taps
from .problem import GroupedProblem, TapsProblem, Target
from .source import ErrorLooks, looks_of_error, mask_of, projected_for, reason_for_torch

# Which layers want what travels as bits of an int32; and twice the layers take more than twice as long to compile.
MOST_LAYERS = 31

# So many of a kernel's arguments are read; those behind them are changed.
READ = 5

Planner = Callable[[Any, Target], LaunchPlan]
planners: dict[type, Planner] = {GroupedProblem: plan_grouped, TapsProblem: plan_taps}
"""What makes the plan for each type of problem."""


@contextmanager
def planned_by(planner: Planner, problem: type = GroupedProblem) -> Iterator[None]:
    """Within it, on every thread, launches for problems of this type are what this planner says."""
    before, planners[problem] = planners[problem], planner
    forget_routes()
    try:
        yield
    finally:
        planners[problem] = before
        forget_routes()


class Looks(NamedTuple):
    """All of a call that decides its route; plain values, cheap to hash."""

    error: ErrorLooks
    inputs: tuple[torch.Size, ...]
    saved: tuple[torch.Size, ...]
    noisy: tuple[bool, ...]
    activation_dtypes: frozenset[torch.dtype]
    has_gaps: bool
    """Whether something that is read, but for the error, has gaps in memory."""
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

    def sizes(self) -> list[tuple[int, int, int]]:
        """Rows, inputs and outputs of every layer."""
        outs = [shape[1] for shape in self.saved]
        outs += [self.error.shape[1]] * (len(self.inputs) - len(outs))
        return [(n, width, out) for (n, width), out in zip(self.inputs, outs, strict=True)]


@dataclass(frozen=True)
class Route:
    """What ``plan`` launches; without one the torch backend, for ``reason``."""

    plan: LaunchPlan | None
    reason: str
    memory: GradientMemory
    changed: int
    """How many tensors results go to, their state included."""
    pickers: tuple[Picker, ...]
    """What a kernel's arguments from the error on are made by, of the tensors one after the other: error, inputs,
    saved, dropout masks if there are any, what results go to and its state in the operators' order, what is stored."""
    reads_projection: bool
    """Whether e Uᵀ has to be made first."""
    has_gaps: bool
    """Whether something that is read has to be copied first."""
    is_alone: bool
    """Whether one launch of a kernel that takes nothing but these tensors is all."""
    by_torch: bool
    """Whether torch makes the products, and without a plan δ as well."""


def looks_of(
    call: LayerCall, dtype: torch.dtype | None, rule: str, sets: tuple[int, ...] = (), numbers_in_memory: bool = False
) -> Looks:
    """What the call looks like. Reads no values, so meta tensors do."""
    read = [tensor for tensor in (*call.inputs, *call.saved, *call.dropout_mask) if tensor is not None]
    return Looks(
        looks_of_error(call.error, call.stored, call.feedback),
        tuple([x.shape for x in call.inputs]),
        tuple([h.shape for h in call.saved]),
        tuple([mask is not None for mask in call.dropout_mask]),
        frozenset([tensor.dtype for tensor in read]),
        not all(map(Tensor.is_contiguous, read)),
        tuple(call.activations),
        tuple(call.parameters),
        tuple(call.weight_grads),
        tuple(call.bias_grads),
        dtype,
        rule,
        sets,
        numbers_in_memory,
    )


def route_for(
    call: LayerCall,
    rule: str,
    dtype: torch.dtype | None = None,
    changed: Sequence[Tensor] = (),
    sets: tuple[int, ...] = (),
    numbers_in_memory: bool = False,
) -> Route:
    """The call's route on its device; dtype: of the gradients, for parameters that are ``changed`` say their own."""

    def find() -> Route:
        check_device(call.error.device)
        looks = looks_of(call, dense_dtype(changed) if changed else dtype, rule, sets, numbers_in_memory)
        route = route_of(looks, target_of(call.error.device))
        if changed and len(changed) != route.changed:
            raise ValueError(f"weights, state: got {len(changed)} tensors for {rule!r}, expected {route.changed}")
        return route

    return _known.value(call, changed, (cuda_matmul_precision(), rule, dtype, sets, numbers_in_memory), find)


_known: Known[Route] = Known()


def forget_routes() -> None:
    """Makes the next calls' routes anew."""
    route_of.cache_clear()
    _known.forget()


@lru_cache(maxsize=512)
def route_of(looks: Looks, target: Target) -> Route:
    """The route of every call that looks like this."""
    reason = reason_for_torch(looks.error.dtype, looks.activation_dtypes, looks.dtype)
    shapes: list[tuple[int, ...]] = []
    for (_, width, out), wants_weight, wants_bias in zip(
        looks.sizes(), looks.weight_grads, looks.bias_grads, strict=True
    ):
        shapes += [(out, width)] * wants_weight + [(out,)] * wants_bias
    parameters, of_each = len(shapes), 0 if looks.rule == "store" else len(RULES[looks.rule].state)
    plan = None
    if shapes and not reason:
        plan = planners[GroupedProblem](_problem(looks), target)
    return Route(
        plan,
        reason,
        GradientMemory(shapes),
        parameters + parameters * of_each,
        _pickers(looks, parameters, of_each) if plan else (),
        plan is not None and plan.problem.projected.source == "projection",
        looks.has_gaps,
        plan is not None and plan.name == "strip",
        bool(reason) or (plan is not None and plan.name == "deltas"),
    )


def _pickers(looks: Looks, parameters: int, of_each: int) -> tuple[Picker, ...]:
    """See `Route.pickers`; a kernel's tuple is never empty, and the first input stands in where there is nothing."""
    anything: Any = slice(1, 2)
    lengths = (1, len(looks.weight_grads), len(looks.saved), len(looks.noisy) * any(looks.noisy), parameters)
    inputs, saved, masks, changed, state = accumulate(lengths)
    stored = slice(state + parameters * of_each, None)
    read = (0, stored, *[slice(a, b) if a < b else anything for a, b in pairwise((inputs, saved, masks, changed))])
    slots = _slots(looks.weight_grads, looks.bias_grads)
    results = [_picker([changed + slot for slot in each]) for each in slots]
    of_state = [
        _picker([state + slot * of_each + i for slot in each]) if i < of_each else itemgetter(anything)
        for each in slots
        for i in range(2)
    ]
    return (*map(itemgetter, read), *results, *of_state)


def _picker(slots: Sequence[int]) -> Picker:
    """What takes a tuple out of one."""
    items: list[Any] = [*slots] if len(slots) > 1 else [slice(slots[0], slots[0] + 1)]
    return itemgetter(*items)


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


def _problem(looks: Looks) -> GroupedProblem:
    rows = looks.error.shape[0]
    long, widths_in, widths_out = zip(*looks.sizes(), strict=True)
    positions = [n // rows if rows else 1 for n in long]
    sizes = [t * out for t, out in zip(positions, widths_out, strict=True)][: len(looks.activations)]
    weights, biases = _slots(looks.weight_grads, looks.bias_grads)
    (dtype,) = looks.activation_dtypes
    assert looks.dtype is not None
    return GroupedProblem(
        projected_for(looks.error, max(sizes, default=0), dtype),
        widths_in,
        widths_out,
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
        looks.numbers_in_memory,
    )
