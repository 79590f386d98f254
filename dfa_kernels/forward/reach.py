"""What autograd's graph of a pass says about its taps: which of them paths go around, and what no tap covers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .record import Pass

# A product by its node's name; a function of the user's own may be one.
_PRODUCT = re.compile(r"(Mm|Mv|Bmm|Addmm|Baddbmm|Dot|Convolution\w*|Linear\w*|CompiledFunction)Backward\d*$")


def bypassed(seen: Pass) -> list[bool]:
    """For every segment, whether a later one's or the output's graph meets its own, past the tap."""
    if torch.compiler.is_compiling():
        return [False] * len(seen.segments)
    ends = [*[segment.root for segment in seen.segments], seen.output]
    reached = [frozenset(_inner(end)) for end in ends]
    return [any(reached[i] & other for other in reached[i + 1 :]) for i in range(len(seen.segments))]


def warn_of_uncovered(net: nn.Module, seen: Pass, names: Sequence[str]) -> None:
    """A warning if matrices are multiplied in places where no weight layer was seen, so that no tap follows them."""
    if torch.compiler.is_compiling():
        return
    known = {id(p): name for name, p in net.named_parameters()}
    for weight in (weight for call in seen.watched.calls for weight in call.weights):
        for p in (weight, *[node.variable for node, _ in _nodes(weight) if hasattr(node, "variable")]):
            known.pop(id(p), None)
    for segment, name in zip(seen.segments, names, strict=True):
        found = [known[id(p)] for p in _multiplied(segment.root) if id(p) in known]
        if found:
            warnings.warn(
                f"net: parameters {found} are used by functions that are not known as weight layers, so no tap follows "
                f"them: they learn by a chain through the layers up to the tap {name!r}; put a dfa_kernels.Tap() "
                "behind them, or name their submodules in taps",
                stacklevel=2,
            )


def warn_of_unknown(seen: Pass, names: Sequence[str]) -> None:
    """A warning if functions stand in activations' places that are not known as such.

    names: of the pass's chained layers.
    """
    if torch.compiler.is_compiling():
        return
    pairs = zip(names, seen.watched.chained, strict=True)
    found = [f"{name!r} ({layer.unknown})" for name, layer in pairs if layer.unknown]
    if found:
        warnings.warn(
            f"net: {', '.join(found)}: what follows these weight layers is not known as an activation, so they are "
            "taught by a chain through the next ones; put a dfa_kernels.Tap() behind them",
            stacklevel=2,
        )


def _inner(end: Tensor) -> Iterator[Any]:
    """The nodes that make a tensor, but those that hand gradients to parameters."""
    return (node for node, _ in _nodes(end) if not hasattr(node, "variable"))


def _multiplied(end: Tensor) -> Iterator[Tensor]:
    """The parameters with two dimensions or more that products take as they are or transposed."""
    for node, user in _nodes(end):
        parameter = getattr(node, "variable", None)
        if parameter is not None and parameter.dim() > 1 and user is not None and _multiplies(user):
            yield parameter


def _multiplies(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction) or bool(_PRODUCT.search(node.name()))


def _nodes(end: Tensor) -> Iterator[tuple[Any, Any]]:
    """Every node of the tensor's graph, with a node that uses it; views of a parameter are its own users' users."""
    todo: list[tuple[Any, Any]] = [(end.grad_fn, None)]
    known: set[Any] = set()
    while todo:
        node, user = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        yield node, user
        onward = user if re.match(r"(T|Transpose|Permute|View|UnsafeView)Backward", node.name()) else node
        todo += [(before, onward) for before, _ in node.next_functions]
