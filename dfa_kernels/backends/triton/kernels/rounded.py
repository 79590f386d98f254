"""Sums, products and roots of float32 that are rounded one by one, so that they are the same bits on every device.

Left to itself the compiler fuses a product with the sum that it goes into, which rounds once where the definition of U
(`dfa_kernels.feedback.philox`) rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:
    # NumPy fuses nothing, and the interpreter knows no device library.
    @triton.jit
    def product(a, b):
        """a · b, rounded to nearest."""
        return a * b

    @triton.jit
    def total(a, b):
        """a + b, rounded to nearest."""
        return a + b

    @triton.jit
    def root(x):
        """sqrt(x), rounded to nearest."""
        return tl.sqrt_rn(x)

    @triton.jit
    def nearest_tf32(x):
        """float32 rounded to the 10 bits of mantissa that tensor cores read; ties away from zero."""
        nearest = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x)

else:

    @triton.jit
    def product(a, b):
        """a · b, rounded to nearest."""
        return tl.extra.libdevice.mul_rn(a, b)

    @triton.jit
    def total(a, b):
        """a + b, rounded to nearest."""
        return tl.extra.libdevice.add_rn(a, b)

    @triton.jit
    def root(x):
        """sqrt(x), rounded to nearest, of 0 and of numbers that are neither tiny nor huge (2^±100).

        The steps that sqrt.rn takes for these, without its branch to a subroutine for others: a thread with dozens of
        such branches keeps ptxas for minutes.
        """
        reciprocal = tl.rsqrt(x)
        near = product(x, reciprocal)
        missing = tl.fma(product(near, -1.0), near, x)
        return tl.where(x > 0, tl.fma(missing, product(reciprocal, 0.5), near), x)

    @triton.jit
    def nearest_tf32(x):
        """float32 rounded to the 10 bits of mantissa that tensor cores read; ties away from zero."""
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def step(a, b, c):
    """a · b + c, rounded after the product and after the sum: a step of Horner's rule."""
    return total(product(a, b), c)
