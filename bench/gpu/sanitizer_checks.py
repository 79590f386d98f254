"""Every kernel once or twice on a tiny network, for a tool that watches the GPU and makes everything slow.

    python -m bench.gpu.sanitizer_checks --json FILE [--checks NAME ...]

Nothing but these kernels runs on the GPU: data is made, and results are compared with the torch backend's, on the CPU.
Loosely: what counts here is what the tool says.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

import dfa_kernels as dfa
from bench.gpu.forced import kernel_planner
from bench.gpu.precision import tf32
from bench.gpu.processes import write
from bench.gpu.tuning_workloads import taps_call
from dfa_kernels.backends import BACKENDS, OLDEST_FOR_TRITON, cuda, torch_backend
from dfa_kernels.backends.calls import Backend, LayerCall
from dfa_kernels.backends.csrc.arguments import TASKS
from dfa_kernels.backends.cuda.library import Library
from dfa_kernels.backends.triton.route import planned_by

# No multiple of a tile, and more than a loop over the batch holds in its buffers, which are so used again.
ROWS = 275
# As many as strips are for on every card; δ of several parts where rows are not aligned.
STRIP_ROWS = 119
# As many as CUDA C++ takes strips for on every card, in float32 too.
FEW_ROWS = 61
# No multiples of a tile. Odd ones go without aligned rows, even ones may take the copy engine.
ODD, EVEN = (37, 45, 33), (48, 64, 80)
ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Network:
    """Hidden layers and an output layer."""

    layers: LayerCall
    dtype: torch.dtype
    parameters: list[Tensor]
    state: list[Tensor]
    """Of AdamW."""


Call = Callable[[Backend, Network], list[Tensor]]


def grads(backend: Backend, network: Network) -> list[Tensor]:
    return backend.layer_grads(network.layers, network.dtype)


def update(backend: Backend, network: Network) -> list[Tensor]:
    hyper = [0.1, 0.9, 0.99, 1e-8, 0.1, 1.0] * len(network.parameters)
    backend.layer_update_(network.layers, network.parameters, network.state, "adamw", hyper)
    return [*network.parameters, *network.state]


def taps(backend: Backend, network: Network) -> list[Tensor]:
    return backend.project_taps(taps_call(network.layers, network.dtype))


def hadamard(backend: Backend, network: Network) -> list[Tensor]:
    return [backend.hadamard(network.layers.error, 0.5)]


@dataclass(frozen=True)
class Check:
    """A call that has to launch this kernel; "tf32" is float32 through tensor cores."""

    kernel: str
    call: Call
    precision: str
    widths: tuple[int, ...]
    error_size: int
    rows: int = ROWS
    backend: str = "triton"

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.call.__name__} {self.precision}"


CHECKS = (
    Check("strip", grads, "tf32", ODD, 10, STRIP_ROWS),
    Check("strip", update, "bfloat16", EVEN, 10, STRIP_ROWS),
    Check("two_phase", grads, "bfloat16", EVEN, 70),
    Check("two_phase", update, "tf32", ODD, 70),
    Check("grouped_gemm", update, "bfloat16", EVEN, 10),
    Check("project_taps_kernel", taps, "tf32", ODD, 10),
    Check("hadamard_kernel", hadamard, "float32", ODD, 70),
)
"""A line is a kernel to compile: all that a tool is to see, and no more."""
CUDA_CHECKS = (
    Check("CUDA strip", grads, "float16", ODD, 10, FEW_ROWS, "cuda"),
    Check("CUDA strip", update, "float32", EVEN, 10, FEW_ROWS, "cuda"),
    Check("CUDA wide", grads, "float32", ODD, 70, ROWS, "cuda"),
    Check("CUDA wide", update, "float16", EVEN, 70, ROWS, "cuda"),
    Check("CUDA taps", taps, "float16", ODD, 70, ROWS, "cuda"),
)


def checks_here(by_triton: Sequence[Check]) -> list[Check]:
    """Triton's where Triton is used, and those of the CUDA C++ kernels where a library has code for the first GPU."""
    if not torch.cuda.is_available():
        return list(by_triton)
    major, minor = torch.cuda.get_device_capability(0)
    capability = 10 * major + minor
    usual = by_triton if capability >= OLDEST_FOR_TRITON else ()
    return [*usual, *(() if cuda.why_not(capability) else CUDA_CHECKS)]


