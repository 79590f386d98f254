"""The formulas of Direct Feedback Alignment, written apart from the package that they check.

Everything works in the dtype of the tensors it is given: in float64 it is the oracle, in a narrower one the
plain formula whose rounding error the package's is measured against. Derivatives follow from the definitions
of the activations at the pre-activation a, not from torch's backward functions. Segments that are more than a
weight layer and an activation are differentiated by autograd, each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

# Threads that wait for one another cost more than they bring on matrices as small as those of the tests.
torch.set_num_threads(1)


def _normal_density(a: Tensor) -> Tensor:
    return torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def _normal_distribution(a: Tensor) -> Tensor:
    return (1 + torch.erf(a / math.sqrt(2))) / 2


GELU_SLOPE = math.sqrt(2 / math.pi)


def _gelu_inner(a: Tensor) -> Tensor:
    return torch.tanh(GELU_SLOPE * (a + 0.044715 * a**3))


def _gelu(a: Tensor, tanh_form: float) -> Tensor:
    return 0.5 * a * (1 + _gelu_inner(a)) if tanh_form else a * _normal_distribution(a)


def _gelu_slope(a: Tensor, tanh_form: float) -> Tensor:
    if not tanh_form:
        return _normal_distribution(a) + a * _normal_density(a)
    t = _gelu_inner(a)
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * GELU_SLOPE * (1 + 3 * 0.044715 * a * a)


def _logistic(a: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-a))


def _softplus(a: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(beta * a > threshold, a, torch.log1p(torch.exp((beta * a).clamp(max=threshold))) / beta)


def _widened(a: Tensor) -> Tensor:
    """Elementwise functions of half precision are computed in float32 and rounded once, as torch does."""
    return a.to(torch.promote_types(a.dtype, torch.float32))


def activate(name: str, a: Tensor, p: float = 0.0, q: float = 0.0) -> Tensor:
    """f(a). ``p`` and ``q`` are the activation's parameters in the order of torch's signature."""
    dtype, a = a.dtype, _widened(a)
    zero = torch.zeros_like(a)
    forms: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: a,
        "tanh": lambda: torch.tanh(a),
        "relu": lambda: torch.where(a > 0, a, zero),
        "leaky_relu": lambda: torch.where(a > 0, a, p * a),
        "abs": lambda: torch.where(a < 0, -a, a),
        "sigmoid": lambda: _logistic(a),
        "gelu": lambda: _gelu(a, p),
        "silu": lambda: a * _logistic(a),
        "elu": lambda: torch.where(a > 0, a, p * torch.expm1(a.clamp(max=0))),
        "softplus": lambda: _softplus(a, p, q),
        "hardtanh": lambda: torch.where(a < p, zero + p, torch.where(a > q, zero + q, a)),
    }
    return forms[name]().to(dtype)


def slope(name: str, a: Tensor, p: float = 0.0, q: float = 0.0) -> Tensor:
    """f'(a); at a kink, the value that torch takes."""
    dtype, a = a.dtype, _widened(a)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    forms: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: one,
        "tanh": lambda: 1 - torch.tanh(a) ** 2,
        "relu": lambda: torch.where(a > 0, one, zero),
        "leaky_relu": lambda: torch.where(a > 0, one, zero + p),
        "abs": lambda: torch.sign(a),
        "sigmoid": lambda: _logistic(a) * (1 - _logistic(a)),
        "gelu": lambda: _gelu_slope(a, p),
        "silu": lambda: _logistic(a) * (1 + a * (1 - _logistic(a))),
        "elu": lambda: torch.where(a > 0, one, p * torch.exp(a.clamp(max=0))),
        "softplus": lambda: torch.where(p * a > q, one, _logistic(p * a)),
        "hardtanh": lambda: torch.where((a > p) & (a < q), one, zero),
    }
    return forms[name]().to(dtype)


