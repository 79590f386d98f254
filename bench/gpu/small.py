"""Both grouped kernels and `project_taps` on a tiny network, for a memory checker, which makes everything slow.

    python -m bench.gpu.small

Compares with the torch backend, loosely: what counts here is what the checker says.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import dfa_kernels as dfa
from bench.gpu.forced import grouped_by, kernel_planner
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend

# None is a multiple of a tile; odd ones go without aligned rows, even ones may take the copy engine.
WIDTHS = {"odd": (37, 45, 33), "even": (48, 64, 80)}
ROWS = 19
KERNELS = {"one_phase": 10, "two_phase": 70}
ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


def main(device: str = "") -> int:
    place = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    # Without a GPU the kernels are interpreted, which is right in float32 only.
    dtypes = tuple(ALLOWED) if place.type == "cuda" else (torch.float32,)
    wrong = 0
    for kernel, error_size in KERNELS.items():
        for dtype in dtypes:
            for name, widths in WIDTHS.items():
                off = check(kernel, arguments(widths, error_size, dtype, place), dtype)
                wrong += not off <= ALLOWED[dtype]
                print(f"{kernel}, {dtype}, {name} widths: off by {off:.1e} of the largest", flush=True)
    return 1 if wrong else 0


def arguments(widths: tuple[int, ...], error_size: int, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Of `layer_grads`, up to the dtype: hidden layers and an output layer."""
    generator = torch.Generator().manual_seed(0)

    def data(columns: int) -> Tensor:
        return torch.randn(ROWS, columns, generator=generator).to(device, dtype)

    feedback, hidden = dfa.Feedback(), len(widths) - 1
    inputs = [data(width) for width in widths]
    kept = [data(width).tanh() for width in widths[1:]]
    stored = feedback.stored(max(widths), error_size, device)
    return [
        data(error_size), stored, feedback.spec, inputs, kept, [None] * hidden, ["tanh"] * hidden, [0.0] * 2 * hidden,
        [True] * len(widths), [True] * len(widths),
    ]  # fmt: skip


def check(kernel: str, call: list[Any], dtype: torch.dtype) -> float:
    """Largest deviation from the torch backend, as a share of the largest number, of gradients, updates and δ."""
    backends: tuple[Any, ...] = (triton_backend, torch_backend)
    pairs: list[tuple[Tensor, Tensor]] = []
    with grouped_by(kernel_planner(kernel)):
        grads = [backend.layer_grads(*call, dtype) for backend in backends]
        updated = [[torch.ones_like(g) for g in grads[0]] for _ in backends]
        for backend, weights in zip(backends, updated, strict=True):
            backend.layer_update_(*call, weights, [], "sgd", [0.1, 0.0, 0.0, 0.0] * len(weights))
    for found in (grads, updated):
        pairs += zip(*found, strict=True)
    kept = call[4]
    taps = [*call[:3], [h.shape[1] for h in kept], kept, *call[5:8]]
    pairs += zip(*(backend.project_taps(*taps) for backend in backends), strict=True)
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
