"""What the operators of `ops.py` take, and what a backend offers.

Shapes: error [R, E]; of layer i, inputs [R·T, in] and saved [R·T, out]. R are the rows that the error has too; the T
positions (1 for a plain batch) are units, so that the tap has T · out of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..feedback.spec import FeedbackSpec


class LayerCall(NamedTuple):
    """What `layer_grads` and `layer_update_` share: fused linear layers, all of them hidden but perhaps the last.

    ``saved``, ``dropout_mask`` and ``activations`` hold one entry a hidden layer, ``parameters`` two; one more input
    than that is the output layer, whose δ is the error.
    """

    error: Tensor
    stored: Sequence[Tensor]
    feedback: FeedbackSpec
    inputs: Sequence[Tensor]
    saved: Sequence[Tensor]
    dropout_mask: Sequence[Tensor | None]
    activations: Sequence[str]
    parameters: Sequence[float]
    weight_grads: Sequence[bool]
    bias_grads: Sequence[bool]

    def widths_out(self) -> list[int]:
        """Outputs of every layer."""
        output = [self.error.shape[1]] * (len(self.inputs) - len(self.saved))
        return [h.shape[1] for h in self.saved] + output


class TapsCall(NamedTuple):
    """What `project_taps` takes. Tap i has sizes[i] units; ``parameters`` holds two numbers for each activation."""

    error: Tensor
    stored: Sequence[Tensor]
    feedback: FeedbackSpec
    sizes: Sequence[int]
    saved: Sequence[Tensor | None]
    dropout_mask: Sequence[Tensor | None]
    activations: Sequence[str]
    parameters: Sequence[float]

    def taps(self) -> list[tuple[int, Tensor | None, Tensor | None, str, float, float]]:
        """Size, saved tensor, dropout mask, activation and its two numbers of every tap."""
        p, q = self.parameters[0::2], self.parameters[1::2]
        return list(zip(self.sizes, self.saved, self.dropout_mask, self.activations, p, q, strict=True))


class DeviceNumbers(NamedTuple):
    """The numbers of an update in the device's memory, so that a captured graph reads what they are at its replay."""

    table: Tensor
    """[parameters of the optimizer, numbers]: a row of the rule's, as `updates.UpdateRule.row` says, without
    gaps; kernels read them in float32."""
    rows: Sequence[int]
    """Which one is that of each parameter in the call."""

    def row(self, i: int) -> tuple[Tensor, ...]:
        """The numbers of the i-th parameter in the call."""
        return self.table[self.rows[i]].unbind()


def encoded(call: LayerCall | TapsCall) -> list[Any]:
    """The call as the registered operators take it: one argument after the other, the feedback as text."""
    return [value.encode() if isinstance(value, FeedbackSpec) else value for value in call]


class Backend(Protocol):
    """The operators, and in words what they run."""

    def project_taps(self, call: TapsCall) -> list[Tensor]:
        """δ of every tap from the error (paper, eq. 3 with the unified feedback matrix of eq. 7–8).

        Tap i with a saved tensor [R, sizes[i]] gives δa = (e B_iᵀ) ⊙ f'(saved) ⊙ dropout_mask in saved's dtype; without
        one δh = e B_iᵀ in the error's dtype.
        """

    def layer_grads(self, call: LayerCall, dtype: torch.dtype) -> list[Tensor]:
        """Gradients of every fused linear layer: ΔW_i = δa_iᵀ x_i and Δb_i = Σ δa_i.

        The result lists each layer's weight and bias gradient, those asked for, in ``dtype``.
        """

    def layer_update_(
        self,
        call: LayerCall,
        weights: Sequence[Tensor],
        state: Sequence[Tensor],
        rule: str,
        hyper: Sequence[float] | DeviceNumbers,
    ) -> None:
        """`layer_grads` and the optimizer's update in one.

        ``weights`` are the parameters in the order of `layer_grads`' result; ``state`` and ``hyper`` hold an equal
        share for each of them. `DeviceNumbers` are on the device of the weights.
        """

    def hadamard(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """scale · H x along the last dimension of x [..., n]; see `dfa_kernels.functional.hadamard_transform`."""

    def describe_layers(self, call: LayerCall, dtype: torch.dtype, rule: str, device: torch.device) -> str:
        """What `layer_grads` (rule "store") or `layer_update_` runs for this call. Reads shapes only."""

    def describe_taps(self, call: TapsCall, device: torch.device) -> str:
        """What `project_taps` runs for this call. Reads shapes only."""