@dataclass
class Layer:
    """One weight layer and what follows it. A dropout mask comes divided by the keep probability."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "identity"
    p: float = 0.0
    q: float = 0.0
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Layer:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype)

        weight = self.weight.detach().to(dtype)
        return Layer(weight, cast(self.bias), self.activation, self.p, self.q, cast(self.mask))


@dataclass
class LayerGrad:
    """ΔW and Δb of one layer, and the size of the terms that were summed, which bounds their rounding."""

    weight: Tensor
    bias: Tensor
    weight_scale: float
    bias_scale: float


def error_of(output: Tensor, target: Tensor, loss: str) -> Tensor:
    """e = ∂L/∂output of the losses in `loss_of`."""
    rows = max(1, output.shape[0])
    if loss == "cross_entropy":
        shifted = torch.exp(output - output.amax(1, keepdim=True))
        return (shifted / shifted.sum(1, keepdim=True) - F.one_hot(target, output.shape[1]).to(output.dtype)) / rows
    return (output - target.to(output.dtype)) / rows


def loss_of(output: Tensor, target: Tensor, loss: str) -> Tensor:
    """The loss itself, for the package under test; also of an empty batch."""
    rows = max(1, output.shape[0])
    if loss == "cross_entropy":
        return F.cross_entropy(output, target, reduction="sum") / rows
    return 0.5 * (output - target).square().sum() / rows


def mlp_forward(layers: Sequence[Layer], x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(input h_{i-1} of every layer, pre-activation a_i of every layer, output), all [rows, units]."""
    inputs, pre = [], []
    for layer in layers:
        inputs.append(x)
        a = F.linear(x, layer.weight, layer.bias)
        pre.append(a)
        x = activate(layer.activation, a, layer.p, layer.q)
        x = x if layer.mask is None else x * layer.mask
    return inputs, pre, x


def mlp_gradients(
    layers: Sequence[Layer],
    x: Tensor,
    e: Tensor,
    feedback: Sequence[Tensor],
    *,
    mask_before_tap: bool = False,
) -> list[LayerGrad]:
    """Every layer's gradient from the error e [rows, E] and B_i [units, E] of every layer but the last.

    ``mask_before_tap``: a hidden layer's dropout lies between it and its tap, so its mask takes part in δa.
    """
    inputs, pre, _ = mlp_forward(layers, x)
    last = len(layers) - 1
    return [
        layer_gradient(layer, inputs[i], pre[i], e, None if i == last else feedback[i], mask_before_tap)
        for i, layer in enumerate(layers)
    ]


def layer_gradient(layer: Layer, x: Tensor, a: Tensor, e: Tensor, B: Tensor | None, mask_before_tap: bool) -> LayerGrad:
    """One layer's gradient, from its input x and pre-activation a; of the output layer if B is None."""
    delta, size = e, e.abs()
    if B is not None:
        delta, size = tap_delta(layer, a, e, B, mask_before_tap)
    bias = _widened(delta).sum(0).to(e.dtype)
    return LayerGrad(delta.T @ x, bias, _largest(size.T @ x.abs()), _largest(size.sum(0)))


def tap_delta(layer: Layer, a: Tensor, e: Tensor, B: Tensor, with_mask: bool) -> tuple[Tensor, Tensor]:
    """(δa, the size of its terms), both of a's shape: the units of B [units, E] are a's elements for one row of e."""
    rate = _widened(slope(layer.activation, a, layer.p, layer.q))
    if with_mask and layer.mask is not None:
        rate = rate * layer.mask
    B, wide = B.to(rate.dtype), _widened(e)
    delta = (wide @ B.T).reshape(rate.shape) * rate
    # f' taken from h is only known to an absolute precision, so it counts as at least one.
    size = (wide.abs() @ B.abs().T).reshape(rate.shape) * rate.abs().clamp(min=1)
    return delta.to(e.dtype), size.to(e.dtype)


