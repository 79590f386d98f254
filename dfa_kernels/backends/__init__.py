"""The backends, and which of them a device gets. A backend is a module with the operators of `ops.py`."""

from __future__ import annotations

import logging
from types import ModuleType

import torch

from . import torch_backend

logger = logging.getLogger("dfa_kernels")

BACKENDS: dict[str, ModuleType] = {"torch": torch_backend}

_announced: set[str] = set()


def check_backend(backend: str) -> str:
    """``backend`` itself, or a ValueError if there is none of that name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {['auto', *BACKENDS]}")
    return backend


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that ``backend`` means on ``device``."""
    return _automatic(device.type) if backend == "auto" else backend


@torch.compiler.assume_constant_result
def _automatic(device_type: str) -> str:
    chosen, reason = automatic_choice(device_type)
    if device_type not in _announced:
        _announced.add(device_type)
        logger.info("%s: backend %s (%s)", device_type, chosen, reason)
    return chosen


def automatic_choice(device_type: str) -> tuple[str, str]:
    """(backend, reason) for a device type."""
    return "torch", "the only backend of this version; it runs on every device"
