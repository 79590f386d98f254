"""What a call looks like: all of it that decides what runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...feedback.spec import FeedbackSpec
from ..calls import LayerCall, TapsCall


class ErrorLooks(NamedTuple):
    """All of the error and of the feedback that decides what runs; plain values, cheap to hash."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    feedback: FeedbackSpec
    is_stored: bool
    is_elsewhere: bool
    """Whether what is stored is on another device than the error."""


class Looks(NamedTuple):
    """All of a call of `layer_grads` or `layer_update_` that decides its plan."""

    error: ErrorLooks
    inputs: tuple[torch.Size, ...]
    saved: tuple[torch.Size, ...]
    dtypes: frozenset[torch.dtype]
    """Of the activations."""
    activations: tuple[str, ...]
    parameters: tuple[float, ...]
    masks: tuple[bool, ...]
    """Whether each hidden layer has one."""
    weight_grads: tuple[bool, ...]
    bias_grads: tuple[bool, ...]
    dtype: torch.dtype | None
    """Of the parameters; None if they differ in it or have gaps in memory."""
    rule: str
    sets: tuple[int, ...]
    """Where each parameter's numbers for the rule begin; empty if all share one set."""


class TapsLooks(NamedTuple):
    """All of a call of `project_taps` that decides its plan."""

    error: ErrorLooks
    sizes: tuple[int, ...]
    channels: tuple[int, ...]
    channels_last: tuple[bool, ...]
    has_saved: tuple[bool, ...]
    masks: tuple[bool, ...]
    """Whether each tap has the respective tensor."""
    dtypes: frozenset[torch.dtype]
    activations: tuple[str, ...]
    parameters: tuple[float, ...]


def error_looks(error: Tensor, stored: Sequence[Tensor], feedback: FeedbackSpec) -> ErrorLooks:
    """What the projection's arguments look like. Reads no values, so meta tensors do."""
    elsewhere = bool(stored) and stored[0].device != error.device
    return ErrorLooks(error.shape, error.stride(), error.dtype, feedback, bool(stored), elsewhere)


def looks_of(call: LayerCall, dtype: torch.dtype | None, rule: str, sets: tuple[int, ...] = ()) -> Looks:
    """What the call looks like."""
    masks = [mask for mask in call.dropout_mask if mask is not None]
    return Looks(
        error_looks(call.error, call.stored, call.feedback),
        tuple([x.shape for x in call.inputs]),
        tuple([h.shape for h in call.saved]),
        frozenset([tensor.dtype for tensor in (*call.inputs, *call.saved, *masks)]),
        tuple(call.activations),
        tuple(call.parameters),
        tuple([mask is not None for mask in call.dropout_mask]),
        tuple(call.weight_grads),
        tuple(call.bias_grads),
        dtype,
        rule,
        sets,
    )


def taps_looks(call: TapsCall) -> TapsLooks:
    """What the call looks like, its saved tensors in one of the two orders that the kernel knows."""
    present = [tensor for tensor in (*call.saved, *call.dropout_mask) if tensor is not None]
    return TapsLooks(
        error_looks(call.error, call.stored, call.feedback),
        tuple(call.sizes),
        tuple([1 if h is None or h.dim() < 2 else h.shape[1] for h in call.saved]),
        tuple([h is not None and not h.is_contiguous() for h in call.saved]),
        tuple([h is not None for h in call.saved]),
        tuple([h is not None and m is not None for h, m in zip(call.saved, call.dropout_mask, strict=True)]),
        frozenset([tensor.dtype for tensor in present]),
        tuple(call.activations),
        tuple(call.parameters),
    )


def some_taps(call: TapsCall, first: int, end: int | None) -> TapsCall:
    """The call for some of its taps."""
    here = slice(first, end)
    return call._replace(
        sizes=call.sizes[here],
        saved=call.saved[here],
        dropout_mask=call.dropout_mask[here],
        activations=call.activations[here],
        parameters=call.parameters[2 * first : None if end is None else 2 * end],
    )
