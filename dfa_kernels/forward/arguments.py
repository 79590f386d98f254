"""The arguments of torch functions, and the tensors among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def tensors_in(args: Args, kwargs: Kwargs) -> list[Tensor]:
    """The tensors among a call's arguments, those in lists included."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


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
