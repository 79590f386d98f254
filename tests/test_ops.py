"""The registered operators: their contracts, and that they are the torch backend's functions."""

from __future__ import annotations

import pytest
import torch
from oracle import Layer, assert_close_to_oracle, feedback_from_matrix, mlp_forward, mlp_gradients

import dfa_kernels as dfa
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends.calls import LayerCall, TapsCall, encoded

OPS = torch.ops.dfa_kernels
SIZES = [6, 9, 7, 4]
KINDS = [
    ("gaussian", "dense"),
    ("gaussian", "procedural"),
    ("rademacher", "dense"),
    ("sparse", "dense"),
    ("fastfood", "procedural"),
]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def layer_arguments(
    rows=5, positions=1, kind="gaussian", storage="dense", dtype=torch.float32, dropout_mask=False, masks=None
):
    """Two hidden layers, tanh and a leaky slope of −0.5, and an output layer."""
    torch.manual_seed(0)
    feedback = dfa.Feedback(kind, storage, seed=2)
    stored = feedback.stored(SIZES[1] * positions, SIZES[3], "cpu")
    long = rows * positions
    inputs = [
        torch.randn(long, SIZES[0], dtype=dtype),
        torch.randn(long, SIZES[1], dtype=dtype),
        torch.randn(rows, SIZES[2] * positions, dtype=dtype),
    ]
    saved = [torch.tanh(torch.randn(long, SIZES[1], dtype=dtype)), torch.randn(long, SIZES[2], dtype=dtype)]
    keep = torch.randint(2, saved[1].shape).to(dtype) * 2 if dropout_mask else None
    error = torch.randn(rows, SIZES[3], dtype=dtype)
    numbers = [["tanh", "leaky_relu"], [0.0, 0.0, -0.5, 0.0]]
    masks = masks or ([True] * 3, [True] * 3)
    return LayerCall(error, stored, feedback.spec, inputs, saved, [None, keep], *numbers, *masks)


MASKS = [([True] * 3, [False] * 3), ([False, True, True], [True, False, True]), ([False] * 3, [False] * 3)]
SAMPLES = {
    "plain": {},
    "rows": {"rows": 1},
    "empty": {"rows": 0},
    "positions": {"positions": 3},
    "dropout_mask": {"dropout_mask": True},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    **{f"{kind} {storage}": {"kind": kind, "storage": storage} for kind, storage in KINDS},
    **{f"masks {i}": {"masks": masks} for i, masks in enumerate(MASKS)},
}
samples = pytest.mark.parametrize("options", SAMPLES.values(), ids=SAMPLES)


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@samples
def test_layer_grads(options):
    arguments = layer_arguments(**options)
    dtype = arguments.error.dtype
    torch.library.opcheck(OPS.layer_grads, (*encoded(arguments), dtype), test_utils=CHECKS)
    found = OPS.layer_grads(*encoded(arguments), dtype)
    assert_same(found, torch_backend.layer_grads(arguments, dtype))
    assert len(found) == sum(arguments.weight_grads) + sum(arguments.bias_grads)


def test_layer_grads_in_the_parameters_dtype():
    """Activations in half precision, parameters in float32."""
    arguments = layer_arguments(dtype=torch.bfloat16)
    found = OPS.layer_grads(*encoded(arguments), torch.float32)
    assert {g.dtype for g in found} == {torch.float32}
    assert_same([g.bfloat16() for g in found[::2]], OPS.layer_grads(*encoded(arguments), torch.bfloat16)[::2])


