"""The backends, and which of them a device gets. A backend is a module; what it offers says `calls.py`."""

from __future__ import annotations

import importlib.util
import logging

import torch

from .._torch_internals import constant_when_compiled
from . import cpu as cpu_backend
from . import cuda as cuda_backend
from . import torch_backend
from .calls import Backend

logger = logging.getLogger("dfa_kernels")

OLDEST_FOR_TRITON = 80
"""sm_70 and sm_75 have tensor cores that Triton no longer uses."""
OLDEST_FOR_CUDA = 70
"""Of the GPUs that have tensor cores the oldest."""

BACKENDS: dict[str, Backend] = {"torch": torch_backend, "cpu": cpu_backend, "cuda": cuda_backend}

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from . import triton as triton_backend

    BACKENDS["triton"] = triton_backend

_announced: set[torch.device] = set()


def check_backend(backend: str) -> str:
    """``backend`` itself, or a ValueError if there is none of that name."""
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend: got 'triton', but the package triton is not installed; use 'auto' or 'torch'")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {['auto', *BACKENDS]}")
    return backend


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that ``backend`` means on ``device``; ValueError if it cannot run there."""
    if backend == "auto":
        chosen: str = _automatic(device.type, device.index)
        return chosen
    if backend == "triton":
        triton_backend.check_device(device)
    if backend == "cuda":
        cuda_backend.check_device(device)
    if backend == "cpu":
        cpu_backend.check_device(device)
    return backend


@constant_when_compiled
def _automatic(device_type: str, index: int | None) -> str:
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    chosen, reason = automatic_choice(device)
    if device not in _announced:
        _announced.add(device)
        logger.info("%s: backend %s (%s)", device, chosen, reason)
    return chosen


def automatic_choice(device: torch.device) -> tuple[str, str]:
    """(backend, reason) for a device."""
    if device.type == "cpu" and not cpu_backend.why_not():
        return "cpu", "C++ for all layers of small networks, for others torch"
    if device.type != "cuda":
        return "torch", "the fastest on this kind of device"
    if torch.version.hip is not None:
        return "torch", "the kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    capability = major * 10 + minor
    if capability < OLDEST_FOR_TRITON:
        reason = f"sm_{capability}: Triton uses tensor cores from sm_{OLDEST_FOR_TRITON} on"
        if capability < OLDEST_FOR_CUDA:
            return "torch", reason
        missing = cuda_backend.why_not(capability)
        return ("torch", f"{reason}; {missing}") if missing else ("cuda", f"{reason}, CUDA C++ here as well")
    if not HAS_TRITON:
        return "torch", "the package triton is not installed"
    return "triton", f"one launch for all layers on sm_{capability}"
