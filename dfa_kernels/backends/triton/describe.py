"""What the operators will run, in words; reads shapes only."""

from __future__ import annotations

import torch

from ..calls import LayerCall, TapsCall
from ..parts import split
from .launch import target_of
from .launch_plan import LaunchPlan
from .operators import plan_project_taps, reason_taps_for_torch
from .problem import GroupedProblem, Projected
from .route import MOST_LAYERS, looks_of, route_of


def describe_layers(call: LayerCall, dtype: torch.dtype, rule: str, device: torch.device) -> str:
    """See `Backend.describe_layers`."""
    if len(call.inputs) > MOST_LAYERS:
        parts = [describe_layers(part, dtype, rule, device) for part in split(call, MOST_LAYERS)]
        return f"in {len(parts)} parts of at most {MOST_LAYERS} layers: " + "; then ".join(parts)
    route = route_of(looks_of(call, dtype, rule), target_of(device))
    if route.reason:
        return f"by the torch backend: {route.reason}"
    return "nothing: no gradient is wanted" if route.plan is None else _describe(route.plan)


def describe_taps(call: TapsCall, device: torch.device) -> str:
    """See `Backend.describe_taps`."""
    if reason := reason_taps_for_torch(call):
        return f"by the torch backend: {reason}"
    return _describe(plan_project_taps(call, target_of(device)))


def _describe(plan: LaunchPlan) -> str:
    how = plan.problem.projected
    arithmetic = {"half": str(how.dtype).removeprefix("torch."), "tf32": "tf32", "ieee": "float32"}[how.arithmetic]
    hidden = not isinstance(plan.problem, GroupedProblem) or plan.problem.hidden
    U = "; " + _origin(how) if hidden else ""
    if plan.first:
        return f"two launches ({arithmetic}{U}), {_launch(plan.first)}, then {_launch(plan)}: {plan.why}"
    if plan.name == "deltas":
        products = f"then the library's products for each of {len(plan.problem.widths_in)} layers"
        return f"one launch of {_launch(plan, arithmetic + U)}, {products}: {plan.why}"
    return f"one launch of {_launch(plan, arithmetic + U)}: {plan.why}"


def _launch(plan: LaunchPlan, about: str = "") -> str:
    """The kernel, its programs and its tiles; about: what else is said of the tiles."""
    tma = ", through TMA" if plan.uses_tma else ""
    tiles = " × ".join(f"{name.removeprefix('block_')} {n}" for name, n in vars(plan.config).items() if "block" in name)
    tiles += about and f"; {about}"
    return f"{plan.name} with {plan.programs} programs of {plan.config.num_warps} warps{tma} (tiles {tiles})"


def _origin(how: Projected) -> str:
    if how.source == "projection":
        return "e Uᵀ made by the torch backend first"
    kind = how.feedback.row
    return kind.stored_as if how.source == kind.stored_source else "U regenerated from its seed"
