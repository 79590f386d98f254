"""The operators on a GPU: each looks at its call, gets a plan for what it looks like, and launches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...updates import RULES
from .. import torch_backend
from ..calls import DeviceNumbers, LayerCall, TapsCall, encoded
from ..layout import ALIGNMENT, dense, like, ordered
from ..parts import split, split_update
from .launch import check_device, counters, launch, launch_compiled, target_of
from .launch_plan import LaunchPlan
from .problem import TapsProblem, Target
from .route import MOST_LAYERS, READ, Route, planners, route_for
from .source import looks_of_error, mask_of, projected_for, projection_tensors, reason_for_torch
from .wide_tensors import layers_of, tensors_of_both, workspace


def layer_grads(call: LayerCall, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of every fused linear layer; see `Backend.layer_grads`."""
    if torch.compiler.is_compiling():
        grads: list[Tensor] = torch.ops.dfa_kernels.layer_grads(*encoded(call), dtype)
        return grads
    device = call.error.device
    if len(call.inputs) > MOST_LAYERS:
        return [gradient for part in split(call, MOST_LAYERS) for gradient in layer_grads(part, dtype)]
    route = route_for(call, "store", dtype)
    if route.by_torch:
        return torch_backend.grads_of(_layers(route, call), call, dtype)
    gradients = route.memory.allocate(device, dtype)
    _launch(route, call, gradients, _NO_NUMBERS)
    return gradients


_NO_NUMBERS = (0.0,)


def layer_update_(
    call: LayerCall,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    rule: str,
    hyper: Sequence[float] | DeviceNumbers,
) -> None:
    """Gradients and the optimizer's update in one go; see `Backend.layer_update_`.

    Nothing that the gradients are computed from may share memory with weights or state, nor these with each other.
    """
    if not weights:
        return
    if len(call.inputs) > MOST_LAYERS:
        for part in split_update(call, weights, state, hyper, MOST_LAYERS):
            layer_update_(*part[:3], rule, part[3])
        return
    changed = [*weights, *state]
    kernel_rule = (state and RULES[rule].with_state) or rule
    numbers, sets = _numbers_and_sets(kernel_rule, hyper, len(weights))
    route = route_for(call, kernel_rule, None, changed, sets, isinstance(hyper, DeviceNumbers))
    if route.by_torch or (isinstance(hyper, DeviceNumbers) and hyper.table.dtype != torch.float32):
        torch_backend.update_of_(_layers(route, call), call, weights, state, rule, hyper)
        return
    _launch(route, call, changed, numbers)
    torch.autograd.graph.increment_version(changed)


def _layers(route: Route, call: LayerCall) -> Iterator[torch_backend.Layer]:
    """What torch's products are of: δ of all layers by one launch, or by torch too."""
    plan = route.plan
    if plan is None or not route.by_torch:
        return torch_backend.layer_deltas(call)
    error, stored = projection_tensors(plan.problem.projected, call.error, call.stored, plan.problem.widest)
    inputs, saved = tuple(call.inputs), tuple([dense(h) for h in call.saved])
    masks = tuple([h if mask is None else dense(mask) for mask, h in zip(call.dropout_mask, saved, strict=True)])
    written = workspace(plan, error, inputs)
    if plan.programs:
        # A kernel's tuple is never empty.
        launch(plan, error.device, (error, stored, saved or inputs[:1], masks or inputs[:1], *written))
    return layers_of(plan, inputs, *written)


def _launch(
    route: Route, call: LayerCall, changed: Sequence[Tensor], numbers: tuple[float, ...] | tuple[Tensor]
) -> None:
    """changed: what gradients go to, in the operators' order, and all of its state."""
    plan = route.plan
    if plan is None:
        return
    error, stored, inputs, saved = call.error, call.stored, call.inputs, call.saved
    masks: Sequence[Tensor] = ()
    if route.reads_projection:
        error, stored = projection_tensors(plan.problem.projected, error, stored, plan.problem.widest)
    if plan.problem.dropout_mask:
        masks = [inputs[0] if mask is None else mask for mask in call.dropout_mask]
    if route.has_gaps:
        inputs, saved, masks = ([dense(tensor) for tensor in group] for group in (inputs, saved, masks))
    if plan.uses_tma:
        inputs = [_for_tma(x) for x in inputs]
    tensors = (error, *inputs, *saved, *masks, *changed, *(stored or (error,)))
    if route.is_alone and launch_compiled(plan, error.device, tensors, route.pickers, numbers):
        return
    arguments: list[Any] = [pick(tensors) for pick in route.pickers]
    if plan.name.startswith("grouped_gemm"):
        firsts, arguments[:READ] = tensors_of_both(plan, *arguments[:READ])
        if plan.first:
            launch(plan.first, error.device, firsts)
    elif plan.counters:
        sums = torch.empty(plan.sums, dtype=torch.float32, device=error.device)
        arguments[READ:READ] = _delta_workspace(plan, error, inputs, saved), sums
        arguments.insert(0, counters(plan.counters, error.device))
    launch(plan, error.device, arguments, (numbers,))


