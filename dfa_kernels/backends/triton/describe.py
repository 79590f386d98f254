"""What the operators will run, in words; reads shapes only."""

from __future__ import annotations

from typing import Any

import torch

from .launch import target_of
from .layers import LayerCall, plan_layers
from .plan import LaunchPlan
from .source import reason_for_torch
from .taps import plan_project_taps

_FROM = {
    "matrix": "U from memory",
    "signs": "U from packed signs",
    "sparse": "U from its non-zeros",
    "projection": "e Uᵀ made by the torch backend first",
}


def describe_layers(arguments: tuple[Any, ...], dtype: torch.dtype, rule: str, device: torch.device) -> str:
    """What `layer_grads` (rule "store") or `layer_update_` runs for these arguments."""
    call = LayerCall(*arguments)
    if reason := reason_for_torch(call.error, [*call.inputs, *call.kept], dtype):
        return f"by the torch backend: {reason}"
    return _describe(plan_layers(call, target_of(device), dtype, rule))


def describe_taps(arguments: tuple[Any, ...], device: torch.device) -> str:
    """What `project_taps` runs for these arguments."""
    if reason := reason_for_torch(arguments[0], [h for h in arguments[4] if h is not None]):
        return f"by the torch backend: {reason}"
    return _describe(plan_project_taps(target_of(device), *arguments))


def _describe(plan: LaunchPlan) -> str:
    how = plan.problem.projected
    arithmetic = {"half": str(how.dtype).removeprefix("torch."), "tf32": "tf32", "ieee": "float32"}[how.arithmetic]
    U = _FROM.get(how.source, "U regenerated from its seed")
    tma = ", through TMA" if plan.constants_by_name().get("TMA") else ""
    tiles = " × ".join(f"{name.removeprefix('block_')} {n}" for name, n in vars(plan.config).items() if "block" in name)
    return (
        f"one launch of {plan.name} with {plan.programs} programs of {plan.config.num_warps} warps{tma} "
        f"(tiles {tiles}; {arithmetic}; {U}): {plan.why}"
    )
