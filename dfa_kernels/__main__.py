"""`python -m dfa_kernels`: what is installed, which backend each device gets, what it runs there, what is missing."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import textwrap

import torch
from torch import nn

from . import DFA, __version__
from .backends import BACKENDS, automatic_choice
from .backends.cpu import describe_library as describe_cpu_library
from .backends.cuda import describe_library as describe_cuda_library
from .optim import SGD


def main() -> None:
    """Prints the report."""
    print(f"dfa_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for package in ("triton", "numpy"):
        print(f"{package}: {_version(package) or 'not installed'}")
    print(f"C++ for CPUs: {describe_cpu_library()}")
    print(f"CUDA C++: {describe_cuda_library()}")
    for device, name in _devices():
        backend, reason = automatic_choice(device)
        print(f"{name}: backend {backend} ({reason})")
        print(textwrap.indent(_example(device), "  "))
    if not torch.cuda.is_available():
        print("no CUDA device is visible to torch")
    print(f"backends of this version: {', '.join(BACKENDS)}")


def _example(device: torch.device) -> str:
    """The plan of a backward pass and SGD's update of the paper's network for CIFAR-10."""
    widths = (3072, 800, 800, 800)
    hidden = [m for pair in itertools.pairwise(widths) for m in (nn.Linear(*pair, device=device), nn.Tanh())]
    model = DFA(nn.Sequential(*hidden, nn.Linear(widths[-1], 10, device=device)))
    optimizer = SGD(model, lr=0.01)
    model(torch.zeros(128, widths[0], device=device))
    return f"for example {'-'.join(map(str, widths))}-10, batch 128, {type(optimizer).__name__}:\n{model.plan()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[torch.device, str]]:
    """The CPU and every visible CUDA device, each with its name."""
    devices = [(torch.device("cpu"), f"cpu, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        capability = "".join(map(str, torch.cuda.get_device_capability(i)))
        devices.append((torch.device("cuda", i), f"cuda:{i} {torch.cuda.get_device_name(i)}, sm_{capability}"))
    return devices


if __name__ == "__main__":
    main()
