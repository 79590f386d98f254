"""How long the host takes for a call of the CUDA library: to pack its arguments and call what does nothing.

    python -m bench.cpu.library_call

No GPU and no library are needed: a function of the C library stands in, which takes the same arguments. What a GPU adds
is the driver's launch.
"""

from __future__ import annotations

import ctypes
import itertools
import timeit
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import dfa_kernels as dfa
from dfa_kernels.backends.calls import LayerCall
from dfa_kernels.backends.csrc.arguments import Arguments
from dfa_kernels.backends.cuda import library, operators
from dfa_kernels.backends.cuda.library import HOST, Library

WIDTHS, BATCH = (3072, 800, 800, 800, 10), 128
CALLS, ROUNDS = 2000, 15


def stand_in() -> Library:
    """A library on the CPU, none of whose functions does anything."""
    nothing = ctypes.CDLL(None).abs
    nothing.argtypes, nothing.restype = [ctypes.POINTER(Arguments), ctypes.c_int, ctypes.c_void_p], None
    return Library(Path("nowhere"), (HOST,), lambda arguments: 0, nothing, lambda *_: 0, lambda: b"")


def layer_call() -> LayerCall:
    """Of the paper's network, in float16."""
    hidden, feedback = len(WIDTHS) - 2, dfa.Feedback()
    inputs = [torch.randn(BATCH, width).half() for width in WIDTHS[:-1]]
    stored, every = feedback.stored(WIDTHS[1], WIDTHS[-1], torch.device("cpu")), [True] * len(inputs)
    return LayerCall(
        torch.randn(BATCH, WIDTHS[-1]).half(), stored, feedback.spec, inputs, [x.tanh() for x in inputs[1:]],
        [None] * hidden, ["tanh"] * hidden, [0.0] * 2 * hidden, every, every,
    )  # fmt: skip


def microseconds(work: Callable[[], object]) -> float:
    """Of one call, in the quickest of some rounds."""
    return min(timeit.repeat(work, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def main() -> None:
    """Prints the table."""
    call = layer_call()
    parameters = [torch.empty(*shape) for n, m in itertools.pairwise(WIDTHS) for shape in ((m, n), (m,))]
    hyper = [0.1, 0.0, 0.0, 0.0] * len(parameters)
    made = stand_in()
    with mock.patch.object(library, "installed", lambda: made):
        found = operators.plan_for(call, "store", torch.float32)
        rows = {
            "pack the arguments of 4 layers, and call": lambda: operators._run_layers(
                found, call, parameters, (), None
            ),
            "look at the call, and find its plan": lambda: operators.plan_for(call, "store", torch.float32),
            "layer_grads, all of it": lambda: operators.layer_grads(call, torch.float32),
            "layer_update_, SGD, all of it": lambda: operators.layer_update_(call, parameters, [], "sgd", hyper),
        }
        for name, work in rows.items():
            print(f"{name}: {microseconds(work):.1f} µs")


if __name__ == "__main__":
    main()
