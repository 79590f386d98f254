"""The elementwise activations that a fused segment may hold: how each is called, what it keeps, how it is derived.

A fused segment applies f' without an autograd graph. What f' is computed from is saved by the forward pass anyway
wherever possible: the output h, which is also the next layer's input. Only where h does not determine f' (|x|, a
negative leaky slope, gelu …) the pre-activation a is saved instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

aten = torch.ops.aten
T = torch.Tensor


def tile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tiles in Triton kernels. Without Triton there are none, and it is never called."""
    compiled: Callable[..., Any] = function if triton is None else triton.jit(function)
    return compiled


@dataclass(frozen=True)
class Activation:
    """One row of the table. ``p`` and ``q`` are the call's numeric parameters, 0 where there are none."""

    name: str
    calls: tuple[Callable[..., Any], ...]
    """The torch functions that compute it."""
    apply: Callable[[Tensor, float, float], Tensor]
    """(a, p, q) → f(a). May overwrite a where f' does not need it: the memory traffic of a large a costs time."""
    gradient: Callable[[Tensor, Tensor, float, float], Tensor]
    """(g, saved, p, q) → g ⊙ f'(a), from the saved tensor."""
    tile_gradient: Callable[..., Any]
    """The same for a tile in a Triton kernel, in float32."""
    modules: tuple[type[nn.Module], ...] = ()
    """The modules that compute it and nothing else; their attributes have the names of the parameters."""
    keeps_output: Callable[[float, float], bool] = lambda p, q: True
    """Whether f' follows from h (true) or needs a (false)."""
    parameters: tuple[tuple[str, Any], ...] = ()
    """Name and default of each parameter after the input, in the order of the call."""
    number: Callable[[Any], float] = float


def _needs_input(p: float, q: float) -> bool:
    return False


def _slope_keeps_sign(slope: float, q: float) -> bool:
    return slope >= 0


@tile_function
def _identity_tile(g, h, p, q):
    return g


@tile_function
def _tanh_tile(g, h, p, q):
    return g * (1 - h * h)


@tile_function
def _relu_tile(g, h, p, q):
    return tl.where(h <= 0, 0.0, g)


@tile_function
def _leaky_relu_tile(g, saved, slope, q):
    return tl.where(saved > 0, g, g * slope)


@tile_function
def _abs_tile(g, a, p, q):
    return tl.where(a > 0, g, tl.where(a < 0, -g, g * a))


@tile_function
def _sigmoid_tile(g, h, p, q):
    return g * (1 - h) * h


@tile_function
def _gelu_tile(g, a, tanh_form, q):
    density = tl.exp(-0.5 * a * a) * 0.3989422804014327
    exact = 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * density
    # 1 + tanh(u) = 2 sigmoid(2u), which does not cancel for negative u.
    inner = 1.5957691216057308 * (a + 0.044715 * a * a * a)
    s = tl.sigmoid(inner)
    approximate = s + a * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * a * a)
    return g * tl.where(tanh_form != 0, approximate, exact)


@tile_function
def _silu_tile(g, a, p, q):
    s = tl.sigmoid(a)
    return g * s * (1 + a * (1 - s))


@tile_function
def _elu_tile(g, saved, alpha, q):
    # alpha >= 0: saved is h, and f' = h + alpha; else it is a.
    below = tl.where(alpha < 0, alpha * tl.exp(tl.minimum(saved, 0.0)), saved + alpha)
    return tl.where(saved > 0, g, g * below)


@tile_function
def _softplus_tile(g, a, beta, threshold):
    return tl.where(a * beta > threshold, g, g * tl.sigmoid(a * beta))


