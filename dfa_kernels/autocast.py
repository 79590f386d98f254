"""What autocast must not reach: products whose precision is chosen here, and passes after one without a graph."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.torch_version import TorchVersion


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


# Autocast of torch 2.10 keeps a weight's cast as it was made, without a graph under torch.no_grad(). A pass that needs
# one would get it, and its gradients would end there. That of 2.13 makes each with its graph, so they are the caller's
# to keep; versions between count as old, since a cast too many changes no result.
CASTS_LACK_GRAPHS = TorchVersion(torch.__version__) < "2.13"


class WithoutGraph(torch.no_grad):
    """torch.no_grad(), after which no weight that autocast has cast inside lacks its graph."""

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if CASTS_LACK_GRAPHS:
            torch.clear_autocast_cache()
