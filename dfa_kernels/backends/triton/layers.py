"""`layer_grads` and `layer_update_`: all fused linear layers in one launch; shapes as in the torch backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...feedback_spec import FeedbackSpec
from .. import torch_backend
from .epilogue import NUMBERS
from .launch import Arguments, check_device, counters, launch, target_of
from .plan import GroupedProblem, LaunchPlan, Target, plan_grouped
from .source import dense, describe_projection, mask_of, projection_tensors, reason_for_torch

Sets = tuple[int, ...]


@dataclass(slots=True)
class LayerCall:
    """The arguments that the two operators share."""

    error: Tensor
    stored: Sequence[Tensor]
    feedback: FeedbackSpec
    inputs: Sequence[Tensor]
    kept: Sequence[Tensor]
    noise: Sequence[Tensor | None]
    activations: Sequence[str]
    parameters: Sequence[float]
    weight_grads: Sequence[bool]
    bias_grads: Sequence[bool]


def layer_grads(
    error: Tensor,
    stored: Sequence[Tensor],
    feedback: FeedbackSpec,
    inputs: Sequence[Tensor],
    kept: Sequence[Tensor],
    noise: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Sequence[float],
    weight_grads: Sequence[bool],
    bias_grads: Sequence[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of every fused linear layer; see `torch_backend.layer_grads`."""
    call = (error, stored, feedback, inputs, kept, noise, activations, parameters, weight_grads, bias_grads)
    if torch.compiler.is_compiling():
        grads: list[Tensor] = torch.ops.dfa_kernels.layer_grads(*call[:2], feedback.encode(), *call[3:], dtype)
        return grads
    check_device(error.device)
    if reason_for_torch(error, [*inputs, *kept], dtype):
        return torch_backend.layer_grads(*call, dtype)
    gradients = []
    for i, x in enumerate(inputs):
        out = kept[i].shape[1] if i < len(kept) else error.shape[1]
        if weight_grads[i]:
            gradients.append(x.new_empty((out, x.shape[1]), dtype=dtype))
        if bias_grads[i]:
            gradients.append(x.new_empty((out,), dtype=dtype))
    if gradients:
        _launch(LayerCall(*call), _Update(gradients, [], "store", [()] * len(gradients)))
    return gradients


def layer_update_(
    error: Tensor,
    stored: Sequence[Tensor],
    feedback: FeedbackSpec,
    inputs: Sequence[Tensor],
    kept: Sequence[Tensor],
    noise: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Sequence[float],
    weight_grads: Sequence[bool],
    bias_grads: Sequence[bool],
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    rule: str,
    hyper: Sequence[float],
) -> None:
    """Gradients and the optimizer's update in one launch; see `torch_backend.layer_update_`."""
    call = (error, stored, feedback, inputs, kept, noise, activations, parameters, weight_grads, bias_grads)
    check_device(error.device)
    changed = [*weights, *state]
    scattered = not all(tensor.is_contiguous() for tensor in changed)
    mixed = len({tensor.dtype for tensor in changed}) > 1
    if scattered or mixed or reason_for_torch(error, [*inputs, *kept], *[p.dtype for p in weights[:1]]):
        torch_backend.layer_update_(*call, weights, state, rule, hyper)
        return
    if not weights:
        return
    each = len(hyper) // len(weights)
    numbers = [update_numbers(rule, hyper[i * each : (i + 1) * each], bool(state)) for i in range(len(weights))]
    kernel_rule = "momentum" if rule == "sgd" and state else rule
    _launch(LayerCall(*call), _Update(weights, state, kernel_rule, numbers))
    torch.autograd.graph.increment_version(changed)


def update_numbers(rule: str, hyper: Sequence[float], has_state: bool) -> tuple[float, ...]:
    """What the kernels' epilogue takes for one parameter. Differences from 1 are taken here, in double precision."""
    if rule == "adamw":
        lr, beta1, beta2, eps, weight_decay, step = hyper
        rate = lr / (1 - beta1**step)
        return (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, rate, math.sqrt(1 - beta2**step), eps)
    lr, momentum, weight_decay, nesterov = hyper
    return (lr, weight_decay, momentum, float(nesterov)) if has_state else (lr, weight_decay)


