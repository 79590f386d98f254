"""The fast Walsh-Hadamard transform as a few small matrix products; the operator dfa_kernels::hadamard."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast

MAX_RADIX_BITS = 5
# Bit x is the parity of the binary digits of x, for x in 0 .. 31.
PARITY = 0x96696996


def padded_bits(n: int) -> int:
    """The smallest k with 2^k >= n."""
    return (n - 1).bit_length()


def sylvester(bits: int, like: Tensor, scale: float = 1.0) -> Tensor:
    """scale · the Hadamard matrix of order 2^bits <= 32, Sylvester's, typed and placed like `like`."""
    index = torch.arange(2**bits, device=like.device)
    odd = torch.bitwise_right_shift(PARITY, index[:, None] & index) & 1
    return (1 - 2 * odd).to(like.dtype) * scale


def walsh_hadamard(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale · H x along the middle dimension of a contiguous x [outer, 2^k, inner], in x's dtype; a new
    tensor.

    H factors into Kronecker products of matrices of order <= 32, applied one after the other.
    """
    outer, length, inner = x.shape
    stages = _stage_bits(padded_bits(length))
    if not stages:
        return x * scale
    stride = length
    for position, bits in enumerate(stages):
        stride >>= bits
        factor = sylvester(bits, x, scale if position == 0 else 1.0)
        x = _apply_factor(factor, x.view(outer * (length >> bits) // stride, 2**bits, stride * inner))
    return x.view(outer, length, inner)


def _stage_bits(bits: int) -> list[int]:
    stages = -(-bits // MAX_RADIX_BITS)
    return [bits // stages + (index < bits % stages) for index in range(stages)]


def _apply_factor(factor: Tensor, x: Tensor) -> Tensor:
    if x.shape[2] == 1:
        return x[:, :, 0] @ factor
    return torch.bmm(factor.expand(x.shape[0], -1, -1), x)


torch.library.define("dfa_kernels::hadamard", "(Tensor x, float scale=1.0) -> Tensor")
hadamard = torch.ops.dfa_kernels.hadamard.default


def hadamard_by_products(x: Tensor, scale: float = 1.0) -> Tensor:
    """The operator for any n and device."""
    n = x.shape[-1]
    length = 1 << padded_bits(n)
    work = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.numel() // n, n)
    with without_autocast(x.device):
        result = walsh_hadamard(F.pad(work, (0, length - n)).contiguous()[:, :, None], scale)
    return result[:, :n, 0].to(x.dtype).contiguous().view(x.shape)


torch.library.impl("dfa_kernels::hadamard", "CompositeExplicitAutograd", hadamard_by_products)


def _hadamard_fake(x: Tensor, scale: float = 1.0) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


torch.library.register_fake("dfa_kernels::hadamard", _hadamard_fake)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.scale = inputs[1]


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    # H is symmetric and cutting the output is the adjoint of padding the input: the operator is its own
    # adjoint.
    return hadamard(grad, ctx.scale), None


torch.library.register_autograd("dfa_kernels::hadamard", _hadamard_backward, setup_context=_setup_context)


class HadamardFunction(torch.autograd.Function):
    """The operator with forward mode, and for torch.func: a registered operator has neither."""

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        result: Tensor = hadamard(x, scale)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return HadamardFunction.apply(grad, ctx.scale), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return HadamardFunction.apply(tangent, ctx.scale)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, scale: float) -> tuple[Any, int]:
        return HadamardFunction.apply(x.movedim(in_dims[0], 0), scale), 0
