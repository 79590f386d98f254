"""`project_taps`: δ of every tap in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import torch_backend
from ..calls import TapsCall, encoded
from .launch import check_device, launch, target_of
from .plan import LaunchPlan
from .problem import TapsProblem, Target
from .route import planners
from .source import dense, looks_of_error, mask_of, projected_for, projection_tensors, reason_for_torch


def project_taps(call: TapsCall) -> list[Tensor]:
    """δ of every tap; see `Backend.project_taps`."""
    if torch.compiler.is_compiling():
        deltas: list[Tensor] = torch.ops.dfa_kernels.project_taps(*encoded(call))
        return deltas
    error = call.error
    check_device(error.device)
    if reason_taps_for_torch(call):
        return torch_backend.project_taps(call)
    kept = [None if h is None else _ordered(h) for h in call.kept]
    noise = [m if m is None or h is None else _like(m, h) for m, h in zip(call.noise, kept, strict=True)]
    results = [
        error.new_empty((error.shape[0], size)) if h is None else torch.empty_like(h)
        for size, h in zip(call.sizes, kept, strict=True)
    ]
    if error.shape[0] == 0:
        return results
    _, stored, feedback, sizes, _, _, activations, parameters = call
    ordered = TapsCall(error, stored, feedback, sizes, kept, noise, activations, parameters)
    plan = plan_project_taps(ordered, target_of(error.device))
    error, parts = projection_tensors(plan.problem.projected, error, stored, max(sizes))
    tensors = (
        error,
        parts,
        tuple([error if h is None else h for h in kept]),
        tuple([error if m is None else m for m in noise]),
        tuple(results),
    )
    launch(plan, error.device, tensors)
    return results


def reason_taps_for_torch(call: TapsCall) -> str:
    """Why the torch backend has to make these δ; empty if it has not."""
    dtypes = {tensor.dtype for tensor in (*call.kept, *call.noise) if tensor is not None}
    return reason_for_torch(call.error.dtype, dtypes, call.error.dtype)


def plan_project_taps(call: TapsCall, target: Target) -> LaunchPlan:
    """What will run for taps of these shapes. Reads no values, so meta tensors do."""
    saved = [h for h in call.kept if h is not None]
    looks = looks_of_error(call.error, call.stored, call.feedback)
    problem = TapsProblem(
        projected_for(looks, max(call.sizes), (saved or [call.error])[0].dtype),
        tuple(call.sizes),
        tuple([1 if h is None or h.dim() < 2 else h.shape[1] for h in call.kept]),
        tuple(call.activations),
        tuple([float(number) for number in call.parameters]),
        mask_of([h is not None for h in call.kept]),
        mask_of([mask is not None for mask in call.noise]),
        mask_of([h is not None and not h.is_contiguous() for h in call.kept]),
    )
    return planners[TapsProblem](problem, target)


def _ordered(kept: Tensor) -> Tensor:
    """kept, in one of the two orders the kernel knows: contiguous, or channels last."""
    return kept if _is_channels_last(kept) else dense(kept)


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels of [b, C, …] vary fastest in memory, with nothing left out."""
    if tensor.dim() < 3 or tensor.is_contiguous():
        return False
    return tensor.movedim(1, -1).is_contiguous()


def _like(mask: Tensor, kept: Tensor) -> Tensor:
    """mask, in the order of kept."""
    return mask if mask.stride() == kept.stride() else torch.empty_like(kept).copy_(mask)
