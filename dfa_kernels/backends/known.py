"""What was found out about a grouped call, for those like it: in every step it is compared, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from .._torch_internals import Likeness, likeness_of
from .calls import LayerCall
from .layout import ALIGNMENT

# How many calls are known that differ in more than their tensors, and how many that differ in these alone.
MOST_CALLS, MOST_LIKENESSES = 512, 4

T = TypeVar("T")


class Known(Generic[T]):
    """Values that depend on all of a call but where its tensors begin; of the error, on whether it is aligned."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[tuple[Likeness, Likeness, T]]] = {}

    def value(self, call: LayerCall, changed: Sequence[Tensor], others: Hashable, find: Callable[[], T]) -> T:
        """The value for the call; changed: its parameters and their state, others: all else that counts.

        It is found once for calls whose tensors are of the same type, dtype, device, shape and strides.
        """
        error, stored, feedback, inputs, saved, dropout_mask, activations, parameters, weight_grads, bias_grads = call
        noisy = tuple([mask is not None for mask in dropout_mask])
        # A layer's output is the next one's input, and what has a tensor twice takes longer to compare.
        tensors, rest = (error, *inputs, *stored, *changed), saved
        if True in noisy:
            rest = [*saved, *[mask for mask in dropout_mask if mask is not None]]
        key = (
            others,
            feedback,
            error.shape,
            error.data_ptr() % ALIGNMENT == 0,
            noisy,
            tuple(activations),
            tuple(parameters),
            tuple(weight_grads),
            tuple(bias_grads),
            len(tensors),
            len(rest),
        )
        known = self._found.get(key, [])
        for are_like, rest_is_like, value in known:
            if are_like(*tensors) and rest_is_like(*rest):
                return value
        value = find()
        if len(self._found) >= MOST_CALLS:
            self._found.clear()
        self._found[key] = [(likeness_of(tensors), likeness_of(rest), value), *known[: MOST_LIKENESSES - 1]]
        return value

    def forget(self) -> None:
        self._found.clear()
