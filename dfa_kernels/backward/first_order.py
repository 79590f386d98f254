"""What the nodes refuse: a derivative of their derivatives."""

from __future__ import annotations

import torch


def refuse_second_order() -> None:
    """RuntimeError within a backward pass of create_graph=True. A compiler traces with gradients on in any case."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph: got True, expected False; DFA's gradients are made without a graph and have no derivatives; "
            "use `with model.backprop():` around the forward pass for a loss of second order, a gradient penalty for "
            "example"
        )
