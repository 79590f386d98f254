"""A forward pass cut at its taps: what every segment keeps so that the error alone can finish it.

`SegmentedPass` watches a weight layer and what follows it. As long as that is an activation of the table and dropout,
the segment is *fused*: it keeps x, f' and the dropout mask, and its autograd graph is dropped at the tap. Anything
else keeps its local autograd graph, which ends at the previous tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activations import ACTIVATIONS, FUSED_CALLS, Activation, call_parameters, is_inplace
from .arguments import Args, Call, Kwargs
from .side_loss import Uncut, remember_whole
from .taps import SIZES, ForwardPass, TapPolicy
from .weight_layers import CONVOLUTIONS, LINEAR, WeightCall

T: Any = torch.Tensor


@dataclass(frozen=True)
class Convolution:
    """The numbers `aten.convolution_backward` asks for beside the tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(slots=True, eq=False)
class Chain:
    """A weight layer and the elementwise calls that followed it so far.

    ``value`` is the newest result, ``saved`` what f' is computed from, ``dropout_mask`` the product of the dropout
    masks, each divided by its keep probability.
    """

    x: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None
    convolution: Convolution | None
    value: Tensor
    version: int
    """Of ``value``, as the chain made it."""
    activation: Activation | None = None
    p: float = 0.0
    q: float = 0.0
    saved: Tensor | None = None
    dropout_mask: Tensor | None = None


@dataclass(slots=True)
class FusedLayer:
    """A finished chain: everything its gradient needs beside δh. No tensor here carries a graph.

    With x [..., in] and saved [..., out]: δa = δh ⊙ f'(saved) ⊙ dropout_mask, ΔW = δaᵀ x.
    """

    x: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None
    convolution: Convolution | None
    activation: str
    p: float
    q: float
    saved: Tensor
    dropout_mask: Tensor | None


@dataclass(slots=True)
class Segment:
    """What lies between two taps.

    ``tap`` is what the network goes on with, ``root`` the same values with the segment's autograd graph, and ``layer``
    what replaces that graph if the segment is fused.
    """

    origin: Tensor | str
    tap: Tensor
    root: Tensor
    layer: FusedLayer | None
    point: int = 0
    """The tap's number in its pass."""
    newest: WeightCall | None = None
    """The newest weight layer before the tap."""
    rows: tuple[int, ...] = ()
    """Which of the tap's dimensions are the output's rows, in their order; known once the output is."""
    units: tuple[int, ...] = ()
    """The sizes of the others."""


