"""Whether a warp of its own can load the tiles of a wide network's gradients."""

from __future__ import annotations

from importlib.util import find_spec

import triton

from .configs import ProducerConfig
from .launch import INTERPRETED
from .launch_plan import LaunchPlan, gradient_tiles
from .problem import Target

VERSIONS = ("3.6", "3.7", "3.9")
"""Of Triton, whose Gluon compiles the kernel; Gluon promises no version's programs to the next."""
CONFIG = ProducerConfig(
    block_m=128, block_n=256, block_k=64, group_m=8, programs=1, num_warps=8, num_stages=4, needs_tma=True
)
MOST_LAYERS = 8
"""Of more, what the warp that loads has to know does not fit into its registers, as machine code shows."""


def reason_without_gluon(version: str, interpreted: bool, installed: bool) -> str:
    """Why the kernel cannot run under this version of Triton; empty if it can."""
    if interpreted:
        return "Triton's interpreter does not know Gluon"
    if not installed or version.split(".")[:2] not in [known.split(".") for known in VERSIONS]:
        return f"Gluon is known of Triton {', '.join(VERSIONS)}, this is {version}"
    return ""


# The parent first: of a module without one find_spec says nothing, it raises.
_INSTALLED = all(map(find_spec, ("triton.experimental", "triton.experimental.gluon")))
NO_GLUON = reason_without_gluon(triton.__version__, INTERPRETED, _INSTALLED)
"""Of this process."""


def reason_without(plan: LaunchPlan, target: Target, no_gluon: str) -> str:
    """Why this plan of `grouped_gemm` stays as it is; empty if it is to be made with CONFIG. no_gluon: NO_GLUON."""
    if target.capability != 90 or not plan.uses_tma:
        return "it is for sm_90 and TMA"
    if len(plan.problem.widths_in) > MOST_LAYERS:
        return f"it is for up to {MOST_LAYERS} layers"
    if gradient_tiles(plan.problem, CONFIG) < target.multiprocessors:
        return f"tiles of {CONFIG.block_m} × {CONFIG.block_n} do not fill the GPU"
    return no_gluon
