"""Optimizers that compute the gradients of fused layers and update them in one step, without gradient buffers.

While such an optimizer is alive, `loss.backward()` leaves a fused layer's call (the error and the saved activations)
in the optimizer's ledger instead of writing ``.grad``; `step()` runs the calls and the update together. Parameters
that autograd finishes (batch norm, convolutions …) hold a ``.grad`` as usual and are updated by the same rule.

What stands in ``.grad`` of a fused layer meanwhile computes the gradient as soon as anybody uses it (clipping, a
GradScaler, a print); the step then goes on from the gradients, as after any backward pass. So it does under a compiler,
where nothing is put off.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import backends
from ._torch_internals import BelowAutograd, WithoutAutocast, add_one_, is_inside_ddp, step_is_observed
from .backends.calls import DeviceNumbers
from .backward.deferred import DeferredCall, Ledger
from .backward.lazy_gradient import LazyGradient
from .compilers import is_left_alone, whole
from .numbers_on_device import NumbersOnDevice, is_captured, is_on_device
from .updates import RULES, Row
from .wrapper import DFA

_params = itemgetter("params")


class FusedOptimizer(torch.optim.Optimizer):
    """What `SGD` and `AdamW` share. Subclasses name their rule and the numbers of an update."""

    rule: str

    def __init__(self, model: DFA, defaults: dict[str, Any], max_norm: float | None, capturable: bool) -> None:
        if isinstance(model, DistributedDataParallel):
            raise TypeError(f"model: got DistributedDataParallel; {_NO_REDUCTION}")
        if not isinstance(model, DFA):
            raise TypeError(f"model: got {type(model).__name__}, expected a dfa_kernels.DFA")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: got {max_norm}, expected a positive number or None")
        super().__init__(model.parameters(), defaults)
        # No options of a group: the norm is that of all groups. Nor a state: torch's optimizers have none to load, and
        # whether steps are captured is not for a checkpoint to say.
        self.max_norm = max_norm
        self.capturable = capturable
        self._on_device: NumbersOnDevice | None = None
        self._ledger = Ledger()
        self._model = weakref.ref(model)
        model._optimizer = weakref.ref(self)
        weakref.finalize(self, self._ledger.close).atexit = False  # type: ignore[misc]

    def ledger_for_pass(self) -> Ledger:
        """The ledger for the backward pass of a forward pass."""
        if is_inside_ddp():
            raise RuntimeError(f"model: it runs inside DistributedDataParallel; {_NO_REDUCTION}")
        return self._ledger

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} belongs to its model and cannot be copied or pickled; make one for the copy and "
            "load this one's state_dict()"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; deferred gradients are dropped as well."""
        self.drop_deferred()
        if set_to_none:
            self._drop_grads()
        else:
            super().zero_grad(set_to_none=False)

    def _drop_grads(self) -> None:
        # Most parameters have none. Between two products that fill the cache, less code than torch's is less time.
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = None

    def drop_deferred(self) -> None:
        """Forgets the backward passes since the last step."""
        self._ledger.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, also from the state of torch's optimizer of the same rule, if it used the same options."""
        for group in state_dict["param_groups"]:
            used = [name for name in _OPTIONS_LACKING if group.get(name)]
            if used:
                raise ValueError(f"state_dict: it was made with {used}, which {type(self).__name__} does not have")
        super().load_state_dict(state_dict)
        self._on_device = None
        for state in self.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu").clone()

    def refresh(self) -> None:
        """Brings changes of ``param_groups``, a scheduler's say, to the device; to be called before a graph's replay.

        `GraphedStep` and every step do it themselves. Without ``capturable`` there is nothing to do.

        Raises:
            RuntimeError: under capture, if there is a change.
        """
        if self.capturable:
            self._numbers_on_device()

    def forget_counts(self) -> None:
        """Makes the next update of parameters without state their first, as a dropped state elsewhere does."""
        if self._on_device is not None and RULES[self.rule].counts:
            for group in self.param_groups:
                for p in group["params"]:
                    if "step" not in self.state.get(p, {}):
                        self._on_device.step_of(p).zero_()

    def baked_options(self) -> tuple[Any, ...]:
        """What a graph captured now keeps, whatever becomes of the options: everything else follows them."""
        rates = [group["lr"] for group in self.param_groups]
        table = None if self._on_device is None else self._on_device.table.data_ptr()
        on_device = [rate.data_ptr() if is_on_device(rate) else None for rate in rates]
        return self._state_names(), self.max_norm, table, *on_device

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Computes the deferred gradients and updates every parameter. Then no gradient is left, deferred or not.

        Raises:
            RuntimeError: if a tensor that a deferred gradient needs was modified since the backward pass.
        """
        if closure is None and is_left_alone() and not step_is_observed(self):
            return self._step()
        return whole(self._any_step, closure)

    # torch.optim wraps every step() in a profiler's record and its hooks. Between two products that fill the cache that
    # takes 1 % of a step, so here it happens only if there is a hook or a profiler.
    step.hooked = True  # type: ignore[attr-defined]

    def _any_step(self, closure: Callable[[], float] | None) -> float | None:
        if torch.compiler.is_compiling():
            return self._compiled_step(closure)
        return self._observed_step(closure) if step_is_observed(self) else self._step(closure)

    @torch.no_grad()
    def _compiled_step(self, closure: Callable[[], float] | None) -> float | None:
        """A step from gradients, whose counts of steps are tensors, for which nothing has to be compiled anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_nothing_deferred()
        learning = [
            (p, group)
            for group in self.param_groups
            for p in self._as_the_model_has_them(group["params"])
            if p.grad is not None
        ]
        if not learning:
            raise RuntimeError(
                "step: the compiler sees no gradient; call backward() outside of what is compiled, or leave out "
                "zero_grad() there, since a step leaves no gradient behind"
            )
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p, _ in learning], self.max_norm)
        rule = RULES[self.rule]
        for p, group in learning:
            gradient = p.grad
            assert gradient is not None
            _refuse_sparse(gradient)
            row: Row = rule.row(*self._numbers(group))
            own_row = (*row, self._count_of(p).add_(1)) if rule.counts else row
            rule.apply_row_(p, self._own_state(p), own_row, gradient)
            p.grad = None
        return loss

    def _as_the_model_has_them(self, parameters: list[Tensor]) -> list[Tensor]:
        """The same ones. A compiler knows gradients of a backward pass inside only by what its model holds."""
        model = self._model()
        known = [] if model is None else list(model.parameters())
        return [next((q for q in known if q is p), p) for p in parameters]

    def _count_of(self, p: Tensor) -> Tensor:
        """How often it was updated, [] in float32, on the host if nobody needs it elsewhere."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        step: Tensor = state["step"]
        return step

    def _check_nothing_deferred(self) -> None:
        if self._ledger.calls:
            raise RuntimeError(
                "step: a backward pass that was not compiled has left its gradients to this step, which is; compile "
                "both or neither"
            )

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        on_device = self._rates_on_device() if self.capturable else None
        call = self._ledger.take_whole() if self.max_norm is None else None
        if call is None:
            self._ledger.make()
        if call is None or not self._update_fused(call, on_device):
            self._update_others(on_device)
        return loss

    @torch.no_grad()
    def _rates_on_device(self) -> NumbersOnDevice:
        on_device = self._numbers_on_device()
        on_device.copy_rates([self._numbers(group) for group in self.param_groups])
        return on_device

    @torch.no_grad()
    def _update_others(self, on_device: NumbersOnDevice | None) -> None:
        """Updates what has a gradient."""
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p, _, _ in self._with_gradient()], self.max_norm)
        if on_device is not None:
            self._update_from_device(on_device)
            return
        for p, gradient, group in self._with_gradient():
            RULES[self.rule].apply_(p, self._own_state(p), self._hyper(group, [p]), gradient)
            p.grad = None

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    def _with_gradient(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Every parameter with a gradient, it, and the group. What is deferred to another optimizer is left to that."""
        for group in self.param_groups:
            for p in group["params"]:
                gradient = p.grad
                if type(gradient) is LazyGradient:
                    if not self._ledger.owns(gradient):
                        self._check_is_the_models()
                        continue
                    # Another parameter's, which somebody has put here.
                    gradient = gradient.look()
                if gradient is not None:
                    _refuse_sparse(gradient)
                    yield p, gradient, group

    def _check_is_the_models(self) -> None:
        """RuntimeError if the model defers its gradients to another optimizer by now."""
        model = self._model()
        reference = None if model is None else model._optimizer
        if reference is not None and reference() is not self:
            raise RuntimeError(
                "step: the model's gradients are deferred to another fused optimizer, which was made later; step that "
                "one, and make one for all parameters"
            )

    def _update_from_device(self, on_device: NumbersOnDevice) -> None:
        with_gradient = [(p, gradient) for p, gradient, _ in self._with_gradient()]
        on_device.count([p for p, _ in with_gradient])
        for p, gradient in with_gradient:
            RULES[self.rule].apply_row_(p, self._own_state(p), on_device.row(p), gradient)
            p.grad = None

    def _update_fused(self, call: DeferredCall, on_device: NumbersOnDevice | None) -> bool:
        """Returns whether these were all parameters."""
        parameters, known = call.parameters, [*map(id, chain.from_iterable(map(_params, self.param_groups)))]
        if known != [*map(id, parameters)] and not set(known).issuperset(map(id, parameters)):
            shapes = [tuple(p.shape) for p in parameters if id(p) not in known]
            raise RuntimeError(
                f"step: the model has parameters of shape {shapes} that this optimizer does not; its parameters were "
                "replaced since, so make a new optimizer"
            )
        state = [tensor for p in parameters for tensor in self._own_state(p)] if self._state_names() else []
        hyper: list[float] | DeviceNumbers
        if on_device is None:
            hyper = self._hyper_of_each(parameters)
        else:
            on_device.count(parameters)
            hyper = on_device.rows(parameters)
        update_ = backends.BACKENDS[call.plan.backend].layer_update_
        # The gradients' products belong to the backward pass, which autocast does not reach either.
        with WithoutAutocast(), BelowAutograd():
            update_(call.layers(), parameters, state, self.rule, hyper)
        return len(parameters) == len(known)

    def _state_names(self) -> tuple[str, ...]:
        return RULES[self.rule].state

    def _numbers(self, group: dict[str, Any]) -> list[Any]:
        """The numbers that the rule unpacks, but for counts of steps. Those of torch are tensors now and then."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> list[float]:
        """The numbers that the rule unpacks, for updates of parameters of the group that are about to run."""
        return [*map(float, self._numbers(group))] * len(parameters)

    def _hyper_of_each(self, parameters: Sequence[Tensor]) -> list[float]:
        if len(self.param_groups) == 1:
            return self._hyper(self.param_groups[0], parameters)
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        return [number for p in parameters for number in self._hyper(groups[id(p)], [p])]

    def _numbers_on_device(self) -> NumbersOnDevice:
        """As they are now, and the counts of steps there as well."""
        numbers = [self._numbers(group) for group in self.param_groups]
        if self._on_device is None or not self._on_device.suits(self.param_groups):
            self._on_device = NumbersOnDevice(RULES[self.rule], self.param_groups, numbers)
            for p, state in self.state.items():
                if "step" in state:
                    state["step"] = self._on_device.step_of(p).copy_(state["step"])
        self._on_device.write(numbers)
        return self._on_device

    def _own_state(self, p: Tensor) -> list[Tensor]:
        state, names = self.state[p], self._state_names()
        if self._on_device is not None and RULES[self.rule].counts and "step" not in state:
            state["step"] = self._on_device.step_of(p)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [state[name] for name in names]


_NO_REDUCTION = (
    "a fused optimizer keeps no gradients that could be reduced over processes; use torch.optim with "
    "DistributedDataParallel"
)


_OPTIONS_LACKING = ("maximize", "dampening", "amsgrad")


def _refuse_sparse(gradient: Tensor) -> None:
    if gradient.is_sparse:
        raise RuntimeError(
            f"step: a parameter of shape {tuple(gradient.shape)} has a sparse gradient, expected a dense one"
        )


class SGD(FusedOptimizer):
    """`torch.optim.SGD` with the update inside the weight gradient's product; the same numbers up to rounding.

    Args:
        model: the `DFA` module whose parameters it updates.
        lr: learning rate; may be changed in ``param_groups``, by a scheduler for example. A tensor of one element may
            be filled in place, too.
        momentum, weight_decay, nesterov: as in `torch.optim.SGD`.
        max_norm: the most that the norm of all gradients together may be; a step scales them down to it, as
            `torch.nn.utils.clip_grad_norm_` does. It needs all gradients before the first update, so they get buffers
            for that step. `state_dict()` does not hold it; it may be changed as an attribute. None: no limit.
        capturable: whether steps may be captured in a CUDA graph: the numbers above, but for max_norm, are read from
            device memory, where `refresh` brings what has changed in ``param_groups`` before a replay. All parameters
            have to be on one device. `state_dict()` does not hold it.
    """

    rule = "sgd"

    def __init__(
        self,
        model: DFA,
        lr: float | Tensor,
        momentum: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_norm: float | None = None,
        capturable: bool = False,
    ) -> None:
        _check_at_least_zero(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and momentum == 0:
            raise ValueError("nesterov: got True with momentum 0, expected a positive momentum")
        # torch.optim.SGD expects the key dampening in a state that it loads.
        defaults = dict(lr=lr, momentum=momentum, dampening=0, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(model, defaults, max_norm, capturable)

    def _state_names(self) -> tuple[str, ...]:
        return RULES["momentum"].state if any([group["momentum"] for group in self.param_groups]) else ()

    def _numbers(self, group: dict[str, Any]) -> list[Any]:
        return [group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]]


class AdamW(FusedOptimizer):
    """`torch.optim.AdamW`, one layer's gradient at a time; the same numbers up to rounding.

    Args:
        model: the `DFA` module whose parameters it updates.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; lr as in `SGD`.
        max_norm: as in `SGD`.
        capturable: as in `SGD`; steps are counted in device memory, too.
    """

    rule = "adamw"

    def __init__(
        self,
        model: DFA,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
        capturable: bool = False,
    ) -> None:
        _check_at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        pair = betas if isinstance(betas, (tuple, list)) else ()
        if len(pair) != 2 or not all([0 <= beta < 1 for beta in pair]):
            raise ValueError(f"betas: got {betas}, expected two numbers in [0, 1)")
        super().__init__(model, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), max_norm, capturable)

    def _numbers(self, group: dict[str, Any]) -> list[Any]:
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]

    def _hyper(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> list[float]:
        if parameters and is_captured(parameters[0].device):
            raise RuntimeError(
                "AdamW counts its steps on the host, and a CUDA graph would repeat one of them; use capturable=True"
            )
        numbers, counts = [*map(float, self._numbers(group))], [self._count_of(p) for p in parameters]
        add_one_(counts)
        return [number for count in counts for number in (*numbers, float(count))]


def _check_at_least_zero(**numbers: float | Tensor) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name}: got {number}, expected a number >= 0")
