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
from .script import Script, Step, is_plain
from .segments import SegmentedPass
from .side_loss import remember_whole
from .taps import SIZES, TapPolicy


class Replay(TorchFunctionMode):
    """Runs beside one forward pass, which gets what an observer would give it."""

    def __init__(self, script: Script, policy: TapPolicy, weight_layers: int) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        """The layers' own tensors, as `script.kept_by` lists them."""
        self.script, self._told = script, (policy, weight_layers)
        self._values: list[Any] = [*script.constants, *script.parameters]
        self._first = len(self._values)
        self._versions: list[int] = []
        """Of the values from the first on, when they came."""
        self._wholes: list[Tensor] = []
        self._done = 0
        self._observer: InformedPass | None = None

    def __torch_function__(self, func: Call, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if self._observer is not None:
            return self._observer.__torch_function__(func, types, args, kwargs)
        if func in SIZES:
            return func(*args, **kwargs)
        steps = self.script.steps
        if self._done == len(steps) or not self._fits(steps[self._done], func, args, kwargs):
            return self.observer().__torch_function__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        step = steps[self._done]
        is_new = step.result == len(self._values)
        if (
            type(result) is not Tensor
            or (result.dtype, result.requires_grad) != step.made
            # The script's call returned an argument.
            or not (is_new or result is self._values[step.result])
        ):
            return self.observer().tell(func, args, kwargs, result, None)
        self._done += 1
        if step.is_layer:
            x = args[0]
            self.kept.append(x if x.dtype is result.dtype else x.to(result.dtype))
        elif step.is_tap:
            result = self._cut(result, args[0] if step.saves_input else None)
        if is_new:
            self._values.append(result)
            self._versions.append(result._version)
        return result

    def _cut(self, whole: Tensor, saved: Tensor | None) -> Tensor:
        cut = whole.detach()
        remember_whole(cut, whole)
        self._wholes.append(whole)
        self.kept.append(cut if saved is None else saved.detach())
        return cut

    def observer(self) -> InformedPass:
        """An observer that knows all calls so far, and has those to come."""
        if self._observer is None:
            self._observer = InformedPass(*self._told, self._known_versions())
            # As they were made, whatever the call is inside of that differs.
            with torch.inference_mode(False), torch.enable_grad():
                self._tell(self._observer)
            # From now on nothing is compared.
            self._values, self._wholes, self.kept = [], [], []
        return self._observer

    def _tell(self, observer: InformedPass) -> None:
        wholes = iter(self._wholes)
        for step in self.script.steps[: self._done]:
            values, n = [self._values[i] for i in step.numbers], len(step.numbers) - len(step.names)
            kwargs = dict(zip(step.names, values[n:], strict=True))
            result = self._values[step.result]
            result, cut = (next(wholes), result) if step.is_tap else (result, None)
            observer.tell(step.func, (*values[:n],), kwargs, result, cut)

    def _known_versions(self) -> dict[int, int]:
        """By the tensors' ids. A cut has its version in common with what it was cut from."""
        versions = {id(x): version for x, version in zip(self._values[self._first :], self._versions, strict=True)}
        cuts = [self._values[step.result] for step in self.script.steps[: self._done] if step.is_tap]
        return versions | {id(x): versions[id(cut)] for x, cut in zip(self._wholes, cuts, strict=True)}

    def has_followed(self, output: Tensor) -> bool:
        """Whether the pass, which has ended with this output, is the script's."""
        script = self.script
        return (
            self._observer is None
            and self._done == len(script.steps)
            and output is self._values[script.output]
            and script.is_alike(*script.parameters, *[self.kept[i] for i in script.distinct], output)
            and [x._version for x in self._values[self._first :]] == self._versions
        )

    def _fits(self, step: Step, func: Call, args: Args, kwargs: Kwargs) -> bool:
        """Whether this is the step's call."""
        # A property's getter is made anew for every call.
        if (func is not step.func and func != step.func) or not torch.is_grad_enabled():
            return False
        if kwargs or step.names:
            if (*kwargs,) != step.names:
                return False
            args = (*args, *kwargs.values())
        if len(args) != len(step.numbers):
            return False
        for place, shape in step.new:
            if not self._is_new(args[place], shape):
                return False
        values = self._values
        for value, number in zip(args, step.numbers, strict=True):
            if value is not values[number] and not self._is_constant(value, number):
                return False
        if not (step.is_layer or step.is_tap):
            return True
        # A function that nobody sees may have overwritten the input since it came.
        at = step.numbers[0] - self._first
        if at >= 0 and args[0]._version != self._versions[at]:
            return False
        return step.is_layer or checkpointed_region() is None

    def _is_constant(self, value: Any, number: int) -> bool:
        if number >= len(self.script.constants):
            return False
        constant = self._values[number]
        return type(value) is type(constant) and bool(value == constant)

    def _is_new(self, x: Any, shape: torch.Size) -> bool:
        """Whether it is a tensor without a graph, met first. From now on it has a number."""
        if type(x) is not Tensor or x.requires_grad or not is_plain(x) or x.shape != shape:
            return False
        # Of tensors on two devices an observer says which.
        if x.device != self.script.parameters[0].device or any([x is y for y in self._values[self._first :]]):
            return False
        self._values.append(x)
        self._versions.append(x._version)
        return True


class InformedPass(SegmentedPass):
    """An observer that is told of calls that were made without it, and of the versions of their tensors then."""

    def __init__(self, policy: TapPolicy, weight_layers: int, versions: dict[int, int]) -> None:
        super().__init__(policy, weight_layers)
        self._then = versions
        self._made: tuple[Any, Tensor | None] | None = None

    def tell(self, func: Call, args: Args, kwargs: Kwargs, result: Any, cut: Tensor | None) -> Any:
        """What the network goes on with after a call that gave this result, and at a tap this cut, if it is made."""
        self._made = result, cut
        try:
            return self.__torch_function__(func, (), args, kwargs)
        finally:
            self._made = None
            if cut is not None:
                # A tap that was made is in no checkpoint, though the call may be that differs.
                self._tapped_region = None

    def call(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        return super().call(func, args, kwargs) if self._made is None else self._made[0]

    def cut(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._made is None or self._made[1] is None:
            return super().cut(z)
        return z, self._made[1]

    def version(self, tensor: Tensor) -> int:
        now = super().version(tensor)
        return now if self._made is None else self._then.get(id(tensor), now)
