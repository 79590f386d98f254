"""The operators by the CUDA C++ kernels of `csrc/`, for GPUs whose tensor cores Triton leaves idle.

operators.py (what is called) → plan.py (which launches, and why) → library.py (the library, found and checked). What a
call looks like, and what the library is told of it, is in ../csrc/, for the CPU's library as well; where an update's
numbers are is in numbers.py; describe.py says a plan in words.
"""

from ...feedback.hadamard import hadamard_by_products as hadamard
from .describe import describe_layers, describe_taps
from .library import describe_library, why_not
from .operators import check_device, layer_grads, layer_update_, project_taps

__all__ = [
    "check_device",
    "describe_layers",
    "describe_library",
    "describe_taps",
    "hadamard",
    "layer_grads",
    "layer_update_",
    "project_taps",
    "why_not",
]
