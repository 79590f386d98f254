"""Functions that stand on their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._torch_internals import forward_mode_is_on
from .feedback.hadamard import HadamardFunction, hadamard, hadamard_by_products


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """Walsh-Hadamard transform of the last dimension: x [..., n] -> [..., n], in x's dtype; differentiable.

    Equals `F.linear(x, hadamard(n)) * scale` for n a power of two (scipy.linalg.hadamard, Sylvester's order),
    else `(F.linear(F.pad(x, (0, d - n)), hadamard(d)) * scale)[..., :n]` with d the next power of two;
    n·log(n) work. float16 and bfloat16 are summed in float32. ValueError if x is 0-d or n is 0, TypeError if
    x is not floating. scale is a constant: nothing differentiates by it.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {list(x.shape)}")
    result: Tensor = _transform()(x, float(scale))
    return result


def _transform() -> Callable[[Tensor, float], Tensor]:
    """The form that can be differentiated in every mode here: a compiler takes no Function with a forward mode."""
    if not torch.compiler.is_compiling():
        return HadamardFunction.apply
    return hadamard_by_products if forward_mode_is_on() else hadamard
