"""A pass that is compared with a script, call by call, and repeats what that says.

At the first call that differs an observer is told of those before it, and goes on.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_internals import checkpointed_region
from .arguments import Args, Call, Kwargs
from .script import Script, Step
from .segments import SegmentedPass
from .side_loss import remember_whole
from .taps import SIZES, TapPolicy


class Replay(TorchFunctionMode):
    """Runs beside one forward pass, which gets what an observer would give it."""

    def __init__(self, script: Script, policy: TapPolicy, weight_layers: int) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        """The layers' own tensors, as `script.kept_by` lists them."""
        self._script, self._told = script, (policy, weight_layers)
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
        steps = self._script.steps
        if self._done == len(steps) or not self._fits(steps[self._done], func, args, kwargs):
            return self.observer().__torch_function__(func, types, args, kwargs)
        result = func(*args, **kwargs)
        step = steps[self._done]
        if type(result) is not Tensor or (result.dtype, result.requires_grad) != step.made:
            return self.observer().tell(func, args, kwargs, result, None)
        self._done += 1
        if step.is_layer:
            x = args[0]
            self.kept.append(x if x.dtype is result.dtype else x.to(result.dtype))
        elif step.is_tap:
            result = self._cut(result, args[0] if step.saves_input else None)
        if step.result == len(self._values):
            self._values.append(result)
            self._versions.append(result._version)
        return result

    def _cut(self, whole: Tensor, saved: Tensor | None) -> Tensor:
        cut = whole.detach()
        remember_whole(cut, whole)
        self._wholes.append(whole)
        self.kept.append(cut if saved is None else saved.detach())
        return cut

    @property
    def has_left(self) -> bool:
        """Whether a call differed."""
        return self._observer is not None

    def observer(self) -> InformedPass:
        """An observer that knows all calls so far, and has those to come."""
        if self._observer is None:
            self._observer = InformedPass(*self._told, self._known_versions())
            wholes = iter(self._wholes)
            for step in self._script.steps[: self._done]:
                values, n = [self._values[i] for i in step.numbers], len(step.numbers) - len(step.names)
                kwargs = dict(zip(step.names, values[n:], strict=True))
                result = self._values[step.result]
                result, cut = (next(wholes), result) if step.is_tap else (result, None)
                self._observer.tell(step.func, (*values[:n],), kwargs, result, cut)
        return self._observer

    def _known_versions(self) -> dict[int, int]:
        """By the tensors' ids. A cut has its version in common with what it was cut from."""
        versions = {id(x): version for x, version in zip(self._values[self._first :], self._versions, strict=True)}
        cuts = [self._values[step.result] for step in self._script.steps[: self._done] if step.is_tap]
        return versions | {id(x): versions[id(cut)] for x, cut in zip(self._wholes, cuts, strict=True)}

    def is_whole(self, output: Tensor) -> bool:
        """Whether the pass, which has ended with this output, is the script's."""
        script = self._script
        return (
            self._observer is None
            and self._done == len(script.steps)
            and output is self._values[script.output]
            and script.is_alike(*script.parameters, *[self.kept[i] for i in script.distinct], output)
            and [x._version for x in self._values[self._first :]] == self._versions
        )

    def _fits(self, step: Step, func: Call, args: Args, kwargs: Kwargs) -> bool:
        """Whether this is the step's call."""
        if func is not step.func:
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
        return not step.is_tap or self._is_untouched(step.numbers[0])

    def _is_constant(self, value: Any, number: int) -> bool:
        if number >= len(self._script.constants):
            return False
        constant = self._values[number]
        return type(value) is type(constant) and bool(value == constant)

    def _are_new(self, arguments: list[Any]) -> bool:
        """Whether they are tensors without a graph. From now on they have numbers."""
        for x in arguments:
            if type(x) is not Tensor or x.requires_grad:
                return False
            self._values.append(x)
            self._versions.append(x._version)
        return True

    def _is_untouched(self, number: int) -> bool:
        """Whether a tap may follow: a function that nobody sees may have overwritten its activation's input."""
        version: int = self._values[number]._version
        return version == self._versions[number - self._first] and checkpointed_region() is None


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

    def call(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        return super().call(func, args, kwargs) if self._made is None else self._made[0]

    def cut(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._made is None or self._made[1] is None:
            return super().cut(z)
        return z, self._made[1]

    def version(self, tensor: Tensor) -> int:
        now = super().version(tensor)
        return now if self._made is None else self._then.get(id(tensor), now)
