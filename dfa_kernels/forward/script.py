"""What an observed pass leaves for passes that make the same calls: the part that each of them has, found out once.

A script holds no tensor but parameters. `replay.py` compares a pass with it, and repeats what was decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_internals import Likeness, checkpointed_region, likeness_of
from .arguments import Args, Call, Kwargs, tensors_of
from .segments import FusedLayer, SegmentedPass
from .taps import SIZES, TapPolicy
from .weight_layers import LINEAR

LARGEST = 2**26
"""Bytes of all results together beyond which deciding takes no time to speak of. A replay keeps them to its end."""

Logged = tuple[Call, Args, Kwargs, Any, Tensor | None]
"""A call, its result, and where a tap is what the network goes on with."""


@dataclass(slots=True)
class Step:
    """A call as every pass makes it, and its part in the pass.

    What it is called with has numbers: the script's constants and parameters, then values as they come. Those are
    tensors that the pass meets first as an argument, and results; where a tap is, what is cut.
    """

    func: Call
    names: tuple[str, ...]
    """Of the arguments by keyword, which come after the others."""
    numbers: list[int]
    """Of all arguments."""
    new: list[tuple[int, torch.Size]]
    """Place and shape of arguments that are tensors without a graph, met first: an input, a mask, a buffer."""
    made: tuple[torch.dtype, bool]
    """The result's dtype, and whether it requires grad."""
    result: int
    """The number of the result; of an argument that is returned its own."""
    is_layer: bool = False
    """Whether it is a fused layer's product."""
    is_tap: bool = False
    saves_input: bool = False
    """Of the activation at a tap: whether f' follows from its input, not from its result."""


@dataclass(slots=True)
class Script:
    """All calls of a pass."""

    steps: list[Step]
    constants: list[Any]
    """The arguments that are no tensors, which have to be equal in every pass."""
    parameters: list[nn.Parameter]
    output: int
    """The output's number."""
    distinct: list[int]
    """Which of the tensors that layers keep come for the first time."""
    is_alike: Likeness
    """Whether the parameters, those tensors and the output have the shapes, dtypes and devices of this pass."""


def is_plain(x: Tensor) -> bool:
    """Whether it has a version, as tensors made in inference mode do not, and a shape, as nested ones do not."""
    return not (x.is_inference() or x.is_nested)


def kept_by(layers: Sequence[FusedLayer]) -> list[Tensor]:
    """What the layers of a pass keep, the output's the last, in the order in which a pass makes it."""
    *hidden, last = layers
    return [x for layer in hidden for x in (layer.x, layer.saved)] + [last.x]


class Recording(SegmentedPass):
    """An observed pass that writes its calls down, as long as another can repeat them."""

    def __init__(self, policy: TapPolicy, weight_layers: int) -> None:
        super().__init__(policy, weight_layers)
        self._log: list[Logged] = []
        self._bytes = 0
        self._can_be_repeated = policy.kind == "nonlinearity"

    def __torch_function__(self, func: Call, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if not self._can_be_repeated or func in SIZES:
            return super().__torch_function__(func, types, args, kwargs)
        operands = [x for value in (*args, *kwargs.values()) for x in tensors_of(value)]
        if not torch.is_grad_enabled() or not all([is_plain(x) for x in operands]):
            self._cannot_be_repeated()
            return super().__torch_function__(func, types, args, kwargs)
        versions, taps = [x._version for x in operands], self.points_seen
        returned = super().__torch_function__(func, types, args, kwargs)
        results = tensors_of(returned)
        if not all([is_plain(x) for x in results]) or checkpointed_region():
            self._cannot_be_repeated()
            return returned
        self._bytes += sum([x.nbytes for x in results])
        if self._bytes > LARGEST or [x._version for x in operands] != versions:
            self._cannot_be_repeated()
        elif self.points_seen == taps:
            self._log.append((func, args, kwargs, returned, None))
        elif self.segments and self.segments[-1].point == self.point and self.segments[-1].tap is returned:
            self._log.append((func, args, kwargs, self.segments[-1].root, returned))
        else:
            self._cannot_be_repeated()
        return returned

    def give_up_taps(self, points: list[int]) -> None:
        self._cannot_be_repeated()
        super().give_up_taps(points)

    def _cannot_be_repeated(self) -> None:
        self._can_be_repeated = False
        self._log.clear()

    def script(self, output: Tensor, layers: Sequence[FusedLayer]) -> Script | None:
        """For passes like this one, all of whose layers are fused, the output's the last; None if there is none."""
        if not self._can_be_repeated:
            return None
        return _Writer(layers, *_told_apart(self._log)).script(self._log, output)


_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)


