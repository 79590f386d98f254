"""The registered operators: one boundary per hot path, for compilers, exporters and other languages' callers.

On CUDA they run what "auto" means there, elsewhere the torch backend. The autograd node calls its backend directly,
without the operators' overhead, and so that compilers and counters see the torch backend's products; what compilers
cannot look into, they get as an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS, resolve, torch_backend
from .backends.calls import LayerCall, TapsCall
from .feedback.spec import FeedbackSpec

# What callers may have passed by these names: `kept` and `noise` are `saved` and `dropout_mask` in a call's record.
LAYER_ARGUMENTS = (
    "Tensor error, Tensor[] stored, str feedback, Tensor[] inputs, Tensor[] kept, Tensor?[] noise, "
    "str[] activations, float[] parameters, bool[] weight_grads, bool[] bias_grads"
)

library = torch.library.Library("dfa_kernels", "FRAGMENT")
library.define(f"layer_grads({LAYER_ARGUMENTS}, ScalarType dtype) -> Tensor[]")
library.define(
    f"layer_update_({LAYER_ARGUMENTS}, Tensor(a!)[] weights, Tensor(b!)[] state, str rule, float[] hyper) -> ()"
)
library.define(
    "project_taps(Tensor error, Tensor[] stored, str feedback, SymInt[] sizes, Tensor?[] kept, Tensor?[] noise, "
    "str[] activations, float[] parameters) -> Tensor[]"
)


def _gathered(implementation: Callable[..., Any], kind: type[LayerCall | TapsCall]) -> Callable[..., Any]:
    """A backend's function as the operator calls it; see `calls.encoded`."""
    own = len(kind._fields)

    def run(error: Tensor, stored: list[Tensor], feedback: str, *rest: Any) -> Any:
        call = kind(error, stored, FeedbackSpec.decode(feedback), *rest[: own - 3])
        return implementation(call, *rest[own - 3 :])

    return run


def _automatic(name: str) -> Callable[..., Any]:
    def run(first: Tensor | LayerCall | TapsCall, *rest: Any) -> Any:
        device = first.device if isinstance(first, Tensor) else first.error.device
        return getattr(BACKENDS[resolve("auto", device)], name)(first, *rest)

    return run


for _op, _kind in (
    (torch_backend.layer_grads, LayerCall),
    (torch_backend.layer_update_, LayerCall),
    (torch_backend.project_taps, TapsCall),
):
    library.impl(_op.__name__, _gathered(_op, _kind), "CompositeExplicitAutograd")
    library.impl(_op.__name__, _gathered(_automatic(_op.__name__), _kind), "CUDA")


library.impl("hadamard", _automatic("hadamard"), "CUDA")


@torch.library.register_fake("dfa_kernels::layer_grads", lib=library)
def _fake_layer_grads(*arguments: Any) -> list[Tensor]:
    *flat, dtype = arguments
    call = LayerCall(*flat)
    grads = []
    for i, (x, out) in enumerate(zip(call.inputs, call.widths_out(), strict=True)):
        if call.weight_grads[i]:
            grads.append(x.new_empty((out, x.shape[1]), dtype=dtype))
        if call.bias_grads[i]:
            grads.append(x.new_empty((out,), dtype=dtype))
    return grads


@torch.library.register_fake("dfa_kernels::layer_update_", lib=library)
def _fake_layer_update_(*args: Any) -> None:
    return None


@torch.library.register_fake("dfa_kernels::project_taps", lib=library)
def _fake_project_taps(*arguments: Any) -> list[Tensor]:
    call = TapsCall(*arguments)
    return [
        call.error.new_empty((call.error.shape[0], size)) if h is None else torch.empty_like(h)
        for size, h in zip(call.sizes, call.saved, strict=True)
    ]