@dataclass(slots=True)
class _Update:
    """Where the gradients go: into fresh tensors (rule "store"), or into parameters and their state."""

    destinations: Sequence[Tensor]
    state: Sequence[Tensor]
    rule: str
    numbers: Sequence[tuple[float, ...]]


@dataclass(slots=True)
class _PerLayer:
    """A tensor of each kind for every layer; any tensor stands in where a layer has none of its own."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    weight_state: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    bias_state: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    weight_sets: tuple[int, ...]
    bias_sets: tuple[int, ...]
    hyper: tuple[float, ...]


def plan_layers(
    call: LayerCall, target: Target, dtype: torch.dtype, rule: str, weight_sets: Sets = (0,), bias_sets: Sets = (0,)
) -> LaunchPlan:
    """What will run for layers of these shapes; dtype: of the parameters. Reads no values, so meta tensors do."""
    positions = [torch_backend.positions(h, call.error) for h in call.kept]
    sizes = [t * h.shape[1] for t, h in zip(positions, call.kept, strict=True)]
    outputs = len(call.inputs) - len(call.kept)
    how = describe_projection(call.error, call.stored, call.feedback, max(sizes, default=0), call.inputs[0].dtype)
    problem = GroupedProblem(
        how,
        tuple([x.shape[1] for x in call.inputs]),
        tuple([h.shape[1] for h in call.kept] + [call.error.shape[1]] * outputs),
        tuple(positions + [1] * outputs),
        tuple(call.activations),
        tuple([float(number) for number in call.parameters]),
        mask_of([mask is not None for mask in call.noise]),
        mask_of(call.weight_grads),
        mask_of(call.bias_grads),
        dtype,
        rule,
        weight_sets,
        bias_sets,
    )
    return plan_grouped(problem, target)


def _launch(call: LayerCall, update: _Update) -> None:
    per_layer = _per_layer(call, update)
    device, dtype = call.error.device, update.destinations[0].dtype
    plan = plan_layers(call, target_of(device), dtype, update.rule, per_layer.weight_sets, per_layer.bias_sets)
    widest = max(plan.problem.sizes, default=0)
    error, stored = projection_tensors(plan.problem.projected, call.error, call.stored, widest)
    inputs, kept = tuple([dense(x) for x in call.inputs]), tuple([dense(h) for h in call.kept])
    anything = inputs[0]
    noise = tuple([anything if mask is None else dense(mask) for mask in call.noise])
    tensors: Arguments = (error, stored, inputs, kept or (anything,), noise or (anything,))
    if plan.counters:
        deltas = [torch.empty_like(h) for h in kept]
        if len(inputs) > len(kept):
            shape = (error.shape[0], plan.copy_width)
            deltas.append(anything.new_empty(shape) if plan.copy_width else error)
        tensors = (counters(plan.counters, device), *tensors, tuple(deltas))
    results = (per_layer.weights, per_layer.biases, *per_layer.weight_state, *per_layer.bias_state)
    launch(plan, device, (*tensors, *results), (per_layer.hyper,))


def _per_layer(call: LayerCall, update: _Update) -> _PerLayer:
    """Destinations, state and numbers by layer, from their order in the operators."""
    spare = update.destinations[0]
    share = len(update.state) // len(update.destinations)
    sets: dict[tuple[float, ...], int] = {}
    weights, biases = [], []
    remaining = iter(range(len(update.destinations)))
    for wants_weight, wants_bias in zip(call.weight_grads, call.bias_grads, strict=True):
        weights.append(next(remaining) if wants_weight else None)
        biases.append(next(remaining) if wants_bias else None)

    def destination(i: int | None) -> Tensor:
        return spare if i is None else update.destinations[i]

    def state(i: int | None, which: int) -> Tensor:
        return spare if i is None or which >= share else update.state[i * share + which]

    def first_number(i: int | None) -> int:
        return 0 if i is None else sets.setdefault(update.numbers[i], len(sets) * NUMBERS[update.rule])

    weight_sets, bias_sets = tuple(map(first_number, weights)), tuple(map(first_number, biases))
    return _PerLayer(
        tuple(map(destination, weights)),
        tuple(map(destination, biases)),
        (tuple(state(i, 0) for i in weights), tuple(state(i, 1) for i in weights)),
        (tuple(state(i, 0) for i in biases), tuple(state(i, 1) for i in biases)),
        weight_sets,
        bias_sets,
        tuple(number for numbers in sets for number in numbers) or (0.0,),
    )
