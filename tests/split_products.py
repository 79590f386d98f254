"""Prints, in their order, the products of bfloat16 that Triton makes of one in "bf16x6" for sm_90.

    python tests/split_products.py

A program of its own, since it runs under several versions of Triton and needs real kernels.
"""

from __future__ import annotations

import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="bf16x6"))


def names_of_parts(code: str) -> dict[str, str]:
    """ "high", "mid" or "low" for every value that is one: each is what is left by those before, rounded."""
    rounded = re.findall(r"(%[\w#]+) = arith\.truncf", code)
    names = dict(zip(rounded, ("high", "mid", "low") * 2, strict=True))
    # A part keeps its name in whatever layout and memory it goes through.
    for name, source in re.findall(
        r"(%[\w#]+) = (?:ttg\.local_alloc|ttg\.convert_layout|ttg\.local_load) (%[\w#]+)", code
    ):
        if source in names:
            names[name] = names[source]
    return names


def main() -> None:
    source = ASTSource(fn=product, signature=dict.fromkeys(("a", "b", "out"), "*fp32"), constexprs={})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttgir"]
    names = names_of_parts(code)
    for match in re.finditer(r"warp_group_dot (%[\w#]+), (%[\w#]+)|cmpf (uno)", code):
        print("no-nan" if match[3] else f"{names[match[1]]}*{names[match[2]]}")


if __name__ == "__main__":
    main()
