"""What autocast must not reach: products whose precision is chosen here, and passes after one without a graph."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.torch_version import TorchVersion

from ._torch_internals import WithoutGradients, any_autocast_is_on

# Asked once: the compilers of torch 2.10 and 2.11 cannot look into the question. Some devices, meta among them, have no
# autocast and raise when asked for its state.
AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia") if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of a product's operands there; None where it is off."""
    # A device's type is slow to name.
    if not any_autocast_is_on():
        return None
    if device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding the operands of the products inside."""
    if autocast_dtype(device) is not None:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


# Autocast of torch 2.10 keeps a weight's cast as it was made, without a graph under torch.no_grad(). A pass that needs
# one would get it, and its gradients would end there. That of 2.13 makes each with its graph, so they are the caller's
# to keep; versions between count as old, since a cast too many changes no result.
CASTS_LACK_GRAPHS = TorchVersion(torch.__version__) < "2.13"


class WithoutGraph(WithoutGradients):
    """torch.no_grad(), after which no weight that autocast has cast inside lacks its graph."""

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if CASTS_LACK_GRAPHS:
            torch.clear_autocast_cache()
