"""What Triton makes of a product whose tile has a second use: a JSON line each for sm_90 and sm_100.

    python tests/second_use.py

A program of its own, since it runs under several versions of Triton and needs real kernels.
"""

from __future__ import annotations

import json

import async_products
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}


@triton.jit
def product(
    delta, x, out, sums, length, width,
    SECOND_USE: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """δᵀ x and the sums of δ, which are a second use of its tiles."""
    row, m, n = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    width = width // 16 * 16
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if TMA:
        delta_view = tl.make_tensor_descriptor(delta, [length, width], [width, 1], [BLOCK_K, BLOCK_M])
        x_view = tl.make_tensor_descriptor(x, [length, width], [width, 1], [BLOCK_K, BLOCK_N])
    for first in range(0, length, BLOCK_K):
        if TMA:
            delta_tile, x_tile = delta_view.load([first, 0]), x_view.load([first, 0])
        else:
            inside = (first + row < length)[:, None]
            delta_tile = tl.load(delta + (first + row)[:, None] * width + m[None, :], mask=inside, other=0.0)
            x_tile = tl.load(x + (first + row)[:, None] * width + n[None, :], mask=inside, other=0.0)
        gradient = tl.dot(tl.trans(delta_tile), x_tile, gradient)
        if SECOND_USE:
            total += tl.sum(delta_tile.to(tl.float32), axis=0)
    tl.store(out + m[:, None] * width + n[None, :], gradient)
    tl.store(sums + m, total)


def overwritten(arch: int, dtype: str, second_use: bool, tma: bool) -> list[str]:
    types = {"delta": f"*{dtype}", "x": f"*{dtype}", "out": "*fp32", "sums": "*fp32", "length": "i32", "width": "i32"}
    constants = {"SECOND_USE": second_use, "TMA": tma, **BLOCKS}
    names = product.arg_names
    source = ASTSource(
        fn=product,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    options = {"num_warps": 8, "num_stages": 3}
    return async_products.overwritten(
        triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ttgir"]
    )


def main() -> None:
    for arch in (90, 100):
        for dtype in ("fp16", "bf16"):
            for second_use in (False, True):
                for tma in (False, True):
                    about = {"triton": triton.__version__, "arch": arch, "dtype": dtype}
                    found = overwritten(arch, dtype, second_use, tma)
                    print(json.dumps({**about, "second_use": second_use, "tma": tma, "overwritten": found}))


if __name__ == "__main__":
    main()
