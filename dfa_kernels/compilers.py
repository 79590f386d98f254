"""What a compiler or a tracer around a pass may do: compile it whole or not at all, and record or transform none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from ._torch_internals import is_under_functorch

Result = TypeVar("Result")


def whole(run: Callable[..., Result], *args: Any) -> Result:
    """``run(*args)`` by the compiler that compiles its caller, without a gap, or else by none.

    A compiler that meets a part of a pass on its own, since the network is compiled inside `DFA` or cannot be compiled
    in one piece, moves what the pass observes to the part's end: by then saved tensors have other versions, or are gone.
    """
    if torch.compiler.is_compiling():
        with _InOnePiece():
            return run(*args)
    return _without_compiler()(run, *args)


class _InOnePiece:
    """Compilers give up a function rather than leave such a block in its middle; then it runs as it is."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass


@cache
def _without_compiler() -> Callable[..., Any]:
    # Made at its first use: it imports the compiler, which takes seconds.
    @torch.compiler.disable
    def call(run: Callable[..., Any], *args: Any) -> Any:
        # What is compiled on its own would call its compiler again.
        with torch.compiler.set_stance("force_eager"):
            return run(*args)

    return call


def is_recorded() -> bool:
    """Whether torch.jit.trace or a transform of torch.func is at work, which cannot handle a learning pass."""
    return not torch.compiler.is_compiling() and (torch.jit.is_tracing() or is_under_functorch())


def check_not_recorded() -> None:
    """RuntimeError where a learning pass would be recorded or transformed."""
    if not is_recorded():
        return
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record a pass that learns by DFA; trace model.net, or the model under "
            "torch.no_grad()"
        )
    raise RuntimeError(
        "torch.func (grad, vmap, jacrev, …) cannot transform a pass that learns by DFA; for exact gradients call the "
        "model within `with model.backprop():`, or transform model.net; for DFA's own use loss.backward()"
    )
