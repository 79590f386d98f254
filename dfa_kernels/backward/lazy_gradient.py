"""A gradient that is computed when somebody looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._torch_internals import map_tensors


class LazyGradient(Tensor):
    """Stands in a parameter's ``.grad``, without storage, while its gradient is deferred.

    Whatever is done with it happens to the gradient, which ``make`` computes first and writes to ``.grad``.

    Raises:
        RuntimeError: on use, if the gradient was dropped, or consumed by a step, before anybody looked.
    """

    made: Tensor | None
    made_by: Callable[[], None]

    @staticmethod
    def __new__(cls, parameter: Tensor, make: Callable[[], None]) -> LazyGradient:
        gradient: LazyGradient = Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        gradient.made, gradient.made_by = None, make
        return gradient

    def look(self) -> Tensor:
        """The gradient itself."""
        if self.made is None:
            self.made_by()
        if self.made is None:
            raise RuntimeError(
                ".grad: it was deferred to a fused optimizer, which used or dropped it before anybody looked; "
                "clone() it before step() and zero_grad()"
            )
        return self.made

    # Python's calls come here, those without an operator (numpy, pickle, deepcopy) too.
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_gradients(func, args, kwargs)

    # Calls from C++ come here: autograd adds to what is in .grad.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _on_gradients(func, args, kwargs)


def _on_gradients(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = map_tensors(LazyGradient.look, (args, kwargs or {}), LazyGradient)
    return func(*args, **kwargs)
