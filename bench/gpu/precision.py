"""The precision of float32 products: in full or through tensor cores, and what the latter does to their factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LOST_BITS = 13
"""tf32 has 10 bits of mantissa, float32 has 23."""

PRODUCTS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.bmm.default: (0, 1),
}
"""Which arguments are factors."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within it torch may, or may not, round the factors of float32 products to tf32."""
    before = torch.get_float32_matmul_precision()
    # The oldest of torch's several switches: all the others follow it.
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class TruncatedProducts(TorchDispatchMode):
    """Every float32 product has its factors cut to tf32, as tensor cores do that are given float32 as it is.

    On any device: a plain product in the same precision for results from tensor cores. Libraries may round the factors
    to nearest instead, with half the error.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = list(args)
        for i in PRODUCTS.get(func, ()):
            args[i] = truncated(args[i])
        return func(*args, **(kwargs or {}))


def truncated(tensor: Tensor) -> Tensor:
    """A float32 tensor with the bits that tf32 lacks set to zero; another tensor as it is."""
    if tensor.dtype != torch.float32:
        return tensor
    return (tensor.contiguous().view(torch.int32) & -(1 << LOST_BITS)).view(torch.float32)
