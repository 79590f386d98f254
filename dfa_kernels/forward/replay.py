"""A pass that is compared with a script, call by call, and repeats what that says.

At the first call that differs an observer is told of those before it, and goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_internals import checkpointed_region
from .arguments import Args, Call, Kwargs
from .script import Script, Step, looks
from .segments import SegmentedPass
from .side_loss import remember_whole
from .taps import SIZES, TapPolicy


class Replay(TorchFunctionMode):
    """Runs beside one forward pass, which gets what an observer would give it."""

    def __init__(self, script: Script, policy: TapPolicy, weight_layers: int) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        """The layers' own tensors, as `script.kept_by` lists them."""
        self._versions: list[int] = []
        self._script, self._told = script, (policy, weight_layers)
        self._values: list[Any] = [*script.constants, *script.parameters]
        self._wholes: list[Tensor] = []
        self._done = 0
        self._observer: InformedPass | None = None

    def __torch_function__(self, func: Call, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if self._observer is not None:
            return self._observer.__torch_function__(func, types, args, kwargs)
        if func in SIZES:
            return func(*args, **kwargs)
        steps = self._script.steps
        if self._done == len(steps) or not self._fits(steps[self._done], func, args, kwargs):
            return self.observer().__torch_function__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        if not self._is_made(steps[self._done], result, args):
            return self.observer().tell(func, args, kwargs, result, None)
        step = steps[self._done]
        self._done += 1
        if step.is_layer:
            x = args[0]
            self._keep(x if x.dtype is step.dtype else x.to(step.dtype))
        elif step.is_tap:
            self._wholes.append(result)
            result = result.detach()
            remember_whole(result, self._wholes[-1])
            self._keep(args[0].detach() if step.saves_input else result)
        if step.result == len(self._values):
            self._values.append(result)
        return result

    @property
    def has_left(self) -> bool:
        """Whether a call differed."""
        return self._observer is not None

    def observer(self) -> InformedPass:
        """An observer that knows all calls so far."""
        if self._observer is None:
            self._observer, wholes = InformedPass(*self._told), iter(self._wholes)
            for step in self._script.steps[: self._done]:
                values, n = [self._values[i] for i in step.numbers], len(step.numbers) - len(step.names)
                result = self._values[step.result]
                result, cut = (next(wholes), result) if step.is_tap else (result, None)
                self._observer.tell(
                    step.func, tuple(values[:n]), dict(zip(step.names, values[n:], strict=True)), result, cut
                )
        return self._observer

    def is_whole(self, output: Tensor) -> bool:
        """Whether the pass, which has ended with this output, is the script's."""
        script = self._script
        return (
            self._observer is None
            and self._done == len(script.steps)
            and output is self._values[script.output]
            and looks(script.parameters, self.kept, output) == script.looks
            and [x._version for x in self.kept] == self._versions
        )

    def _fits(self, step: Step, func: Call, args: Args, kwargs: Kwargs) -> bool:
        """Whether this is the step's call."""
        if func is not step.func or not torch.is_grad_enabled():
            return False
        if kwargs or step.names:
            if (*kwargs,) != step.names:
                return False
            args = (*args, *kwargs.values())
        if len(args) != len(step.numbers) or (step.new and not self._are_new([args[i] for i in step.new])):
            return False
        values = self._values
        for value, number in zip(args, step.numbers, strict=True):
            if value is not values[number] and not self._is_constant(value, number):
                return False
        return not step.is_tap or checkpointed_region() is None

    def _is_constant(self, value: Any, number: int) -> bool:
        if number >= len(self._script.constants):
            return False
        constant = self._values[number]
        return type(value) is type(constant) and bool(value == constant)

    def _are_new(self, arguments: list[Any]) -> bool:
        """Whether they are tensors without a graph that the pass has not met. From now on it has."""
        for x in arguments:
            if type(x) is not Tensor or x.requires_grad or any([x is value for value in self._values]):
                return False
            self._values.append(x)
        return True

    def _is_made(self, step: Step, result: Any, args: Args) -> bool:
        """Whether the call gave what it gives in every such pass, as far as that tells its part in it."""
        if type(result) is not Tensor or result.dtype is not step.dtype:
            return False
        if result.requires_grad is not step.requires_grad:
            return False
        if step.result < len(self._values):
            return result is self._values[step.result]
        for x in args:  # noqa: SIM110
            if x is result:
                return False
        return True

    def _keep(self, x: Tensor) -> None:
        self.kept.append(x)
        self._versions.append(x._version)


class InformedPass(SegmentedPass):
    """An observer that is told of calls that were made without it."""

    _made: tuple[Any, Tensor | None] | None = None

    def tell(self, func: Call, args: Args, kwargs: Kwargs, result: Any, cut: Tensor | None) -> Any:
        """What the network goes on with after a call that gave this result, and at a tap this cut, if it is made."""
        self._made = result, cut
        try:
            return self.__torch_function__(func, (), args, kwargs)
        finally:
            self._made = None

    def call(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        return super().call(func, args, kwargs) if self._made is None else self._made[0]

    def cut(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._made is None or self._made[1] is None:
            return super().cut(z)
        return z, self._made[1]
