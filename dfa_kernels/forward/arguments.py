"""The arguments and results of torch functions, and the tensors among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that an argument or a result is, or has in its list."""
    if isinstance(value, Tensor):
        return [value]
    return [x for x in value if isinstance(x, Tensor)] if isinstance(value, (list, tuple)) else []


def replaced(args: Args, kwargs: Kwargs, change: Callable[[Tensor], Tensor]) -> tuple[Args, Kwargs]:
    """The arguments of a call with every tensor changed, those in lists included."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if type(value) in (list, tuple):
            return type(value)([one(x) for x in value])
        return value

    return tuple([one(value) for value in args]), {name: one(value) for name, value in kwargs.items()}


def input_first(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments of ``f(input, …)``, the input among the positional ones."""
    if args:
        return args, kwargs
    rest = dict(kwargs)
    return (rest.pop("input"),), rest
