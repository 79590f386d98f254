"""Direct Feedback Alignment for PyTorch: hidden layers learn from a random projection of the output error."""

from . import functional, ops, optim
from .alignment import Alignment, alignment
from .feedback import Feedback
from .feedback.memory import feedback_memory
from .forward.side_loss import side_loss
from .forward.taps import Tap, TapInfo
from .graphed_step import GraphedStep
from .wrapper import DFA

__version__ = "0.1.0"

__all__ = [
    "DFA",
    "Alignment",
    "Feedback",
    "GraphedStep",
    "Tap",
    "TapInfo",
    "alignment",
    "feedback_memory",
    "functional",
    "ops",
    "optim",
    "side_loss",
]
