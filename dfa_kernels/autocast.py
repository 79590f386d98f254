"""What autocast must not reach: products whose precision is chosen here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast would round operands on this device; some devices, meta among them, have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding the operands of the products inside."""
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()