def _told_apart(log: Sequence[Logged]) -> tuple[list[Any], list[nn.Parameter]]:
    """The constants of all calls, in the order in which `_Writer` numbers them, and the parameters."""
    values = [value for _, args, kwargs, _, _ in log for value in (*args, *kwargs.values())]
    parameters = {id(value): value for value in values if type(value) is nn.Parameter}
    return [value for value in values if isinstance(value, _CONSTANTS)], [*parameters.values()]


class _NoScriptError(Exception):
    """A call that another pass cannot be told to repeat."""


@dataclass
class _Writer:
    """Turns a log into a script."""

    layers: Sequence[FusedLayer]
    constants: list[Any]
    parameters: list[nn.Parameter]
    taps: int = 0
    """How many have come."""
    product: Step | None = None
    """The newest of a layer, which the next tap makes the layer's own."""
    met: int = 0
    """How many of the constants have."""
    numbers: dict[int, int] = field(default_factory=dict)
    """Of parameters and values, by their ids."""

    def script(self, log: Sequence[Logged], output: Tensor) -> Script | None:
        self.numbers = {id(p): len(self.constants) + i for i, p in enumerate(self.parameters)}
        try:
            steps = [self._step(entry) for entry in log]
        except _NoScriptError:
            return None
        if self.taps != len(self.layers) - 1 or self.product is None or id(output) not in self.numbers:
            return None
        self.product.is_layer = True
        kept = kept_by(self.layers)
        distinct = [i for i, x in enumerate(kept) if not any([x is other for other in kept[:i]])]
        is_alike = likeness_of([*self.parameters, *[kept[i] for i in distinct], output])
        return Script(steps, self.constants, self.parameters, self.numbers[id(output)], distinct, is_alike)

    def _step(self, entry: Logged) -> Step:
        func, args, kwargs, result, cut = entry
        # An observer that is told of dropout behind a layer's product would draw numbers again.
        if type(result) is not Tensor or (func is F.dropout and result.requires_grad):
            raise _NoScriptError
        before, values = len(self.numbers), (*args, *kwargs.values())
        numbers = [self._number_of(value) for value in values]
        first = len(self.constants) + before
        places = [numbers.index(n) for n in range(first, first + len(self.numbers) - before)]
        new = [(place, values[place].shape) for place in places]
        number = self._number(result if cut is None else cut)
        step = Step(func, (*kwargs,), numbers, new, (result.dtype, result.requires_grad), number)
        if func is LINEAR:
            self.product = step
        # `Replay` takes a layer's input and weight by their places, and an activation's input.
        if len(args) < 2 * (func is LINEAR) or len(args) < (cut is not None):
            raise _NoScriptError
        if cut is not None:
            self._make_tap(step, args[0], cut)
        return step

    def _make_tap(self, step: Step, z: Any, cut: Tensor) -> None:
        layer, product = self.layers[self.taps], self.product
        saves_input = layer.saved is not cut
        if saves_input and not (isinstance(z, Tensor) and layer.saved.data_ptr() == z.data_ptr()):
            raise _NoScriptError
        if product is None or step.result in step.numbers or layer.dropout_mask is not None:
            raise _NoScriptError
        product.is_layer, step.is_tap, step.saves_input = True, True, saves_input
        self.taps += 1

    def _number_of(self, value: Any) -> int:
        if isinstance(value, _CONSTANTS):
            self.met += 1
            return self.met - 1
        if type(value) not in (Tensor, nn.Parameter) or (value.requires_grad and id(value) not in self.numbers):
            raise _NoScriptError
        return self._number(value)

    def _number(self, value: Tensor) -> int:
        return self.numbers.setdefault(id(value), len(self.constants) + len(self.numbers))