def update_arguments(rule, options):
    arguments = layer_arguments(**options)
    dtype = arguments.error.dtype
    shapes = [g.shape for g in torch_backend.layer_grads(arguments, dtype)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if rule == "sgd":
        state = [torch.randn(shape, dtype=dtype) for shape in shapes]
        hyper = [0.1, 0.9, 0.01, 0.0] * len(shapes)
    else:
        state = [torch.rand(shape, dtype=dtype) for shape in shapes for _ in range(2)]
        hyper = [0.1, 0.9, 0.99, 1e-8, 0.01, 3.0] * len(shapes)
    return arguments, weights, state, rule, hyper


def copies(tensors):
    return [t.clone() for t in tensors]


@samples
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_layer_update_(rule, options):
    arguments, weights, state, rule, hyper = update_arguments(rule, options)
    torch.library.opcheck(
        OPS.layer_update_, (*encoded(arguments), copies(weights), copies(state), rule, hyper), test_utils=CHECKS
    )
    by_operator, by_function = (copies(weights), copies(state)), (copies(weights), copies(state))
    OPS.layer_update_(*encoded(arguments), *by_operator, rule, hyper)
    torch_backend.layer_update_(arguments, *by_function, rule, hyper)
    assert_same(by_operator[0] + by_operator[1], by_function[0] + by_function[1])
    assert all(not torch.equal(a, b) for a, b in zip(by_operator[0], weights, strict=True))


def tap_arguments(rows=5, kind="gaussian", storage="dense", dtype=torch.float32, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    feedback = dfa.Feedback(kind, storage, seed=2)
    sizes = [24, 7, 9]
    h = torch.tanh(torch.randn(rows, 4, 3, 2, dtype=dtype)).contiguous(memory_format=memory_format)
    saved = [h, None, torch.randn(rows, 9, dtype=dtype)]
    dropout_mask = [torch.randint(2, (rows, 4, 3, 2)).to(dtype) * 2, None, None]
    activations, parameters = ["tanh", "identity", "hardtanh"], [0.0, 0.0, 0.0, 0.0, -0.5, 0.5]
    stored = feedback.stored(24, 4, "cpu")
    error = torch.randn(rows, 4, dtype=dtype)
    return TapsCall(error, stored, feedback.spec, sizes, saved, dropout_mask, activations, parameters)


TAP_SAMPLES = {
    "plain": {},
    "empty": {"rows": 0},
    "one row": {"rows": 1},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "channels last": {"memory_format": torch.channels_last},
    **{f"{kind} {storage}": {"kind": kind, "storage": storage} for kind, storage in KINDS},
}


@pytest.mark.parametrize("options", TAP_SAMPLES.values(), ids=TAP_SAMPLES)
def test_project_taps(options):
    arguments = tap_arguments(**options)
    torch.library.opcheck(OPS.project_taps, tuple(encoded(arguments)), test_utils=CHECKS)
    found = OPS.project_taps(*encoded(arguments))
    assert_same(found, torch_backend.project_taps(arguments))
    rows = arguments.error.shape[0]
    assert [tuple(d.shape) for d in found] == [(rows, 4, 3, 2), (rows, 7), (rows, 9)]
    assert found[0].stride() == arguments.saved[0].stride()


def test_project_taps_equals_the_formula():
    error, stored, spec, sizes, saved, dropout_mask, activations, parameters = tap_arguments()
    found = OPS.project_taps(error, stored, spec.encode(), sizes, saved, dropout_mask, activations, parameters)

    def expected(dtype):
        e, U = error.to(dtype), stored[0]
        delta = [e @ feedback_from_matrix(U, size).to(dtype).T for size in sizes]
        h = saved[0].to(dtype)
        inside = (saved[2] > -0.5) & (saved[2] < 0.5)
        return [delta[0].reshape(h.shape) * (1 - h * h) * dropout_mask[0], delta[1], delta[2] * inside]

    for out, ref, same in zip(found, expected(torch.float64), expected(torch.float32), strict=True):
        assert_close_to_oracle(out, ref, same, float(ref.abs().max()))


def test_layer_grads_equal_the_formula():
    torch.manual_seed(1)
    layers = [
        Layer(torch.randn(9, 6), torch.randn(9), "tanh"),
        Layer(torch.randn(7, 9), torch.randn(7), "leaky_relu", -0.5),
        Layer(torch.randn(4, 7), torch.randn(4)),
    ]
    x, e = torch.randn(5, 6), torch.randn(5, 4)
    feedback = dfa.Feedback(seed=2)
    inputs, pre, _ = mlp_forward(layers, x)
    saved = [torch.tanh(pre[0]), pre[1]]
    found = OPS.layer_grads(
        e, feedback.stored(9, 4, "cpu"), feedback.spec.encode(), inputs, saved, [None, None],
        ["tanh", "leaky_relu"], [0.0, 0.0, -0.5, 0.0], [True] * 3, [True] * 3, torch.float32,
    )  # fmt: skip
    B = [feedback_from_matrix(feedback.stored(9, 4, "cpu")[0], size) for size in (9, 7)]
    ref = mlp_gradients([layer.to(torch.float64) for layer in layers], x.double(), e.double(), B)
    same = mlp_gradients(layers, x, e, B)
    for i, (r, s) in enumerate(zip(ref, same, strict=True)):
        assert_close_to_oracle(found[2 * i], r.weight, s.weight, r.weight_scale)
        assert_close_to_oracle(found[2 * i + 1], r.bias, s.bias, r.bias_scale)


def test_empty_batch_gives_zeros():
    for grad in OPS.layer_grads(*encoded(layer_arguments(rows=0)), torch.float32):
        assert torch.equal(grad, torch.zeros_like(grad))
    arguments, weights, _, rule, _ = update_arguments("sgd", {"rows": 0})
    plain = [0.1, 0.0, 0.0, 0.0] * len(weights)
    before = copies(weights)
    OPS.layer_update_(*encoded(arguments), weights, [], rule, plain)
    assert_same(weights, before)


def test_only_the_output_layer():
    """No hidden layer is fused, so the feedback is not needed."""
    x, e = torch.randn(5, 6), torch.randn(5, 4)
    spec = dfa.Feedback().spec.encode()
    arguments = (e, [], spec, [x], [], [], [], [], [True], [True], torch.float32)
    torch.library.opcheck(OPS.layer_grads, arguments, test_utils=CHECKS)
    weight, bias = OPS.layer_grads(*arguments)
    ref_weight, ref_bias = e.double().T @ x.double(), e.double().sum(0)
    assert_close_to_oracle(weight, ref_weight, e.T @ x, float(ref_weight.abs().max()))
    assert_close_to_oracle(bias, ref_bias, e.sum(0), float(ref_bias.abs().max()))


def test_the_tap_operator_is_the_identity():
    x = torch.randn(3, 4, requires_grad=True)
    assert OPS.tap(x, "name") is x
