"""`DFA`: wraps any network so that its hidden layers learn from the projected error."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends
from .backward.deferred import Ledger
from .backward.node import attach
from .backward.step_plan import Sketch, StepPlan, sketch, step_plan
from .feedback import Feedback
from .forward.record import Pass, recorded
from .forward.segments import FusedLayer, Segment, SegmentedPass
from .forward.sequence import plain_modules, run_sequence
from .forward.taps import OutputTap, Tap, TapInfo, TapPolicy, tap_names
from .forward.weight_layers import count_weight_layers

if TYPE_CHECKING:
    from .optim import FusedOptimizer


class DFA(nn.Module):
    """A network trained by Direct Feedback Alignment (Launay, Poli, Krzakala 2019, eq. 3, 7 and 8).

    Called like ``net`` and followed by the usual ``loss.backward()``, it fills ``.grad`` of every parameter: of those
    before a tap from e B_iᵀ, where e = ∂L/∂output [b, E], and of those after the last tap from the true gradient.

    Args:
        net: any module that returns one tensor, [b, E] (or [b], taken as [b, 1]; or [b, T, E], where the leading
            dimensions that a tap shares with the output are rows and its others are units). It is not copied.
        feedback: the random projection shared by all taps.
        taps: where the error is injected. "nonlinearity": after the activation that follows a weight layer (Linear or
            Conv), except after the last one. "layer_input": at the input of each weight layer but the first, so after
            pooling, batch norm and dropout. A list of submodule names: at their outputs. If ``net`` holds `Tap`
            modules, those are the taps.
        backend: "auto" or the name of one of the backends.

    Raises:
        ValueError: unknown taps or backend, or a network in which no tap can be placed.
        TypeError: ``net``, ``feedback`` or ``taps`` of the wrong type, or an output that is not one tensor.
    """

    def __init__(
        self,
        net: nn.Module,
        feedback: Feedback | None = None,
        *,
        taps: str | Sequence[str] = "nonlinearity",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: got {type(net).__name__}, expected a torch.nn.Module")
        if feedback is not None and not isinstance(feedback, Feedback):
            raise TypeError(f"feedback: got {type(feedback).__name__}, expected a dfa_kernels.Feedback")
        self.net = net
        self.feedback = Feedback() if feedback is None else feedback
        self.backend = backends.check_backend(backend)
        self._policy = _place_marks(net, taps)
        self._weight_layers: int | None = None
        self._taps: tuple[TapInfo, ...] | None = None
        self._error_size: int | None = None
        self._looks: tuple[Any, ...] | None = None
        self._sketch: Sketch | None = None
        self._backprop = False
        self._optimizer: weakref.ref[FusedOptimizer] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and not self._backprop:
            return self._pass(args, kwargs)
        if self._taps is None and self._can_look_for_taps():
            with torch.enable_grad():
                return self._pass(args, kwargs).detach()
        return _one_tensor(self.net(*args, **kwargs))

    @property
    def taps(self) -> list[TapInfo]:
        """The taps in the order of the forward pass.

        Raises:
            RuntimeError: before the first forward pass, which finds them.
        """
        if self._taps is None:
            raise RuntimeError("taps: they are found by the first forward pass, and there has been none yet")
        return list(self._taps)

    def feedback_matrix(self, name: str) -> Tensor:
        """B_i [l_i, E] in use at the tap ``name``, scaled, in the feedback's dtype."""
        sizes = {tap.name: tap.size for tap in self.taps}
        if name not in sizes:
            raise ValueError(f"name: got {name!r}, expected one of the taps {list(sizes)}")
        assert self._error_size is not None
        return self.feedback.matrix(sizes[name], self._error_size)

    def plan(self) -> StepPlan:
        """What the backward pass of a forward pass like the last one runs, and why; for people: print it.

        Raises:
            RuntimeError: before the first forward pass.
        """
        if self._sketch is None:
            raise RuntimeError("plan: it follows from a forward pass, and there has been none yet")
        optimizer = None if self._optimizer is None else self._optimizer()
        return step_plan(self._sketch, None if optimizer is None else optimizer.rule)

    @contextlib.contextmanager
    def backprop(self) -> Iterator[None]:
        """Within it the same network learns by exact backpropagation."""
        before, self._backprop = self._backprop, True
        try:
            yield
        finally:
            self._backprop = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.nn.Module; what a fused optimizer has deferred is dropped as well."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            optimizer.drop_deferred()
        super().zero_grad(set_to_none)

    def get_extra_state(self) -> dict[str, Any]:
        return {"feedback": self.feedback.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.feedback = Feedback.from_state_dict(state["feedback"], device=self.feedback.device)
        self._looks = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no optimizer, and has seen no pass."""
        return {**self.__dict__, "_optimizer": None, "_looks": None, "_sketch": None}

    def extra_repr(self) -> str:
        return f"feedback={self.feedback!r}, backend={self.backend!r}"

    def _pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        seen = recorded(*self._run_segments(args, kwargs), self.feedback, self.backend)
        if self._taps is None or not torch.compiler.is_compiling():
            self._remember(seen)
        return attach(seen, self._ledger())

    def _run_segments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Segment], FusedLayer | None]:
        if self._policy.kind != "named":
            modules = plain_modules(self.net, args, kwargs)
            if modules is not None:
                return run_sequence(modules, args[0], self._policy.kind == "nonlinearity")
        segmented = SegmentedPass(self._policy, self._expected_layers(args, kwargs))
        with segmented:
            output = _one_tensor(self.net(*args, **kwargs))
        last = segmented.finish(output)
        self._check_pass(segmented)
        return output, segmented.segments, last

    def _can_look_for_taps(self) -> bool:
        return not (self._backprop or torch.compiler.is_compiling() or torch.is_inference_mode_enabled())

    def _expected_layers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if self._policy.kind == "nonlinearity" and self._weight_layers is None:
            self._weight_layers = count_weight_layers(self.net, args, kwargs)
        return -1 if self._weight_layers is None else self._weight_layers

    def _remember(self, seen: Pass) -> None:
        """What `taps` and `plan` tell; nothing to do as long as passes look the same."""
        units = tuple([segment.units for segment in seen.segments])
        learning = tuple([_learning(layer) for layer in (seen.last, *[segment.layer for segment in seen.segments])])
        looks = (units, seen.rows, seen.error_size, seen.output.dtype, seen.output.device, learning)
        if looks == self._looks:
            return
        names = tap_names(self.net, [segment.origin for segment in seen.segments])
        self._taps = tuple(TapInfo(n, u, math.prod(u)) for n, u in zip(names, units, strict=True))
        self._looks, self._error_size = looks, seen.error_size
        if not torch.compiler.is_compiling():
            self._sketch = sketch(seen)

    def _check_pass(self, segmented: SegmentedPass) -> None:
        if self._policy.kind == "named":
            _check_names(self._policy, segmented)
        elif segmented.weight_layers_seen < 2:
            raise ValueError(
                f"net: it has {segmented.weight_layers_seen} weight layer(s) (Linear, Conv), so none before the last; "
                "DFA needs at least one"
            )
        elif self._policy.kind == "nonlinearity":
            self._check_activations(segmented)

    def _check_activations(self, segmented: SegmentedPass) -> None:
        expected = self._weight_layers
        if segmented.weight_layers_seen != expected:
            self._weight_layers = None
            raise RuntimeError(
                f"net: {segmented.weight_layers_seen} weight layers ran in this pass, expected {expected}; after a "
                'change of the network run the pass again; for one whose depth varies use taps="layer_input"; before '
                "torch.compile run one pass without it"
            )
        if segmented.points_seen == 0:
            raise ValueError(
                'net: no activation was found between its weight layers; use taps="layer_input", a list of submodule '
                "names, or dfa_kernels.Tap() modules"
            )
        if segmented.points_seen == segmented.points_without_grad:
            raise ValueError(
                "net: every tap lies where gradients are off: under torch.no_grad() or in a checkpoint with "
                "use_reentrant=True; use use_reentrant=False"
            )

    def _ledger(self) -> Ledger | None:
        optimizer = None if self._optimizer is None else self._optimizer()
        return None if optimizer is None else optimizer.ledger_for_pass()


def _learning(layer: FusedLayer | None) -> tuple[Any, ...] | None:
    """What may change from pass to pass in how a layer learns."""
    if layer is None:
        return None
    bias = layer.bias is not None and layer.bias.requires_grad
    return layer.weight.requires_grad, bias, layer.dropout_mask is None, layer.x.dtype


def _check_names(policy: TapPolicy, segmented: SegmentedPass) -> None:
    missed = sorted(policy.names - segmented.names_seen)
    if missed:
        raise ValueError(f"taps: {missed} did not run in this pass, so nothing learns from the error there")


def _one_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"net: the output must be one tensor, got {type(output).__name__}")
    return output


def _place_marks(net: nn.Module, taps: str | Sequence[str]) -> TapPolicy:
    """The policy that ``taps`` means for ``net``, with the marks that it needs placed in ``net``."""
    marks = {name: module for name, module in net.named_modules() if isinstance(module, Tap)}
    for name, module in marks.items():
        module.name = name
    if isinstance(taps, str):
        if taps not in ("nonlinearity", "layer_input"):
            raise ValueError(f'taps: got {taps!r}, expected "nonlinearity", "layer_input" or a list of submodule names')
        return TapPolicy("named", frozenset(marks)) if marks else TapPolicy(taps)
    if not isinstance(taps, Sequence):
        raise TypeError(f'taps: got {taps!r}, expected "nonlinearity", "layer_input" or a list of submodule names')
    _check_submodules(net, taps)
    for name in taps:
        if name not in marks:
            net.get_submodule(name).register_forward_hook(OutputTap(name))
    return TapPolicy("named", frozenset(taps) | frozenset(marks))


def _check_submodules(net: nn.Module, names: Sequence[str]) -> None:
    known = [name for name, _ in net.named_modules() if name]
    if not names:
        raise ValueError(f"taps: got an empty list, expected at least one name among {known}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"taps: got {name!r} in the list, expected the name of a submodule")
        if name not in known:
            raise ValueError(f"taps: {name!r} is not a submodule of net; there are {known}")