def main(argv: list[str] | None = None) -> int:
    known = {check.name: check for check in (*CHECKS, *CUDA_CHECKS)}
    usual = [check.name for check in checks_here(CHECKS)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--checks", nargs="*", default=usual, choices=known, help="which to do; default all")
    options = parser.parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found: dict[str, Any] = {}
    for name in options.checks:
        row = found[name] = run(known[name], device)
        write(options.json, found)
        print(f"{name}: launched {row['launched']}, off by {row['off']:.1e} of the largest", flush=True)
    return 0 if all(known[name].kernel in row["launched"] for name, row in found.items()) else 1


def run(check: Check, device: torch.device) -> dict[str, Any]:
    """Which kernels a check launched, and the largest deviation as a share of the tensor's largest number."""
    # Without a GPU the kernels are interpreted, which is right in float32 only.
    can_be_half = device.type == "cuda" or check.backend == "cuda"
    dtype = HALVES.get(check.precision, torch.float32) if can_be_half else torch.float32
    ours, plain = make_network(check, dtype, device), make_network(check, dtype, torch.device("cpu"))
    planned = planned_by(kernel_planner(check.kernel)) if check.backend == "triton" else nullcontext()
    with tf32(check.precision == "tf32"), planned, launches() as launched:
        found = [tensor.cpu() for tensor in check.call(BACKENDS[check.backend], ours)]
    expected = check.call(torch_backend, plain)
    off = torch.stack([_distance(a, b) for a, b in zip(found, expected, strict=True)]).max().item()
    return {"launched": dict(launched), "correct": off <= ALLOWED[dtype], "off": off, "allowed": ALLOWED[dtype]}


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """The kernels that are started by their names within it, compiled or interpreted, and tasks of the library."""
    found: Counter[str] = Counter()
    launcher = KernelInterface.__getitem__

    def counted(kernel: Any, grid: Any) -> Any:
        found[kernel.__name__] += 1
        return launcher(kernel, grid)

    run, names = Library.run, {number: f"CUDA {name}" for name, number in TASKS.items()}

    def counted_run(library: Library, arguments: Any, *rest: Any) -> None:
        found[names[arguments.task]] += 1
        run(library, arguments, *rest)

    with mock.patch.object(KernelInterface, "__getitem__", counted), mock.patch.object(Library, "run", counted_run):
        yield found


def make_network(check: Check, dtype: torch.dtype, device: torch.device) -> Network:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def data(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def there(tensors: Any) -> list[Tensor]:
        return [tensor.to(device) for tensor in tensors]

    feedback, widths, hidden = dfa.Feedback(), check.widths, len(check.widths) - 1
    stored = feedback.stored(max(widths), check.error_size, torch.device("cpu"))
    inputs = [data(check.rows, width) for width in widths]
    saved = [data(check.rows, width).tanh() for width in widths[1:]]
    wanted = [True] * len(widths)
    layers = LayerCall(
        data(check.rows, check.error_size).to(device), there(stored), feedback.spec, there(inputs), there(saved),
        [None] * hidden, ["tanh"] * hidden, [0.0] * 2 * hidden, wanted, wanted,
    )  # fmt: skip
    sizes = zip([*widths[1:], check.error_size], widths, strict=True)
    parameters = [data(*shape) for out, width in sizes for shape in ((out, width), (out,))]
    # A second moment of zero would divide each gradient by itself.
    state = [torch.ones_like(parameter) for parameter in parameters for _ in range(2)]
    return Network(layers, dtype, there(parameters), there(state))


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    return (found.float() - expected.float()).abs().max() / expected.float().abs().max()


if __name__ == "__main__":
    sys.exit(main())
