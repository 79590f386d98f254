"""Where the library's kernels run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..._torch_internals import raw_stream


def on_stream(device: torch.device, call: Callable[..., None], *arguments: Any) -> None:
    """call(*arguments, number of the device, its current stream), with the device as the current one."""
    if device.type != "cuda":
        call(*arguments, 0, 0)
    elif device.index == torch.cuda.current_device():
        call(*arguments, device.index, raw_stream(device.index))
    else:
        with torch.cuda.device(device):
            call(*arguments, device.index, raw_stream(device.index))
