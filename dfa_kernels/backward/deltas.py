"""δ of a pass's taps: one after the other where all of them at once would take much memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backends
from ..backends import torch_backend
from ..backends.calls import TapsCall
from ..backends.torch_backend import SharedProjection
from ..feedback.projection import is_one_product

WORTH_TURNS = 2**28
"""So many bytes saved outweigh the launches for each tap that turns take in place of one for all."""


def deltas(backend: str, call: TapsCall) -> Iterator[Tensor]:
    """δ of every tap, the last one's first.

    Nothing here keeps a δ that was handed out, nor a saved tensor whose δ was. In turns e Uᵀ is made once, for all.
    """
    if not _takes_turns(backend, call):
        made = backends.BACKENDS[backend].project_taps(call)
        del call
        while made:
            yield made.pop()
        return
    shared, dtype, taps = _shared(backend, call), call.error.dtype, call.taps()
    del call
    while taps:
        yield torch_backend.delta_of(shared, dtype, *taps.pop())


def _takes_turns(backend: str, call: TapsCall) -> bool:
    return _is_torchs(backend) or _saving(call) >= WORTH_TURNS


def _is_torchs(backend: str) -> bool:
    """Whether this backend leaves taps to the torch backend."""
    return backends.BACKENDS[backend].project_taps is torch_backend.project_taps


def _saving(call: TapsCall) -> int:
    """Bytes of all δ but the largest, less those of e Uᵀ in float32."""
    rows, widest, itemsize = call.error.shape[0], max(call.sizes), call.error.dtype.itemsize
    each = [
        rows * size * (itemsize if h is None else h.dtype.itemsize)
        for size, h in zip(call.sizes, call.saved, strict=True)
    ]
    return sum(each) - max(each) - rows * widest * torch.float32.itemsize


def _shared(backend: str, call: TapsCall) -> SharedProjection:
    if _is_torchs(backend):
        return torch_backend.shared_projection(call.error, call.stored, call.feedback, max(call.sizes))
    (values,) = backends.BACKENDS[_maker(backend, call)].project_taps(_widest(call))
    return SharedProjection(values, call.feedback.normalize)


def _maker(backend: str, call: TapsCall) -> str:
    """The backend that makes e Uᵀ alone."""
    return "torch" if is_one_product(call.error.dtype, list(call.stored), call.feedback) else backend


def _widest(call: TapsCall) -> TapsCall:
    """The call for e Uᵀ alone, in float32: scaled for the widest tap, float16 would lose what smaller ones need."""
    return call._replace(
        error=call.error.to(torch.promote_types(call.error.dtype, torch.float32)),
        sizes=[max(call.sizes)],
        saved=[None],
        dropout_mask=[None],
        activations=["identity"],
        parameters=[0.0, 0.0],
    )


def describe(backend: str, call: TapsCall, device: torch.device) -> str:
    """What `deltas` runs for this call, in words. Reads shapes only."""
    if _is_torchs(backend) or not _takes_turns(backend, call):
        return backends.BACKENDS[backend].describe_taps(call, device)
    maker = _maker(backend, call)
    projection = "one product" if maker == "torch" else backends.BACKENDS[maker].describe_taps(_widest(call), device)
    return (
        f"e Uᵀ by {projection}; from it each tap's in its turn by the torch backend, which saves "
        f"{_saving(call) / 1e9:.2f} GB"
    )
