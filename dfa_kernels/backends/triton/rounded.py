"""Sums and products of float32 that are rounded one by one, so that they are the same bits on every device.

Left to itself the compiler fuses a product with the sum that it goes into, which rounds once where the definition of U
(`dfa_kernels.philox`) rounds twice.
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
def step(a, b, c):
    """a · b + c, rounded after the product and after the sum: a step of Horner's rule."""
    return total(product(a, b), c)