@tile_function
def _hardtanh_tile(g, h, low, high):
    return tl.where((h <= low) | (h >= high), 0.0, g)


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation(
            "identity",
            calls=(),
            apply=lambda a, p, q: a,
            gradient=lambda g, h, p, q: g,
            tile_gradient=_identity_tile,
        ),
        Activation(
            "tanh",
            calls=(torch.tanh, T.tanh, torch.tanh_, T.tanh_, F.tanh),
            modules=(nn.Tanh,),
            apply=lambda a, p, q: a.tanh_(),
            gradient=lambda g, h, p, q: aten.tanh_backward(g, h),
            tile_gradient=_tanh_tile,
        ),
        Activation(
            "relu",
            calls=(torch.relu, T.relu, torch.relu_, T.relu_, F.relu),
            modules=(nn.ReLU,),
            apply=lambda a, p, q: a.relu_(),
            gradient=lambda g, h, p, q: aten.threshold_backward(g, h, 0),
            tile_gradient=_relu_tile,
        ),
        Activation(
            "leaky_relu",
            calls=(F.leaky_relu, F.leaky_relu_),
            modules=(nn.LeakyReLU,),
            apply=lambda a, slope, q: F.leaky_relu(a, slope, inplace=slope >= 0),
            gradient=lambda g, saved, slope, q: aten.leaky_relu_backward(g, saved, slope, False),
            tile_gradient=_leaky_relu_tile,
            keeps_output=_slope_keeps_sign,
            parameters=(("negative_slope", 0.01),),
        ),
        Activation(
            "abs",
            calls=(torch.abs, T.abs, torch.abs_, T.abs_, torch.absolute, T.absolute, T.absolute_, T.__abs__),
            apply=lambda a, p, q: a.abs(),
            gradient=lambda g, a, p, q: g * a.sgn(),
            tile_gradient=_abs_tile,
            keeps_output=_needs_input,
        ),
        Activation(
            "sigmoid",
            calls=(torch.sigmoid, T.sigmoid, torch.sigmoid_, T.sigmoid_, F.sigmoid, torch.special.expit),
            modules=(nn.Sigmoid,),
            apply=lambda a, p, q: a.sigmoid_(),
            gradient=lambda g, h, p, q: aten.sigmoid_backward(g, h),
            tile_gradient=_sigmoid_tile,
        ),
        Activation(
            "gelu",
            calls=(F.gelu,),
            modules=(nn.GELU,),
            apply=lambda a, p, q: F.gelu(a, approximate="tanh" if p else "none"),
            gradient=lambda g, a, p, q: aten.gelu_backward(g, a, approximate="tanh" if p else "none"),
            tile_gradient=_gelu_tile,
            keeps_output=_needs_input,
            parameters=(("approximate", "none"),),
            number=lambda approximate: float(approximate == "tanh"),
        ),
        Activation(
            "silu",
            calls=(F.silu,),
            modules=(nn.SiLU,),
            apply=lambda a, p, q: F.silu(a),
            gradient=lambda g, a, p, q: aten.silu_backward(g, a),
            tile_gradient=_silu_tile,
            keeps_output=_needs_input,
        ),
        Activation(
            "elu",
            calls=(F.elu, F.elu_),
            modules=(nn.ELU,),
            apply=lambda a, alpha, q: F.elu(a, alpha, inplace=alpha >= 0),
            gradient=lambda g, h, alpha, q: aten.elu_backward(g, alpha, 1, 1, alpha >= 0, h),
            tile_gradient=_elu_tile,
            keeps_output=_slope_keeps_sign,
            parameters=(("alpha", 1.0),),
        ),
        Activation(
            "softplus",
            calls=(F.softplus,),
            modules=(nn.Softplus,),
            apply=lambda a, beta, threshold: F.softplus(a, beta, threshold),
            gradient=lambda g, a, beta, threshold: aten.softplus_backward(g, a, beta, threshold),
            tile_gradient=_softplus_tile,
            keeps_output=_needs_input,
            parameters=(("beta", 1.0), ("threshold", 20.0)),
        ),
        Activation(
            "hardtanh",
            calls=(F.hardtanh, F.hardtanh_),
            modules=(nn.Hardtanh, nn.ReLU6),
            apply=lambda a, low, high: F.hardtanh(a, low, high, inplace=True),
            gradient=lambda g, h, low, high: aten.hardtanh_backward(g, h, low, high),
            tile_gradient=_hardtanh_tile,
            parameters=(("min_val", -1.0), ("max_val", 1.0)),
        ),
    )
}

FUSED_CALLS: dict[Callable[..., Any], Activation] = {f: row for row in ACTIVATIONS.values() for f in row.calls}

INPLACE_CALLS: frozenset[Callable[..., Any]] = frozenset(
    f for f in FUSED_CALLS if f.__name__.endswith("_") and f is not T.__abs__
)

UNFUSED_CALLS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.relu6, F.selu, F.selu_, F.celu, F.celu_, F.mish, F.hardswish, F.hardsigmoid, F.prelu, F.softsign,
        F.logsigmoid, F.tanhshrink, F.softshrink, F.hardshrink, F.rrelu, F.rrelu_, F.threshold, F.glu, torch.selu,
        torch.selu_, torch.celu, torch.celu_, torch.prelu, torch.rrelu, torch.rrelu_, torch.threshold, T.prelu,
        torch.sin, torch.sin_, T.sin, T.sin_, torch.cos, torch.cos_, T.cos, T.cos_, torch.erf, torch.erf_, T.erf,
        T.erf_, torch.atan, torch.atan_, T.atan, T.atan_, torch.arctan, torch.arctan_, T.arctan, T.arctan_,
        F.threshold_,  # type: ignore[attr-defined]
        torch.hardshrink, T.hardshrink, torch.asinh, T.asinh, torch.special.erf,
    }
)  # fmt: skip
"""Activations that a tap may follow, but whose segment autograd finishes."""

CLAMPS: frozenset[Callable[..., Any]] = frozenset(
    {torch.clamp, torch.clamp_, torch.clip, torch.clip_, T.clamp, T.clamp_, T.clip, T.clip_}
)
CLAMP_MIN: frozenset[Callable[..., Any]] = frozenset({torch.clamp_min, torch.clamp_min_, T.clamp_min, T.clamp_min_})
# The bounds of relu, relu6 and hardtanh; others limit numbers that must not be too large.
_BOUNDS = ((0, None), (0, 6), (-1, 1))


def is_activation(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tap may follow the call ``func(input, *args, **kwargs)``."""
    if func in FUSED_CALLS or func in UNFUSED_CALLS:
        return True
    if func not in CLAMPS and func not in CLAMP_MIN:
        return False
    bounds = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(("min", "max"))]
    return all(bound is None or isinstance(bound, (int, float)) for bound in bounds) and tuple(bounds) in _BOUNDS


def call_parameters(row: Activation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """(p, q) of a call ``f(input, *args, **kwargs)``."""
    values = [0.0, 0.0]
    for i, (name, default) in enumerate(row.parameters):
        value = args[i] if i < len(args) else kwargs.get(name, default)
        values[i] = row.number(value)
    return values[0], values[1]


def module_parameters(row: Activation, module: nn.Module) -> tuple[float, float]:
    """(p, q) of one of the row's modules."""
    if not row.parameters:
        return 0.0, 0.0
    return call_parameters(row, tuple(getattr(module, name) for name, _ in row.parameters), {})


def is_inplace(func: Callable[..., Any], row: Activation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``f(input, *args, **kwargs)`` overwrites its input."""
    n = len(row.parameters)
    positional = bool(args[n]) if len(args) > n else False
    return func in INPLACE_CALLS or bool(kwargs.get("inplace", positional))
