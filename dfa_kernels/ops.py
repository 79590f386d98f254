"""The registered operators: one boundary per hot path, for compilers, exporters and other languages' callers.

On CUDA they run what "auto" means there, elsewhere the torch backend. The autograd node calls its backend directly,
without the operators' overhead, and so that compilers, profilers and counters see the torch backend's products; what
compilers cannot look into, they get as an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS, resolve, torch_backend
from .feedback_spec import FeedbackSpec

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


def _with_decoded_feedback(implementation: Callable[..., Any]) -> Callable[..., Any]:
    def run(error: Tensor, stored: list[Tensor], feedback: str, *rest: Any) -> Any:
        return implementation(error, stored, FeedbackSpec.decode(feedback), *rest)

    return run


def _automatic(name: str) -> Callable[..., Any]:
    def run(tensor: Tensor, *rest: Any) -> Any:
        return getattr(BACKENDS[resolve("auto", tensor.device)], name)(tensor, *rest)

    return run


for _op in (torch_backend.layer_grads, torch_backend.layer_update_, torch_backend.project_taps):
    library.impl(_op.__name__, _with_decoded_feedback(_op), "CompositeExplicitAutograd")
    library.impl(_op.__name__, _with_decoded_feedback(_automatic(_op.__name__)), "CUDA")


library.impl("hadamard", _automatic("hadamard"), "CUDA")


@torch.library.register_fake("dfa_kernels::layer_grads", lib=library)
def _fake_layer_grads(
    error: Tensor,
    stored: list[Tensor],
    feedback: str,
    inputs: list[Tensor],
    kept: list[Tensor],
    noise: list[Tensor | None],
    activations: list[str],
    parameters: list[float],
    weight_grads: list[bool],
    bias_grads: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    grads = []
    for i, x in enumerate(inputs):
        out = kept[i].shape[1] if i < len(kept) else error.shape[1]
        if weight_grads[i]:
            grads.append(x.new_empty((out, x.shape[1]), dtype=dtype))
        if bias_grads[i]:
            grads.append(x.new_empty((out,), dtype=dtype))
    return grads


@torch.library.register_fake("dfa_kernels::layer_update_", lib=library)
def _fake_layer_update_(*args: Any) -> None:
    return None


@torch.library.register_fake("dfa_kernels::project_taps", lib=library)
def _fake_project_taps(
    error: Tensor,
    stored: list[Tensor],
    feedback: str,
    sizes: list[int],
    kept: list[Tensor | None],
    noise: list[Tensor | None],
    activations: list[str],
    parameters: list[float],
) -> list[Tensor]:
    return [
        error.new_empty((error.shape[0], size)) if h is None else torch.empty_like(h)
        for size, h in zip(sizes, kept, strict=True)
    ]
