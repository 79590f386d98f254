"""All that training steps change, kept to be put back: as if they had not been."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._torch_internals import tensors_by_name
from .optim import FusedOptimizer


class TrainingState:
    """Copies of parameters, buffers, an optimizer's and a scaler's state, and the host's random numbers."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._tensors = [(*held, held[2].clone()) for held in tensors_by_name(model)]
        self._of_optimizer = {p: _copied(state) for p, state in optimizer.state.items()}
        self._of_scaler = None if scaler is None else scaler.state_dict()
        self._random = torch.get_rng_state()
        self.lost_state = False
        """Whether the optimizer had to lose state that it did not have before."""
        self.replaced_tensors = False
        """Whether the model had come to hold other parameters or buffers."""

    @torch.no_grad()
    def restore(self) -> None:
        """Puts all back, into the same memory."""
        for holder, name, tensor, kept in self._tensors:
            self.replaced_tensors |= holder[name] is not tensor
            holder[name] = tensor.copy_(kept)
        state = self._optimizer.state
        for p in list(state):
            kept_of_p = self._of_optimizer.get(p, {})
            self.lost_state |= any(name not in kept_of_p for name in state[p])
            if p in self._of_optimizer:
                state[p] = {name: _put_back(*value) for name, value in kept_of_p.items()}
            else:
                del state[p]
        if isinstance(self._optimizer, FusedOptimizer):
            self._optimizer.forget_counts()
        if self._scaler is not None:
            self._scaler.load_state_dict(self._of_scaler or {})
        torch.set_rng_state(self._random)


def _copied(state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each value, and a copy of what it is now."""
    return {name: (value, value.clone() if isinstance(value, Tensor) else value) for name, value in state.items()}


def _put_back(value: Any, kept: Any) -> Any:
    return value.copy_(kept) if isinstance(value, Tensor) else kept
