"""The struct that the library takes: that of `csrc/abi.h`, whose version and size are compared when it is loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ABI_VERSION = 1
MOST_LAYERS = 28
"""Of which the arguments fit into the 4 KB that a kernel may be given."""

TASKS = {name: i for i, name in enumerate(("strip", "wide", "taps"))}
SOURCES = {
    name: i for i, name in enumerate(("matrix", "gaussian", "uniform", "signs", "nonzeros", "projection"))
}  # fmt: skip
DTYPES = {dtype: i for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))}
RULES = {name: i for i, name in enumerate(("store", "sgd", "momentum", "adamw"))}
ACTIVATIONS = {
    name: i
    for i, name in enumerate(
        (
            "identity", "tanh", "relu", "leaky_relu", "abs", "sigmoid", "gelu", "silu", "elu", "softplus", "hardtanh",
        )
    )
}  # fmt: skip

int32, int64, uint32, float32, pointer = (
    ctypes.c_int, ctypes.c_longlong, ctypes.c_uint, ctypes.c_float, ctypes.c_void_p,
)  # fmt: skip
POINTERS = (
    "x", "saved", "mask", "delta", "weight", "bias", "weight_state0", "weight_state1", "bias_state0", "bias_state1",
)  # fmt: skip
SHARED_POINTERS = ("error", "stored", "sums", "hyper")


class Tensors(ctypes.Structure):
    """Addresses of a layer's tensors, 0 where there is none."""

    _fields_ = [(name, pointer) for name in POINTERS]  # noqa: RUF012


class Layer(ctypes.Structure):
    """A layer's numbers."""

    _fields_ = [  # noqa: RUF012
        *[(name, int32) for name in ("width_in", "width_out", "positions", "channels", "activation")],
        *[(name, float32) for name in ("scale", "p", "q")],
        *[
            (name, int32)
            for name in ("weight_set", "bias_set", "first_program", "chunks", "first_sum", "channels_last")
        ],
    ]


class Arguments(ctypes.Structure):
    """All that a task is told."""

    _fields_ = [  # noqa: RUF012
        *[(name, pointer) for name in SHARED_POINTERS],
        ("tensors", Tensors * MOST_LAYERS),
        ("stride_row", int64),
        ("stride_column", int64),
        *[
            (name, int32)
            for name in (
                "task", "rule", "source", "dtype", "error_dtype", "stored_dtype", "parameter_dtype", "rows",
                "error_size", "widest", "nonzeros",
            )
        ],
        ("key0", uint32),
        ("key1", uint32),
        *[(name, int32) for name in ("layers", "hidden", "programs")],
        ("layer", Layer * MOST_LAYERS),
    ]  # fmt: skip


def arguments_of(numbers: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Arguments:
    """The struct with these numbers, and no address yet."""
    made = Arguments(layers=len(layers), **numbers)
    for i, layer in enumerate(layers):
        made.layer[i] = Layer(**layer)
    return made