class SegmentedPass(ForwardPass):
    """A forward pass that detaches at every tap and records the segments."""

    def __init__(self, policy: TapPolicy, weight_layers: int = -1) -> None:
        super().__init__(policy, weight_layers)
        self.segments: list[Segment] = []
        self._chain: Chain | None = None
        self._cuts: list[tuple[Tensor, Segment]] = []
        self._overwritten: Tensor | None = None  # the newest result of an in-place activation
        self._versions: list[tuple[Tensor, int]] = []

    def at_tap(self, origin: Tensor | str, z: Tensor) -> tuple[Tensor, Tensor]:
        for seen, segment in self._cuts:
            if seen is z:
                return segment.root, segment.tap
        if not z.requires_grad:
            return z, z
        root, cut = self.cut(z)
        if not self.is_traced:
            remember_whole(cut, root)
        layer = self._finish_chain(z, cut)
        segment = Segment(origin, cut, root, layer, self.point, self.newest)
        self.segments.append(segment)
        self._cuts.append((z, segment))
        return root, cut

    def give_up_taps(self, points: list[int]) -> None:
        self.segments = [segment for segment in self.segments if segment.point not in points]
        self._cuts = [entry for entry in self._cuts if entry[1].point not in points]

    def cut(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(z with its graph, z without). An in-place activation's caller may go on with z itself, so z is cut too.

        A view cannot be cut in place. Its callers are taken to go on with what the activation returned.
        """
        if z is not self._overwritten or z._base is not None:
            return z, z.detach()
        root = z.view_as(z) if self.is_traced else Uncut.apply(z)
        return root, z.detach_()

    def finish(self, output: Tensor) -> FusedLayer | None:
        """The last layer, if nothing but its product lies between the last tap and the output."""
        self._check_versions()
        chain = self._chain
        if (
            chain is None
            or chain.convolution is not None
            or chain.activation is not None
            or chain.dropout_mask is not None
        ):
            return None
        return self._finish_chain(output, output.detach())

    def overwritten(self, z: Tensor) -> None:
        self._overwritten = z

    def call(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        """Makes the network's call."""
        return func(*args, **kwargs)

    def weight_layer(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        value = self.call(func, args, kwargs)
        self._chain = chain = _start_chain(func, args, kwargs, value)
        if chain is not None:
            chain.version = self.version(value)
            self._watch(chain.x)
        return value

    def activation(self, func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        h = self._activate(func, args, kwargs)
        # Elsewhere the network goes on with what the tap gives it.
        self._overwritten = h if h is args[0] and self.policy.kind == "nonlinearity" else None
        return h

    def _activate(self, func: Call, args: Args, kwargs: Kwargs) -> Tensor:
        z, rest = args[0], args[1:]
        chain, row = self._chain, FUSED_CALLS.get(func)
        if chain is None or not self._ends_in(chain, z):
            return cast(Tensor, self.call(func, args, kwargs))
        if row is None or chain.activation is not None:
            self._chain = None
            return cast(Tensor, self.call(func, args, kwargs))
        chain.p, chain.q = call_parameters(row, rest, kwargs)
        keeps_output = row.keeps_output(chain.p, chain.q)
        overwrites = is_inplace(func, row, rest, kwargs)
        saved = z.clone() if overwrites and not keeps_output else z
        h = cast(Tensor, self.call(func, args, kwargs))
        chain.activation, chain.saved = row, h if keeps_output else saved
        self._advance(chain, h)
        self._watch(chain.saved)
        return h

    def other(self, func: Call, args: Args, kwargs: Kwargs) -> Any:
        chain = self._chain
        if chain is None or not args or args[0] is not chain.value or func in _GETTERS:
            return self.call(func, args, kwargs)
        if func is F.dropout and self._ends_in(chain, args[0]):
            return self._dropout(chain, *args, **kwargs)
        self._chain = None
        return self.call(func, args, kwargs)

    def _dropout(self, chain: Chain, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """F.dropout, from the same random numbers, with its mask saved."""
        if not training or p == 0:
            return x
        dropout_mask = F.dropout(torch.ones_like(x), p, training=True)
        chain.dropout_mask = dropout_mask if chain.dropout_mask is None else chain.dropout_mask * dropout_mask
        self._advance(chain, x.mul_(dropout_mask) if inplace else x * dropout_mask)
        return chain.value

    def _finish_chain(self, z: Tensor, cut: Tensor) -> FusedLayer | None:
        chain, self._chain = self._chain, None
        if chain is None or not self._ends_in(chain, z):
            return None
        row = chain.activation or ACTIVATIONS["identity"]
        saved = cut if chain.saved is None or chain.saved is z else chain.saved.detach()
        return FusedLayer(
            chain.x, chain.weight, chain.bias, chain.convolution, row.name, chain.p, chain.q, saved, chain.dropout_mask
        )

    def _advance(self, chain: Chain, value: Tensor) -> None:
        chain.value, chain.version = value, self.version(value)

    def _ends_in(self, chain: Chain, z: Tensor) -> bool:
        """Whether z is the chain's newest result, and still has the values that the chain gave it."""
        return chain.value is z and chain.version == self.version(z)

    def version(self, tensor: Tensor) -> int:
        # A compiler's graph has no version counters; an eager pass checks the same network.
        return 0 if self.is_traced else tensor._version

    def _watch(self, saved: Tensor) -> None:
        self._versions.append((saved, self.version(saved)))

    def _check_versions(self) -> None:
        for saved, version in self._versions:
            if self.version(saved) != version:
                raise RuntimeError(
                    f"net: a tensor of shape {tuple(saved.shape)} that a gradient needs was modified by an in-place "
                    f"operation: it is at version {saved._version}, expected {version}"
                )


# Looking at a tensor does not end a chain.
_GETTERS: frozenset[Call] = SIZES | {T.requires_grad.__get__}


def _start_chain(func: Call, args: Args, kwargs: Kwargs, value: Tensor) -> Chain | None:
    if func is LINEAR:
        x, weight, bias = _bind_linear(*args, **kwargs)
        convolution = None
    elif func in CONVOLUTIONS:
        x, weight, bias, convolution = _bind_convolution(*args, **kwargs)
        if convolution is None or x.dim() != weight.dim():
            return None
    else:
        return None
    if x.requires_grad or not _is_plain_parameter(weight) or not (bias is None or _is_plain_parameter(bias)):
        return None
    if not (value.requires_grad and value.is_floating_point()):
        return None
    # A bias that is broadcast has a gradient of another shape than a layer's.
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    return Chain(x if x.dtype == value.dtype else x.to(value.dtype), weight, bias, convolution, value, 0)


def _is_plain_parameter(p: Tensor) -> bool:
    return isinstance(p, nn.Parameter) and p.is_leaf


def _bind_linear(input: Tensor, weight: Any, bias: Any = None) -> tuple[Tensor, Any, Any]:
    return input, weight, bias


def _bind_convolution(
    input: Tensor, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Tensor, Any, Any, Convolution | None]:
    if isinstance(padding, str):
        return input, weight, bias, None
    n = weight.dim() - 2
    return input, weight, bias, Convolution(_per_axis(stride, n), _per_axis(padding, n), _per_axis(dilation, n), groups)


def _per_axis(value: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    values = (value,) * n if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values
