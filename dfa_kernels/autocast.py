"""What autocast must not reach: products whose precision is chosen here, and passes after one without a graph."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding the operands of the products inside."""
    # Some devices, meta among them, have none and raise when asked for its state.
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


# The compilers of torch 2.10 and 2.11 cannot look into torch.amp.is_autocast_available.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


class WithoutGraph(torch.no_grad):
    """torch.no_grad(), with whose end autocast forgets the weights that it has cast.

    In torch 2.10 a pass that needs a graph would get these casts, too, and its gradients would end at them.
    """

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.clear_autocast_cache()
