"""The operators: each looks at its call, and has the library compute it if it is small, else the torch backend."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..._torch_internals import has_memory, is_in_memory, operators_are_watched
from ...updates import RULES
from .. import torch_backend
from ..calls import DeviceNumbers, LayerCall
from ..csrc.looks import looks_of
from ..csrc.rows import numbers_and_sets
from ..known import Known
from ..layout import dense, dense_dtype
from .library import why_not
from .plan import SmallPlan, small_plan


def check_device(device: torch.device) -> None:
    """ValueError for a device on which the library cannot run."""
    if device.type != "cpu":
        raise ValueError(f"backend: 'cpu' got tensors on {device}, expected cpu; use 'auto' or 'torch'")
    if missing := why_not():
        raise ValueError(f"backend: 'cpu' is not available: {missing}; or use 'auto' or 'torch'")


def layer_grads(call: LayerCall, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of every fused linear layer; see `Backend.layer_grads`."""
    if _is_torchs(call.error):
        return torch_backend.layer_grads(call, dtype)
    plan = _plan_for(call, "store", dtype)
    if plan.reason:
        return torch_backend.layer_grads(call, dtype)
    gradients = [*map(torch.empty_like, plan.gradients)]
    _run(plan, call, gradients, None)
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
    if isinstance(hyper, DeviceNumbers) or _is_torchs(call.error):
        torch_backend.layer_update_(call, weights, state, rule, hyper)
        return
    changed = [*weights, *state]
    kernel_rule = (state and RULES[rule].with_state) or rule
    numbers, sets = numbers_and_sets(rule, tuple(hyper), len(weights))
    plan = _plan_for(call, kernel_rule, None, changed, sets)
    if plan.reason:
        torch_backend.layer_update_(call, weights, state, rule, hyper)
        return
    _run(plan, call, changed, numbers)
    torch.autograd.graph.increment_version(changed)


def _is_torchs(error: Tensor) -> bool:
    """Whether somebody, a compiler say, has to see products, or the error has no address."""
    return torch.compiler.is_compiling() or operators_are_watched() or not has_memory(error)


def _plan_for(
    call: LayerCall,
    rule: str,
    dtype: torch.dtype | None,
    changed: Sequence[Tensor] = (),
    sets: tuple[int, ...] = (),
) -> SmallPlan:
    def find() -> SmallPlan:
        read = [tensor for tensor in (*call.inputs, *call.saved, *call.dropout_mask) if tensor is not None]
        if not all([*map(is_in_memory, (call.error, *call.stored, *read, *changed))]):
            return SmallPlan("its tensors are more than numbers in the CPU's memory")
        plan = small_plan(looks_of(call, dense_dtype(changed) if changed else dtype, rule, sets))
        return replace(plan, has_gaps=not all([tensor.is_contiguous() for tensor in read]))

    return _known.value(call, changed, (rule, dtype, sets), find)


_known: Known[SmallPlan] = Known()


def forget_plans() -> None:
    """Makes the next calls' plans anew."""
    small_plan.cache_clear()
    _known.forget()


def _run(plan: SmallPlan, call: LayerCall, results: Sequence[Tensor], numbers: tuple[float, ...] | None) -> None:
    """results: where gradients go, or what they change, with its state; in the operators' order."""
    error, stored, feedback, inputs, saved, dropout_mask = call[:6]
    # Everything has a name that lives until the call is over.
    beside = stored[0] if stored else None
    if plan.reads_projection:
        beside = dense(torch_backend.shared_projection(error, stored, feedback, plan.widest).values.float())
    masks = [mask for mask in dropout_mask if mask is not None]
    if plan.has_gaps:
        inputs, saved, masks = ([*map(dense, tensors)] for tensors in (inputs, saved, masks))
    hyper = None if numbers is None else _floats(numbers)
    addresses = plan.pack(
        error.data_ptr(),
        0 if beside is None else beside.data_ptr(),
        0,
        0 if hyper is None else ctypes.addressof(hyper),
        *map(_address, inputs),
        *map(_address, saved),
        *map(_address, masks),
        *map(_address, results),
    )
    plan.run(addresses)


_address = Tensor.data_ptr


@lru_cache(maxsize=16)
def _floats(numbers: tuple[float, ...]) -> Any:
    return (ctypes.c_float * len(numbers))(*numbers)


def describe_layers(call: LayerCall, dtype: torch.dtype, rule: str, device: torch.device) -> str:
    """See `Backend.describe_layers`."""
    if reason := small_plan(looks_of(call, dtype, rule)).reason:
        return f"{torch_backend.describe_layers(call, dtype, rule, device)}, by the torch backend: {reason}"
    return f"all {len(call.inputs)} layers in one call of C++"
