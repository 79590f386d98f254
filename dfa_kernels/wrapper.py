"""`DFA`: wraps any network so that its hidden layers learn from the projected error."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends
from .backward.attach import Repeated, attach, looks_of, repeated, shares_one_node
from .backward.deferred import Ledger
from .backward.last_passes import LastPasses
from .backward.step_plan import Sketch, StepPlan, sketch, step_plan
from .compilers import check_not_recorded, is_recorded, warn_of_compiled, whole
from .feedback import Feedback
from .feedback.packed import pack, unpack
from .feedback.spec import check_integer
from .forward.layer_outputs import HIDDEN
from .forward.reach import bypassed, warn_of_uncovered, warn_of_unknown
from .forward.record import Pass, Watched, recorded
from .forward.replay import Replay
from .forward.rows import RowDims
from .forward.segments import FusedLayer, SegmentedPass
from .forward.sequence import PlainSequence, plain_sequence
from .forward.survey import Survey, row_count, survey
from .forward.taps import OutputTap, Tap, TapInfo, TapPolicy, tap_names
from .forward.weight_layers import WeightCall

if TYPE_CHECKING:
    from .optim import FusedOptimizer


class DFA(nn.Module):
    """A network trained by Direct Feedback Alignment (Launay, Poli, Krzakala 2019, eq. 3, 7 and 8).

    Called like ``net`` and followed by the usual ``loss.backward()``, it fills ``.grad`` of every parameter: of those
    before a tap from e B_iᵀ, where e = ∂L/∂output [b, E], and of those after the last tap from the true gradient.

    Args:
        net: any module that returns one tensor, or of whose results ``output`` picks one. It is not copied.
        feedback: the random projection shared by all taps.
        taps: where the error is injected. "nonlinearity": after the activation that follows a weight layer (a product
            with a parameter: Linear, Conv, ``x @ self.W``, einsum, …), except after the last one; where elementwise
            functions carry the layer's output around it (``h * sigmoid(h)``) or multiply it by another layer's (a gate,
            ``silu(w1(x)) * w3(x)``), behind them. After attention, LSTM and GRU modules, which end in no activation
            that can be seen, at the input of the next weight layer at the latest. "layer_input": at the input of each
            weight layer but the first, so after pooling, batch norm and dropout. A list of submodule names: at their
            outputs. If ``net`` holds `Tap` modules, those are the taps.
        backend: "auto" or the name of one of the backends.
        batch_dims: how many leading dimensions of the output are rows, each with an error of its own; the others are
            the error's components, flattened. None: 2 of [b, T, E], else 1. A tap's rows are those of its dimensions,
            wherever they are, that vary with the output's; its others are units.
        output: picks the output tensor from what ``net`` returns, ``lambda out: out.logits`` for example; the wrapped
            network returns that tensor.

    Raises:
        ValueError: unknown taps or backend, a network in which no tap can be placed, or a tap whose rows
            cannot be told.
        TypeError: ``net``, ``feedback`` or ``taps`` of the wrong type, or an output that is not one tensor.
    """

    def __init__(
        self,
        net: nn.Module,
        feedback: Feedback | None = None,
        *,
        taps: str | Sequence[str] = "nonlinearity",
        backend: str = "auto",
        batch_dims: int | None = None,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: got {type(net).__name__}, expected a torch.nn.Module")
        inner = [name or "net itself" for name, module in net.named_modules() if isinstance(module, DFA)]
        if inner:
            raise TypeError(
                f"net: {inner} learns by DFA already; wrap the whole network once, with that one's net in it"
            )
        if feedback is not None and not isinstance(feedback, Feedback):
            raise TypeError(f"feedback: got {type(feedback).__name__}, expected a dfa_kernels.Feedback")
        self.net = net
        self.feedback = Feedback() if feedback is None else feedback
        self.backend = backends.check_backend(backend)
        self.batch_dims = None if batch_dims is None else check_integer("batch_dims", batch_dims, 1)
        self._output = output
        warn_of_compiled(net)
        self._policy = _place_marks(net, taps)
        self._survey: Survey | None = None
        self._row_dims = RowDims()
        self._points: int | None = None
        self._taps: tuple[TapInfo, ...] | None = None
        self._error_size: int | None = None
        self._looks: tuple[Any, ...] | None = None
        self._sketch: Sketch | None = None
        self._sequence: PlainSequence | None = None
        self._repeated: Repeated | None = None
        self._last_passes = LastPasses()
        self._chained: list[str] = []
        self._backprop = False
        self._optimizer: weakref.ref[FusedOptimizer] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and not self._backprop:
            return self._pass(args, kwargs)
        if self._taps is None and self._can_look_for_taps():
            with torch.enable_grad():
                return self._pass(args, kwargs).detach()
        return self._run(*args, **kwargs)

    @property
    def taps(self) -> list[TapInfo]:
        """The taps in the order of the forward pass.

        Raises:
            RuntimeError: before the first forward pass, which finds them.
        """
        if self._taps is None:
            raise RuntimeError(
                "taps: they are found by the first forward pass, and there has been none yet; run one, before "
                "torch.jit.trace too, which reads all properties"
            )
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
        around = [tap.name for tap in self.taps if tap.bypassed]
        return step_plan(self._sketch, None if optimizer is None else optimizer.rule, around, self._chained)

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

    def get_extra_state(self) -> Tensor:
        """The feedback as uint8 [bytes], so that `state_dict()` holds nothing but tensors."""
        return pack(self.feedback.state_dict())

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """Takes the feedback of ``state`` to where this model's is.

        Args:
            state: what `get_extra_state` gave, in any numeric dtype and on any device; of older checkpoints the dict
                {"feedback": `Feedback.state_dict()`}.

        Raises:
            ValueError: damaged bytes.
            TypeError: neither a tensor nor such a dict.
        """
        found = _feedback_state(state)
        own = self.feedback
        if "matrix" in found and own._given is not None:
            found["matrix"] = found["matrix"].to(own._given.device)
        self.feedback = Feedback.from_state_dict(found, device=own.device)
        self._looks = self._repeated = None
        self._last_passes.forget()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A checkpoint without feedback, of the plain network say, leaves the model its own."""
        _, _, missing_keys, _, _ = rest
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}_extra_state"]

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no optimizer, and has seen no pass."""
        forgotten = ("_optimizer", "_looks", "_sketch", "_survey", "_sequence", "_repeated")
        return {**self.__dict__, **dict.fromkeys(forgotten), "_last_passes": LastPasses()}

    def extra_repr(self) -> str:
        return f"feedback={self.feedback!r}, backend={self.backend!r}"

    def _pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        ledger = self._ledger()
        if torch.compiler.is_compiling():
            # A compiled backward pass puts nothing off.
            ledger = None
        else:
            check_not_recorded()
            sequence = self._as_sequence(args, kwargs)
            if sequence is not None:
                return self._plain_pass(sequence, args[0], ledger)
        seen = whole(self._observed, args, kwargs, ledger)
        return seen if isinstance(seen, Tensor) else self._end(seen, ledger)

    def _as_sequence(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PlainSequence | None:
        """The network, if it is plain; the last pass's, as long as that holds."""
        if kwargs or len(args) != 1 or self._policy.kind == "named" or self._output is not None:
            return None
        if self._last_passes.has_script:
            return None
        # Not by the attribute: that of a module is slow to find.
        net: nn.Module = self._modules["net"]  # type: ignore[assignment]
        x = args[0]
        if self._sequence is None or not self._sequence.holds(net, x, self.batch_dims):
            found = plain_sequence(net, x, self.batch_dims, self._policy.kind == "nonlinearity")
            # A module's attributes are slow to set.
            if found is not self._sequence:
                self._sequence, self._repeated = found, None
        return self._sequence

    def _plain_pass(self, sequence: PlainSequence, x: Tensor, ledger: Ledger | None) -> Tensor:
        output, own = sequence.run(x)
        ends = self._repeated
        if ends is not None and ends.suits(self.feedback, self.backend, ledger):
            return ends.attach(output, own, ledger)
        segments, last = sequence.segments(own)
        seen = recorded(output, segments, last, self.feedback, self.backend, self.batch_dims, None, Watched())
        self._repeated = repeated(seen, own, self.backend)
        return self._end(seen, ledger)

    def _end(self, seen: Pass, ledger: Ledger | None) -> Tensor:
        if self._taps is None or not torch.compiler.is_compiling():
            self._remember(seen)
        return attach(seen, ledger)

    def _observed(self, args: tuple[Any, ...], kwargs: dict[str, Any], ledger: Ledger | None) -> Pass | Tensor:
        """An observed pass; of one that is like an earlier one its output, with its node."""
        last_passes, told = self._last_passes, (self.feedback, self.backend)
        watch = last_passes.watch(self._policy, self._surveyed(args, kwargs).weight_layers)
        with watch:
            output = self._run(*args, **kwargs)
        if isinstance(watch, Replay):
            ends = last_passes.replayed(watch, output, row_count(output.dim(), self.batch_dims), *told, ledger)
            if ends is not None:
                return ends.attach(output.detach(), watch.kept, ledger)
            watch = watch.observer()
        last = watch.finish(output)
        self._check_pass(watch)
        now = None if watch.is_traced else looks_of(output, watch.segments, last, self.batch_dims)
        ends = last_passes.like(now, *told, ledger)
        if now is not None and ends is not None:
            last_passes.write(watch, output, now.own, last, ends)
            return ends.attach(output.detach(), now.own, ledger)
        watched = Watched(watch.calls, watch.chained())
        try:
            seen = recorded(output, watch.segments, last, *told, self.batch_dims, self._row_dims, watched)
        except ValueError:
            # The network may have changed since its survey; the next pass makes one anew.
            self._survey = None
            raise
        if now is not None and shares_one_node(seen):
            last_passes.keep(now, repeated(seen, now.own, self.backend))
        return seen

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's output tensor."""
        output = self.net(*args, **kwargs)
        output = output if self._output is None else self._output(output)
        if not isinstance(output, Tensor):
            got = "what output returns" if self._output is not None else "what net returns"
            raise TypeError(
                f"net: {got} must be one tensor, got {type(output).__name__}; pick it, as by "
                "DFA(net, output=lambda out: out.logits) or output=lambda out: out[0]"
            )
        return output

    def _can_look_for_taps(self) -> bool:
        return not (
            self._backprop or torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or is_recorded()
        )

    def _surveyed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Survey:
        if self._survey is not None:
            return self._survey
        found = survey(self.net, self._run, self._policy, self.batch_dims, args, kwargs)
        if not torch.compiler.is_compiling():
            self._survey, self._row_dims = found, RowDims(found.varied)
            self._last_passes.forget()
        return found

    def _remember(self, seen: Pass) -> None:
        """What `taps` and `plan` tell; nothing to do as long as passes look the same."""
        units = tuple([segment.units for segment in seen.segments])
        learning = tuple([_learning(layer) for layer in (seen.last, *[segment.layer for segment in seen.segments])])
        looks = (units, seen.rows, seen.error_size, seen.output.dtype, seen.output.device, learning)
        if looks == self._looks:
            return
        called = self._called(seen.watched.calls)
        names = tap_names(self.net, [segment.origin for segment in seen.segments], called)
        around = bypassed(seen)
        self._taps = tuple(TapInfo(n, u, math.prod(u), b) for n, u, b in zip(names, units, around, strict=True))
        if self._looks is None and self._policy.kind != "named":
            warn_of_uncovered(self.net, seen, names)
        chained = tap_names(self.net, [layer.call.weights[0] for layer in seen.watched.chained], called)
        if chained != self._chained:
            warn_of_unknown(seen, chained)
            self._chained = chained
        # A pass like an earlier one tells nothing, so it must be like the last that did.
        self._looks, self._error_size = looks, seen.error_size
        self._last_passes.forget()
        if not torch.compiler.is_compiling():
            self._sketch = sketch(seen)

    def _called(self, calls: list[WeightCall]) -> list[tuple[WeightCall, str]]:
        """A pass's weight layers, each with the module that calls it, as far as a survey has told."""
        names = () if self._survey is None else self._survey.names
        return list(zip(calls, names, strict=False))

    def _check_pass(self, segmented: SegmentedPass) -> None:
        if self._policy.kind == "named":
            _check_names(self._policy, segmented)
        elif segmented.weight_layers_seen < 2:
            raise ValueError(
                f"net: it has {segmented.weight_layers_seen} weight layer(s) (products with a parameter), so none "
                "before the last; DFA needs at least one. Layers that are hidden from it (custom autograd functions, "
                "scripted modules) are taught through dfa_kernels.Tap() modules behind them"
            )
        elif self._policy.kind == "nonlinearity":
            self._check_activations(segmented)

    def _check_activations(self, segmented: SegmentedPass) -> None:
        expected = segmented.weight_layers
        if segmented.weight_layers_seen != expected:
            self._survey = None
            raise RuntimeError(
                f"net: {segmented.weight_layers_seen} weight layers ran in this pass, expected {expected}; after a "
                'change of the network run the pass again; for one whose depth varies use taps="layer_input"; before '
                "torch.compile run one pass without it"
            )
        self._check_shown(segmented)
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

    def _check_shown(self, segmented: SegmentedPass) -> None:
        """Compilers hide some functions; a pass without one tells whether any of them is an activation."""
        seen = segmented.points_seen
        if seen == self._points:
            return
        if not torch.compiler.is_compiling():
            self._points = seen
        elif self._points is None and any(layer.unknown == HIDDEN for layer in segmented.chained()):
            raise RuntimeError(
                "net: torch.compile hides functions that it calls between weight layers, which may be activations; "
                "run one pass without torch.compile before, which tells"
            )
        elif self._points is not None and seen != self._points:
            raise RuntimeError(
                f"net: torch.compile shows {seen} of its {self._points} activations; it hides those of Python's own, "
                "such as abs(x); use torch.abs(x), or put a dfa_kernels.Tap() behind them"
            )

    def _ledger(self) -> Ledger | None:
        optimizer = None if self._optimizer is None else self._optimizer()
        return None if optimizer is None else optimizer.ledger_for_pass()


def _feedback_state(state: object) -> dict[str, Any]:
    if isinstance(state, Tensor):
        return unpack(state)
    if isinstance(state, dict) and isinstance(state.get("feedback"), dict):
        return dict(state["feedback"])
    raise TypeError(f"state: got {state!r}, expected the uint8 tensor of DFA.get_extra_state()")


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
