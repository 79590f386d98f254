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
def step(a, b, c):
    """a · b + c, rounded after the product and after the sum: a step of Horner's rule."""
    return total(product(a, b), c)