def _for_tma(x: Tensor) -> Tensor:
    """x, or a copy where memory that TMA can read from begins."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def _delta_workspace(
    plan: LaunchPlan, error: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Workspace for δ of every layer; the output layer's is the error itself, or a copy's."""
    workspace = tuple([torch.empty_like(h) for h in saved])
    if len(inputs) == len(saved):
        return workspace
    return (*workspace, inputs[0].new_empty((error.shape[0], plan.copy_width)) if plan.copy_width else error)


def _numbers_and_sets(
    rule: str, hyper: Sequence[float] | DeviceNumbers, parameters: int
) -> tuple[tuple[float, ...] | tuple[Tensor], tuple[int, ...]]:
    """The numbers for the kernel's epilogue, or the table that it finds them in; and where each parameter's begin."""
    if isinstance(hyper, DeviceNumbers):
        width = hyper.table.shape[1]
        return (hyper.table,), tuple([row * width for row in hyper.rows])
    each, numbers_of = len(hyper) // parameters, RULES[rule].tile_numbers
    # Floats all of them: a launch is compiled for the types of its numbers.
    first_set = list(map(float, hyper[:each]))
    if list(hyper) == first_set * parameters:
        return numbers_of(*first_set), ()
    hyper = list(map(float, hyper))
    firsts: dict[tuple[float, ...], int] = {}
    sets = []
    for first in range(0, len(hyper), each):
        numbers = numbers_of(*hyper[first : first + each])
        sets.append(firsts.setdefault(numbers, len(firsts) * len(numbers)))
    return tuple([number for numbers in firsts for number in numbers]), tuple(sets)


def project_taps(call: TapsCall) -> list[Tensor]:
    """δ of every tap; see `Backend.project_taps`."""
    if torch.compiler.is_compiling():
        deltas: list[Tensor] = torch.ops.dfa_kernels.project_taps(*encoded(call))
        return deltas
    error = call.error
    check_device(error.device)
    if reason_taps_for_torch(call):
        return torch_backend.project_taps(call)
    saved = [None if h is None else ordered(h) for h in call.saved]
    dropout_mask = [m if m is None or h is None else like(m, h) for m, h in zip(call.dropout_mask, saved, strict=True)]
    results = [
        error.new_empty((error.shape[0], size)) if h is None else torch.empty_like(h)
        for size, h in zip(call.sizes, saved, strict=True)
    ]
    if error.shape[0] == 0:
        return results
    _, stored, feedback, sizes, _, _, activations, parameters = call
    as_read = TapsCall(error, stored, feedback, sizes, saved, dropout_mask, activations, parameters)
    plan = plan_project_taps(as_read, target_of(error.device))
    error, parts = projection_tensors(plan.problem.projected, error, stored, max(sizes))
    tensors = (
        error,
        parts,
        tuple([error if h is None else h for h in saved]),
        tuple([error if m is None else m for m in dropout_mask]),
        tuple(results),
    )
    launch(plan, error.device, tensors)
    return results


def reason_taps_for_torch(call: TapsCall) -> str:
    """Why the torch backend has to make these δ; empty if it has not."""
    dtypes = {tensor.dtype for tensor in (*call.saved, *call.dropout_mask) if tensor is not None}
    return reason_for_torch(call.error.dtype, dtypes, call.error.dtype)


def plan_project_taps(call: TapsCall, target: Target) -> LaunchPlan:
    """What will run for taps of these shapes. Reads no values, so meta tensors do."""
    present = [h for h in call.saved if h is not None]
    looks = looks_of_error(call.error, call.stored, call.feedback)
    problem = TapsProblem(
        projected_for(looks, max(call.sizes), (present or [call.error])[0].dtype),
        tuple(call.sizes),
        tuple([1 if h is None or h.dim() < 2 else h.shape[1] for h in call.saved]),
        tuple(call.activations),
        tuple([float(number) for number in call.parameters]),
        mask_of([h is not None for h in call.saved]),
        mask_of([mask is not None for mask in call.dropout_mask]),
        mask_of([h is not None and not h.is_contiguous() for h in call.saved]),
    )
    return planners[TapsProblem](problem, target)
