"""What a compiler or a tracer around a pass may do: compile it whole or not at all, and record or transform none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from ._torch_internals import (
    ForcedEager,
    compiler_at_work,
    compiler_is_loaded,
    constant_when_compiled,
    is_compiled,
    is_traced,
    is_under_functorch,
    show_to_modes,
)
from .activations import CLAMP_MIN, CLAMPS, FUSED_CALLS, UNFUSED_CALLS

Result = TypeVar("Result")


def whole(run: Callable[..., Result], *args: Any) -> Result:
    """``run(*args)`` by the compiler that compiles its caller, without a gap, or else by none.

    A compiler that meets a part of a pass on its own, since the network is compiled inside `DFA` or cannot be compiled
    in one piece, moves what the pass observes to the part's end: then saved tensors have other versions, or are gone.
    """
    if torch.compiler.is_compiling():
        _show_activations()
        with _InOnePiece():
            return run(*args)
    if not compiler_is_loaded():
        return run(*args)
    if compiler_at_work() is not None:
        result: Result = _uncompiled()(_eagerly, run, *args)
        return result
    return _eagerly(run, *args)


def _eagerly(run: Callable[..., Result], *args: Any) -> Result:
    # What is compiled on its own would call its compiler again.
    with ForcedEager():
        return run(*args)


@constant_when_compiled
def _show_activations() -> bool:
    show_to_modes([*FUSED_CALLS, *UNFUSED_CALLS, *CLAMPS, *CLAMP_MIN])
    return True


class _InOnePiece:
    """Compilers give up a function rather than leave such a block in its middle; then it runs as it is."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        pass


@cache
def _uncompiled() -> Callable[..., Any]:
    """Runs what it is given without the compiler that waits for its frames."""
    # Not as a decorator: it loads the compiler, which takes longer than all the rest of this package.
    disabled: Callable[..., Any] = torch.compiler.disable(lambda run, *args: run(*args))
    return disabled


def warn_of_compiled(net: nn.Module) -> None:
    """Warns of modules that are compiled inside `DFA`, and run uncompiled there."""
    names = [name or type(net).__name__ for name, module in net.named_modules() if is_compiled(module)]
    if names:
        warnings.warn(
            f"net: {names} are compiled, but a pass that learns runs uncompiled what is compiled inside DFA; use "
            "torch.compile(dfa_kernels.DFA(net)) with a net that is not compiled",
            stacklevel=3,
        )


def is_left_alone() -> bool:
    """Whether no compiler is at work, neither on what is run here nor waiting for its parts."""
    return not torch.compiler.is_compiling() and compiler_at_work() is None


def is_recorded() -> bool:
    """Whether torch.jit.trace or a transform of torch.func is at work, which cannot handle a learning pass.

    Not to be asked by a compiler.
    """
    return is_traced() or is_under_functorch()


def check_not_recorded() -> None:
    """RuntimeError where a learning pass would be recorded or transformed. Not to be asked by a compiler."""
    if is_traced():
        raise RuntimeError(
            "torch.jit.trace cannot record a pass that learns by DFA; trace model.net, or the model under "
            "torch.no_grad()"
        )
    if is_under_functorch():
        raise RuntimeError(
            "torch.func (grad, vmap, jacrev, …) cannot transform a pass that learns by DFA; for exact gradients call "
            "the model within `with model.backprop():`, or transform model.net; for DFA's own use loss.backward()"
        )
