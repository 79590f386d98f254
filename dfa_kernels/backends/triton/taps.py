"""`project_taps`: δ of every tap in one launch; shapes as in the torch backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...feedback_spec import FeedbackSpec
from .. import torch_backend
from .launch import check_device, launch, target_of
from .plan import LaunchPlan, plan_taps
from .problem import TapsProblem, Target
from .source import dense, looks_of_error, mask_of, projected_for, projection_tensors, reason_for_torch


def project_taps(
    error: Tensor,
    stored: Sequence[Tensor],
    feedback: FeedbackSpec,
    sizes: Sequence[int],
    kept: Sequence[Tensor | None],
    noise: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Sequence[float],
) -> list[Tensor]:
    """δ of every tap; see `torch_backend.project_taps`."""
    call = (error, stored, feedback, sizes, kept, noise, activations, parameters)
    if torch.compiler.is_compiling():
        deltas: list[Tensor] = torch.ops.dfa_kernels.project_taps(*call[:2], feedback.encode(), *call[3:])
        return deltas
    check_device(error.device)
    if reason_taps_for_torch(error, kept, noise):
        return torch_backend.project_taps(*call)
    ordered = [None if h is None else _ordered(h) for h in kept]
    masks = [m if m is None or h is None else _like(m, h) for m, h in zip(noise, ordered, strict=True)]
    results = [
        error.new_empty((error.shape[0], size)) if h is None else torch.empty_like(h)
        for size, h in zip(sizes, ordered, strict=True)
    ]
    if error.shape[0] == 0:
        return results
    plan = plan_project_taps(
        target_of(error.device), error, stored, feedback, sizes, ordered, masks, activations, parameters
    )
    error, parts = projection_tensors(plan.problem.projected, error, stored, max(sizes))
    tensors = (
        error,
        parts,
        tuple([error if h is None else h for h in ordered]),
        tuple([error if m is None else m for m in masks]),
        tuple(results),
    )
    launch(plan, error.device, tensors)
    return results


def reason_taps_for_torch(error: Tensor, kept: Sequence[Tensor | None], noise: Sequence[Tensor | None]) -> str:
    """Why the torch backend has to make these δ; empty if it has not."""
    dtypes = {tensor.dtype for tensor in (*kept, *noise) if tensor is not None}
    return reason_for_torch(error.dtype, dtypes, error.dtype)


def plan_project_taps(
    target: Target,
    error: Tensor,
    stored: Sequence[Tensor],
    feedback: FeedbackSpec,
    sizes: Sequence[int],
    kept: Sequence[Tensor | None],
    noise: Sequence[Tensor | None],
    activations: Sequence[str],
    parameters: Sequence[float],
) -> LaunchPlan:
    """What will run for taps of these shapes. Reads no values, so meta tensors do."""
    saved = [h for h in kept if h is not None]
    problem = TapsProblem(
        projected_for(looks_of_error(error, stored, feedback), max(sizes), (saved or [error])[0].dtype),
        tuple(sizes),
        tuple([1 if h is None or h.dim() < 2 else h.shape[1] for h in kept]),
        tuple(activations),
        tuple([float(number) for number in parameters]),
        mask_of([h is not None for h in kept]),
        mask_of([mask is not None for mask in noise]),
        mask_of([h is not None and not h.is_contiguous() for h in kept]),
    )
    return plan_taps(problem, target)


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
