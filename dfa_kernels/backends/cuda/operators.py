"""The operators: each looks at its call, gets a plan for what it looks like, and has the library run it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...updates import RULES
from .. import torch_backend
from ..calls import DeviceNumbers, LayerCall, TapsCall, encoded
from ..csrc.arguments import MOST_LAYERS, Arguments
from ..csrc.looks import looks_of, some_taps, taps_looks
from ..csrc.rows import numbers_and_sets
from ..known import Known
from ..layout import dense, dense_dtype, like, ordered
from ..parts import split, split_update
from .library import library, why_not
from .numbers import on_device
from .plan import Plan, Target, plan_layers, plan_taps
from .stream import on_stream

# A library that runs on the CPU has as many multiprocessors and as much shared memory as this.
EMULATED = Target(80, 4, 64 * 1024)


def check_device(device: torch.device) -> None:
    """ValueError for a device on which the library cannot run."""
    if missing := why_not():
        raise ValueError(f"backend: 'cuda' is not available: {missing}; or use 'auto' or 'torch'")
    if library().on_host:
        if device.type == "cpu":
            return
    elif device.type == "cuda":
        if missing := why_not(target_of(device).capability):
            raise ValueError(f"backend: 'cuda' cannot run on {device}: {missing}; or use 'auto' or 'torch'")
        return
    raise ValueError(f"backend: 'cuda' got tensors on {device}, expected cuda; on a CPU use 'auto' or 'torch'")


@cache
def target_of(device: torch.device) -> Target:
    """What to plan for on this device."""
    if device.type != "cuda":
        return EMULATED
    properties = torch.cuda.get_device_properties(device)
    return Target(
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_multiprocessor,
    )


def layer_grads(call: LayerCall, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of every fused linear layer; see `Backend.layer_grads`."""
    if torch.compiler.is_compiling():
        grads: list[Tensor] = torch.ops.dfa_kernels.layer_grads(*encoded(call), dtype)
        return grads
    device = call.error.device
    check_device(device)
    if len(call.inputs) > MOST_LAYERS:
        return [gradient for part in split(call, MOST_LAYERS) for gradient in layer_grads(part, dtype)]
    plan = plan_for(call, "store", dtype)
    if plan.reason:
        return torch_backend.layer_grads(call, dtype)
    gradients = plan.memory.allocate(device, dtype)
    _run_layers(plan, call, gradients, (), None)
    return gradients


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
    device = call.error.device
    check_device(device)
    if len(call.inputs) > MOST_LAYERS:
        for part in split_update(call, weights, state, hyper, MOST_LAYERS):
            layer_update_(*part[:3], rule, part[3])
        return
    changed = [*weights, *state]
    kernel_rule = (state and RULES[rule].with_state) or rule
    numbers: tuple[float, ...] = ()
    if isinstance(hyper, DeviceNumbers):
        sets = tuple([row * hyper.table.shape[1] for row in hyper.rows])
    else:
        numbers, sets = numbers_and_sets(rule, tuple(hyper), len(weights))
    plan = plan_for(call, kernel_rule, None, changed, sets)
    if plan.reason:
        torch_backend.layer_update_(call, weights, state, rule, hyper)
        return
    # An optimizer that has float64 parameters as well has its table in float64.
    table = hyper.table.float() if isinstance(hyper, DeviceNumbers) else on_device(numbers, device)
    _run_layers(plan, call, weights, state, table)
    torch.autograd.graph.increment_version(changed)


def plan_for(
    call: LayerCall,
    rule: str,
    dtype: torch.dtype | None = None,
    changed: Sequence[Tensor] = (),
    sets: tuple[int, ...] = (),
) -> Plan:
    """The call's plan on its device; dtype: of the gradients, for parameters that are ``changed`` say their own."""

    def find() -> Plan:
        looks = looks_of(call, dense_dtype(changed) if changed else dtype, rule, sets)
        return plan_layers(looks, target_of(call.error.device))

    return _known.value(call, changed, (rule, dtype, sets), find)


_known: Known[Plan] = Known()


def forget_plans() -> None:
    """Makes the next calls' plans anew."""
    for forget in (plan_layers.cache_clear, plan_taps.cache_clear, _known.forget):
        forget()


def _run_layers(
    plan: Plan, call: LayerCall, destinations: Sequence[Tensor], state: Sequence[Tensor], hyper: Tensor | None
) -> None:
    """destinations: of the gradients, in the operators' order; state: an equal number of tensors for each of them."""
    if plan.arguments is None:
        return
    error, stored = _projection_tensors(plan, call.error, call.stored)
    # A name, so that copies live until the launch.
    read = [dense(tensor) for tensor in (*call.inputs, *call.saved)]
    read += [dense(mask) for mask in call.dropout_mask if mask is not None]
    sums = error.new_empty(plan.sums, dtype=torch.float32) if plan.sums else None
    workspace = error.new_empty(plan.delta_numbers, dtype=plan.dtype) if plan.delta_numbers else None
    first_delta = _address(workspace)
    addresses = [0, error.data_ptr(), _address(stored), _address(sums), _address(hyper)]
    addresses += [tensor.data_ptr() for tensor in (*read, *destinations, *state)]
    addresses += [first_delta + offset for offset in plan.delta_offsets]
    _run(plan, addresses, call.error.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(plan: Plan, addresses: list[int], device: torch.device) -> None:
    """On the current stream of the device that the tensors are on."""
    assert plan.arguments is not None
    # The plan's own are everybody's, on whichever thread autograd runs.
    arguments = Arguments.from_buffer_copy(plan.arguments)
    plan.pack(arguments, 0, *plan.order(addresses))
    on_stream(device, library().run, arguments)


def _projection_tensors(plan: Plan, error: Tensor, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The error, and what the kernels read beside it: U or P."""
    if plan.source == "projection" and plan.widest:
        return error, dense(torch_backend.shared_projection(error, stored, plan.feedback, plan.widest).values.float())
    return error, stored[0] if plan.source == "matrix" and stored else None


def project_taps(call: TapsCall) -> list[Tensor]:
    """δ of every tap; see `Backend.project_taps`."""
    if torch.compiler.is_compiling():
        deltas: list[Tensor] = torch.ops.dfa_kernels.project_taps(*encoded(call))
        return deltas
    error = call.error
    check_device(error.device)
    if len(call.sizes) > MOST_LAYERS:
        return project_taps(some_taps(call, 0, MOST_LAYERS)) + project_taps(some_taps(call, MOST_LAYERS, None))
    saved = [None if h is None else ordered(h) for h in call.saved]
    plan = plan_taps(taps_looks(call._replace(saved=saved)), target_of(error.device))
    if plan.reason:
        return torch_backend.project_taps(call)
    masks = [None if m is None or h is None else like(m, h) for m, h in zip(call.dropout_mask, saved, strict=True)]
    results = [
        error.new_empty((error.shape[0], size)) if h is None else torch.empty_like(h)
        for size, h in zip(call.sizes, saved, strict=True)
    ]
    error, stored = _projection_tensors(plan, error, call.stored)
    addresses = [0, error.data_ptr(), _address(stored)]
    addresses += [tensor.data_ptr() for tensor in (*saved, *masks) if tensor is not None]
    addresses += [result.data_ptr() for result in results]
    _run(plan, addresses, call.error.device)
    return results
