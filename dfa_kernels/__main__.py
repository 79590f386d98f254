"""`python -m dfa_kernels`: what is installed, which backend each device gets and why, what is missing."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__
from .backends import BACKENDS, automatic_choice


def main() -> None:
    """Prints the report."""
    print(f"dfa_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for package in ("triton", "numpy"):
        print(f"{package}: {_version(package) or 'not installed'}")
    for device, name in _devices():
        backend, reason = automatic_choice(device)
        print(f"{name}: backend {backend} ({reason})")
    if not torch.cuda.is_available():
        print("no CUDA device is visible to torch")
    print(f"backends of this version: {', '.join(BACKENDS)}")


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
