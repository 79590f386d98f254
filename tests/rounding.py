"""How the normals of the kernels are rounded, told by their machine code: a JSON line for every architecture.

    python tests/rounding.py 80 90 ...

Fused multiply-adds of Box and Muller's formula beside those of the one square root in it; and the kinds of float32 sums
and products in its PTX and in that of Fastfood's diagonals, where ".rn" forbids ptxas to fuse two of them.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.predict import sass
from dfa_kernels.backends.triton.kernels.fastfood_tile import _parts
from dfa_kernels.backends.triton.kernels.random_tile import box_muller
from dfa_kernels.backends.triton.kernels.rounded import root


@triton.jit
def roots(words, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, root(tl.load(words + at).to(tl.float32)))


@triton.jit
def normals(words, out, N: tl.constexpr):
    at = tl.arange(0, N)
    word0 = tl.load(words + at).to(tl.uint32, bitcast=True)
    word1 = tl.load(words + N + at).to(tl.uint32, bitcast=True)
    cosine, sine = box_muller(word0, word1)
    tl.store(out + at, cosine)
    tl.store(out + N + at, sine)


@triton.jit
def diagonals(words, out, N: tl.constexpr):
    key = tl.load(words)
    _, _, gaussian, scaling = _parts(0, key, key, N, 6)
    tl.store(out + tl.arange(0, N), gaussian)
    tl.store(out + N + tl.arange(0, N), scaling)


def compiled(kernel: Any, arch: int) -> Any:
    source = ASTSource(
        fn=kernel, signature={"words": "*i32", "out": "*fp32", "N": "constexpr"}, constexprs={(2,): 128}, attrs={}
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


def fused(kernel: Any) -> int:
    code = sass.instructions(sass.disassembled(kernel.asm["cubin"]))
    return sum(line.opcode.startswith("FFMA") for line in code)


def arithmetic(*kernels: Any) -> list[str]:
    ptx = "".join(kernel.asm["ptx"] for kernel in kernels)
    return sorted(set(re.findall(r"\b(?:add|sub|mul|fma|div)\.[\w.]*f32\b", ptx)))


def main(archs: list[int]) -> None:
    for arch in archs:
        root, normal, diagonal = (compiled(kernel, arch) for kernel in (roots, normals, diagonals))
        found = {"arch": arch, "fused": fused(normal) - fused(root), "ptx": arithmetic(normal, diagonal)}
        print(json.dumps(found))


if __name__ == "__main__":
    main([int(name) for name in sys.argv[1:]])
