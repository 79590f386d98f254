"""Small networks on a CPU: the operators in one call of C++, beside the torch backend's; one thread.

    python -m bench.cpu.small_networks

Every network is small enough here, so that it shows where it no longer is: see `MOST_PRODUCTS` in
dfa_kernels/backends/cpu/plan.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import dfa_kernels as dfa
from bench.cpu.interleaved import interleaved, medians
from dfa_kernels.backends import cpu, torch_backend
from dfa_kernels.backends.calls import LayerCall
from dfa_kernels.backends.cpu import operators, plan

MOST = plan.MOST_PRODUCTS
GAUSSIAN = ("gaussian", "dense")
# Widths, rows of the batch, and feedback.
NETWORKS: tuple[tuple[tuple[int, ...], int, tuple[str, str]], ...] = (
    ((8, 8, 8, 8, 4), 4, GAUSSIAN),
    ((32, 32, 32, 32, 4), 16, GAUSSIAN),
    ((64, 64, 64, 64, 10), 32, GAUSSIAN),
    ((64, 64, 64, 64, 10), 64, GAUSSIAN),
    ((128, 128, 128, 10), 32, GAUSSIAN),
    ((128, 128, 128, 10), 64, GAUSSIAN),
    ((784, 32, 10), 32, GAUSSIAN),
    ((784, 128, 10), 32, GAUSSIAN),
    ((*[16] * 20, 4), 16, GAUSSIAN),
    ((*[64] * 20, 4), 16, GAUSSIAN),
    ((64, 64, 64, 1000), 8, GAUSSIAN),
    ((64, 64, 64, 10), 32, ("gaussian", "procedural")),
    ((64, 64, 64, 10), 32, ("rademacher", "procedural")),
    ((64, 64, 64, 1000), 8, ("rademacher", "procedural")),
    ((64, 64, 64, 10), 32, ("sparse", "dense")),
)
RULES = {"gradients": [], "SGD": [1e-4, 0.0, 0.0, 0.0], "AdamW": [1e-4, 0.9, 0.999, 1e-8, 0.01, 5.0]}


def layer_call(widths: tuple[int, ...], rows: int, form: tuple[str, str]) -> LayerCall:
    hidden, feedback = len(widths) - 2, dfa.Feedback(*form)
    inputs = [torch.randn(rows, width) for width in widths[:-1]]
    stored, every = feedback.stored(max(widths[1:-1]), widths[-1], "cpu"), [True] * len(inputs)
    return LayerCall(
        torch.randn(rows, widths[-1]), stored, feedback.spec, inputs, [x.tanh() for x in inputs[1:]], [None] * hidden,
        ["tanh"] * hidden, [0.0] * 2 * hidden, every, every,
    )  # fmt: skip


def work(backend: Any, call: LayerCall, name: str, parameters: list[Tensor]) -> Callable[[], Any]:
    numbers = RULES[name]
    if not numbers:
        return lambda: backend.layer_grads(call, torch.float32)
    state = [torch.zeros_like(p) for p in parameters for _ in range(2)] if name == "AdamW" else []
    hyper = numbers * len(parameters)
    return lambda: backend.layer_update_(call, parameters, state, name.lower(), hyper)


def check(call: LayerCall) -> None:
    """AssertionError unless both give the same gradients, up to rounding."""
    for found, same in zip(
        cpu.layer_grads(call, torch.float32), torch_backend.layer_grads(call, torch.float32), strict=True
    ):
        torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-4)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    operators.check_device(torch.device("cpu"))
    with patch.object(plan, "MOST_PRODUCTS", 2**60):
        for widths, rows, form in NETWORKS:
            call = layer_call(widths, rows, form)
            check(call)
            parameters = [torch.randn(shape) for n, m in pairwise(widths) for shape in ((m, n), (m,))]
            cells = []
            for name in RULES:
                times = medians(
                    interleaved(
                        {each.__name__: work(each, call, name, parameters) for each in (torch_backend, cpu)},
                        rounds,
                    )
                )
                before, now = (1e6 * seconds for seconds in times.values())
                cells.append(f"{name} {before:.0f} → {now:.0f} µs ({before / now:.1f}×)")
            each_layer = rows * sum(n * m for n, m in pairwise(widths)) / (len(widths) - 1)
            shape = "-".join(map(str, widths)) if len(widths) < 9 else f"{widths[0]}x{len(widths) - 1}-{widths[-1]}"
            print(f"{shape} b={rows} {'-'.join(form)}, {each_layer / MOST:.2f} of the most: {', '.join(cells)}")


if __name__ == "__main__":
    main()
