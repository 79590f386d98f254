"""What the operators will run, in words; reads shapes only."""

from __future__ import annotations

import torch

from ..calls import LayerCall, TapsCall
from ..csrc.arguments import MOST_LAYERS
from ..csrc.looks import looks_of, some_taps, taps_looks
from ..parts import split
from .operators import target_of
from .plan import DELTA_ROWS, STRIP, UNITS, WIDE, Plan, plan_layers, plan_taps


def describe_layers(call: LayerCall, dtype: torch.dtype, rule: str, device: torch.device) -> str:
    """See `Backend.describe_layers`."""
    if len(call.inputs) > MOST_LAYERS:
        parts = [describe_layers(part, dtype, rule, device) for part in split(call, MOST_LAYERS)]
        return f"in {len(parts)} parts of at most {MOST_LAYERS} layers: " + "; then ".join(parts)
    plan = plan_layers(looks_of(call, dtype, rule), target_of(device))
    if plan.reason:
        return f"by the torch backend: {plan.reason}"
    if plan.arguments is None:
        return "nothing: no gradient is wanted"
    about = f"{plan.arguments.programs} programs, {_about(plan) if call.saved else _name(plan.dtype)}"
    if plan.task == "strip":
        return f"one launch of CUDA C++ by strips (tiles {STRIP} × {STRIP}, {about}): {plan.why}"
    return f"two launches of CUDA C++, δ and then grouped products (tiles {WIDE} × {WIDE}, {about}): {plan.why}"


def describe_taps(call: TapsCall, device: torch.device) -> str:
    """See `Backend.describe_taps`."""
    if len(call.sizes) > MOST_LAYERS:
        first, rest = some_taps(call, 0, MOST_LAYERS), some_taps(call, MOST_LAYERS, None)
        return f"{describe_taps(first, device)}; then {describe_taps(rest, device)}"
    plan = plan_taps(taps_looks(call), target_of(device))
    if plan.reason:
        return f"by the torch backend: {plan.reason}"
    return f"one launch of CUDA C++ (tiles {UNITS} × {DELTA_ROWS}, {_about(plan)}): {plan.why}"


def _about(plan: Plan) -> str:
    return f"{_name(plan.dtype)}, {_ORIGINS.get(plan.source, 'U regenerated from its seed')}"


_ORIGINS = {"matrix": "U from memory", "projection": "e Uᵀ made by the torch backend first"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
