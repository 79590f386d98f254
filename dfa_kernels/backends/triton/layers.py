"""`layer_grads` and `layer_update_`: all fused linear layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...updates import RULES
from .. import torch_backend
from ..calls import LayerCall, encoded
from .launch import Arguments, check_device, counters, launch, target_of
from .plan import LaunchPlan
from .route import MOST_LAYERS, Route, looks_of, route_of, split
from .source import dense, projection_tensors


def layer_grads(call: LayerCall, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of every fused linear layer; see `Backend.layer_grads`."""
    if torch.compiler.is_compiling():
        grads: list[Tensor] = torch.ops.dfa_kernels.layer_grads(*encoded(call), dtype)
        return grads
    device = call.error.device
    check_device(device)
    if len(call.inputs) > MOST_LAYERS:
        return [gradient for part in split(call) for gradient in layer_grads(part, dtype)]
    route = route_of(looks_of(call, dtype, "store"), target_of(device))
    if route.reason:
        return torch_backend.layer_grads(call, dtype)
    gradients = [torch.empty(shape, dtype=dtype, device=device) for shape in route.shapes]
    _launch(route, call, gradients, (), (0.0,))
    return gradients


def layer_update_(
    call: LayerCall, weights: Sequence[Tensor], state: Sequence[Tensor], rule: str, hyper: Sequence[float]
) -> None:
    """Gradients and the optimizer's update in one launch; see `Backend.layer_update_`.

    Nothing that the gradients are computed from may share memory with weights or state, nor these with each other.
    """
    if not weights:
        return
    check_device(call.error.device)
    if len(call.inputs) > MOST_LAYERS:
        _update_in_parts(call, weights, state, rule, hyper)
        return
    changed = [*weights, *state]
    kernel_rule = (state and RULES[rule].with_state) or rule
    numbers, sets = _numbers_and_sets(kernel_rule, hyper, len(weights))
    route = route_of(looks_of(call, _dtype_in_place(changed), kernel_rule, sets), target_of(call.error.device))
    if route.reason:
        torch_backend.layer_update_(call, weights, state, rule, hyper)
        return
    _launch(route, call, weights, state, numbers)
    torch.autograd.graph.increment_version(changed)


def _update_in_parts(
    call: LayerCall, weights: Sequence[Tensor], state: Sequence[Tensor], rule: str, hyper: Sequence[float]
) -> None:
    first, each, numbers = 0, len(state) // len(weights), len(hyper) // len(weights)
    for part in split(call):
        end = first + sum(part.weight_grads) + sum(part.bias_grads)
        own_state, own_hyper = state[first * each : end * each], hyper[first * numbers : end * numbers]
        layer_update_(part, weights[first:end], own_state, rule, own_hyper)
        first = end


def _launch(
    route: Route, call: LayerCall, destinations: Sequence[Tensor], state: Sequence[Tensor], numbers: tuple[float, ...]
) -> None:
    """destinations: of the gradients, in the operators' order; state: an equal number of tensors for each of them."""
    plan = route.plan
    if plan is None:
        return
    error, stored = projection_tensors(plan.problem.projected, call.error, call.stored, plan.problem.widest)
    xs = [_for_tma(x) for x in call.inputs] if plan.uses_tma else call.inputs
    inputs, kept = tuple([dense(x) for x in xs]), tuple([dense(h) for h in call.kept])
    # A kernel's tuple is never empty: any tensor stands in where there is none.
    anything = (inputs[0],)
    noise = tuple([inputs[0] if mask is None else dense(mask) for mask in call.noise])
    tensors: Arguments = (error, stored, inputs, kept or anything, noise if plan.problem.noise else anything)
    if plan.counters:
        sums = torch.empty(plan.sums, dtype=torch.float32, device=error.device)
        tensors = (counters(plan.counters, error.device), *tensors, _rooms_for_deltas(plan, error, inputs, kept), sums)
    results = [tuple([destinations[i] for i in places]) for places in (route.weights, route.biases)]
    each = len(state) // len(destinations)
    for places in (route.weights, route.biases):
        for which in range(2):
            results.append(tuple([state[i * each + which] for i in places]) if which < each else anything)
    launch(plan, error.device, (*tensors, *results), (numbers,))


def _for_tma(x: Tensor) -> Tensor:
    """x, or a copy where memory that TMA can read from begins."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _rooms_for_deltas(
    plan: LaunchPlan, error: Tensor, inputs: tuple[Tensor, ...], kept: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Memory for δ of every layer; the output layer's is the error itself, or room for a copy."""
    rooms = tuple([torch.empty_like(h) for h in kept])
    if len(inputs) == len(kept):
        return rooms
    return (*rooms, inputs[0].new_empty((error.shape[0], plan.copy_width)) if plan.copy_width else error)


def _dtype_in_place(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The one dtype of what is updated in place; None if there are several, or gaps in memory."""
    dtype = tensors[0].dtype
    return dtype if all([t.dtype is dtype and t.is_contiguous() for t in tensors]) else None


def _numbers_and_sets(rule: str, hyper: Sequence[float], parameters: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The numbers for the kernel's epilogue, and where in them each parameter's set begins."""
    # Floats all of them: a launch is compiled for the types of its numbers.
    each, hyper, numbers_of = len(hyper) // parameters, list(map(float, hyper)), RULES[rule].tile_numbers
    if hyper == hyper[:each] * parameters:
        return numbers_of(*hyper[:each]), ()
    places: dict[tuple[float, ...], int] = {}
    sets = []
    for first in range(0, len(hyper), each):
        numbers = numbers_of(*hyper[first : first + each])
        sets.append(places.setdefault(numbers, len(places) * len(numbers)))
    return tuple([number for numbers in places for number in numbers]), tuple(sets)
