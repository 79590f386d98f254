"""The operators on a CPU: a small network's gradients in one call of C++ (`csrc/cpu.cpp`), all else by torch.

operators.py (what is called) → plan.py (which calls are small, and what the library is told) → library.py.
"""

from ..torch_backend import describe_taps, hadamard, project_taps
from .library import describe_library, why_not
from .operators import check_device, describe_layers, layer_grads, layer_update_

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