def conv_gradient(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> LayerGrad:
    """The gradients of a 2-d convolution with the input x and the gradient δa of its output."""
    options = (stride, padding, dilation, groups)
    grad = conv2d_weight(x, weight.shape, delta, *options)
    size = conv2d_weight(x.abs(), weight.shape, delta.abs(), *options)
    axes = (0, 2, 3)
    return LayerGrad(grad, delta.sum(axes), _largest(size), _largest(delta.abs().sum(axes)))


def feedback_from_matrix(U: Tensor, size: int) -> Tensor:
    """B_i = U[:l_i] / sqrt(l_i · E)."""
    return U[:size].double() / math.sqrt(size * U.shape[1])


def cut_gradients(
    net: nn.Module,
    cuts: Sequence[str],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    U: Tensor,
    *,
    at_input: bool = False,
) -> tuple[list[Tensor | None], list[float]]:
    """Gradients of ``net.parameters()`` with the network cut at the outputs (or inputs) of the modules named.

    Each segment is differentiated by autograd, from δh = e B_iᵀ at the cut that ends it, and the last from e.
    For segments that `mlp_gradients` has no formula for; ``net`` has to be a copy, in any precision. Beside each
    gradient comes the size of the terms, one a row of e, that were summed.
    """
    ends: list[Tensor] = []
    handles = [_cut_module(net.get_submodule(name), ends, at_input) for name in cuts]
    output = net(x)
    for handle in handles:
        handle.remove()
    # Where the last layer is frozen, the output hangs on no parameter.
    leaf = output if output.requires_grad else output.detach().requires_grad_()
    (e,) = torch.autograd.grad(loss(leaf), leaf, retain_graph=True)
    e = e.reshape(-1, e.shape[-1])
    heads = [h for h in (output, *ends) if h.requires_grad]

    def gradients(error: Tensor) -> list[Tensor | None]:
        deltas = [error.reshape(h.shape) if h is output else _at_cut(error, h, U) for h in heads]
        learning = [p for p in net.parameters() if p.requires_grad]
        found = iter(torch.autograd.grad(heads, learning, deltas, allow_unused=True, retain_graph=True))
        return [next(found) if p.requires_grad else None for p in net.parameters()]

    grads = gradients(e)
    scales: list[Any] = [0.0 if g is None else torch.zeros_like(g) for g in grads]
    for row in range(e.shape[0]):
        alone = torch.zeros_like(e)
        alone[row] = e[row]
        scales = [s if g is None else s + g.abs() for s, g in zip(scales, gradients(alone), strict=True)]
    return grads, [0.0 if isinstance(s, float) else _largest(s) for s in scales]


def _at_cut(e: Tensor, end: Tensor, U: Tensor) -> Tensor:
    wide = _widened(e)
    B = feedback_from_matrix(U, end.numel() // e.shape[0]).to(wide.dtype)
    with torch.autocast(e.device.type, enabled=False):
        return (wide @ B.T).to(end.dtype).reshape(end.shape)


def _cut_module(module: nn.Module, ends: list[Tensor], at_input: bool) -> Any:
    def cut(z: Tensor) -> Tensor:
        ends.append(z)
        return z.detach()

    if at_input:
        return module.register_forward_pre_hook(lambda module, args: (cut(args[0]), *args[1:]))
    return module.register_forward_hook(lambda module, args, output: cut(output))


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def assert_close_to_oracle(out: Tensor, ref64: Tensor, same_precision: Tensor, scale: float, name: str = "") -> None:
    """max|out − ref64| ≤ 2 · max|same_precision − ref64| + a few last bits of the summed terms."""
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    if out.numel() == 0:
        return
    assert out.isfinite().all(), f"{name}: not finite"
    error = _largest(out.double() - ref64.double())
    baseline = _largest(same_precision.double() - ref64.double())
    # In float64 the oracle rounds as well, and there is no narrower baseline.
    last_bits = 64 if out.dtype == torch.float64 else 4
    tiny = last_bits * torch.finfo(out.dtype).eps * max(scale, _largest(ref64))
    assert error <= 2 * baseline + tiny, f"{name}: error {error:.3e}, baseline {baseline:.3e}, tiny {tiny:.3e}"
