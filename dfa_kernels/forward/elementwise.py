"""Torch functions that make each element of their result from the same element of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import FUSED_CALLS, UNFUSED_CALLS

_NAMES = (
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow", "square", "sqrt",
    "rsqrt", "neg", "negative", "positive", "abs", "exp", "expm1", "log", "log1p", "erf", "erfc", "sin", "cos", "tanh",
    "sigmoid", "reciprocal", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "lerp", "addcmul",
    "addcdiv", "where", "clone", "masked_fill", "float", "half", "bfloat16", "double", "to",
)  # fmt: skip
_OPERATORS = (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow", "neg", "pos", "abs"
)  # fmt: skip


def _functions() -> Iterator[Callable[..., Any]]:
    for owner in (torch, Tensor, torch.special, F):
        for name in _NAMES:
            for spelling in (name, f"{name}_"):
                if hasattr(owner, spelling):
                    yield getattr(owner, spelling)
    for name in _OPERATORS:
        yield getattr(Tensor, f"__{name}__")


T = Tensor
ELEMENT_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {torch.mul, torch.multiply, T.mul, T.mul_, T.multiply, T.multiply_, T.__mul__, T.__rmul__}
)

# F.glu is none: it halves the units. What draws random numbers is none: made again, it would draw others.
ELEMENTWISE: frozenset[Callable[..., Any]] = (frozenset(_functions()) | frozenset(FUSED_CALLS) | UNFUSED_CALLS) - {
    F.glu, F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_
}  # fmt: skip
