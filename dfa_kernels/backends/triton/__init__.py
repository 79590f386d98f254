"""The operators as Triton kernels: one launch for all layers, or two where the layers are wide.

operators.py (what is called) → route.py → choice.py (which kernel, and why) → plan_….py (one for each: its grid and
constants) → launch.py → kernels/. What decides a plan is in problem.py, where U comes from in source.py, tiles in
configs.py; describe.py says it in words. transform.py is the Walsh–Hadamard transform.
"""

from .describe import describe_layers, describe_taps
from .launch import check_device
from .operators import layer_grads, layer_update_, project_taps
from .transform import hadamard

__all__ = [
    "check_device",
    "describe_layers",
    "describe_taps",
    "hadamard",
    "layer_grads",
    "layer_update_",
    "project_taps",
]
