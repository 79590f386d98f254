"""The operators as Triton kernels: one launch for all layers.

layers.py (the operators) → route.py → plan.py (what will run, and why) → launch.py → one_phase.py or two_phase.py (the
kernels); taps.py → project_taps.py. Tiles of U and of the projection come from feedback_tile.py (structured ones from
fastfood_tile.py and hadamard_tile.py), δ from delta.py. hadamard.py is the transform by itself.
"""

from .describe import describe_layers, describe_taps
from .hadamard import hadamard
from .launch import check_device
from .layers import layer_grads, layer_update_
from .taps import project_taps

__all__ = [
    "check_device",
    "describe_layers",
    "describe_taps",
    "hadamard",
    "layer_grads",
    "layer_update_",
    "project_taps",
]
