"""Whole models learn what a network cut by hand learns (`reference_dfa`), in float64."""

from __future__ import annotations

import functools
import re
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import whole_models as wm
from reference_dfa import Place, chained_gradients, delta, reference_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import dfa_kernels as dfa

BOTH = ("nonlinearity", "layer_input")
"""For networks in which each activation is the input of the next weight layer: both policies teach the same."""


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def tokens(b: int, t: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(11, (b, t))


def adjacency(n: int = 5) -> Tensor:
    links = ((torch.rand(n, n) < 0.4) | torch.eye(n, dtype=torch.bool)).double()
    return links / links.sum(1, keepdim=True)


@dataclass
class Case:
    """A model, its inputs, and how `DFA` is called on it where the defaults do not do."""

    make: Callable[[], nn.Module]
    inputs: tuple[Callable[[], Tensor], ...]
    batch_dims: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    policies: tuple[str, ...] = ("nonlinearity",)

    def batch(self) -> tuple[nn.Module, list[Tensor]]:
        return self.make(), [make() for make in self.inputs]

    def pick(self, inputs: list[Tensor], index: Tensor) -> list[Tensor]:
        """Some rows of the inputs; nodes take their links with them."""
        pairs = zip(self.inputs, inputs, strict=True)
        return [x[index][:, index] if make is adjacency else x[index] for make, x in pairs]

    def output(self, y: Any) -> Tensor:
        return self.options.get("output", lambda y: y)(y)


def heads(y: dict[str, Tensor]) -> Tensor:
    return torch.cat([y["label"], y["place"]], 1)


CASES = {
    "squared_relu": Case(wm.SquaredReLU, (rows(4, 6),)),
    "gated_mlp": Case(wm.GatedMLP, (rows(4, 6),)),
    "gated_mlp, formula": Case(lambda: wm.GatedMLP(lambda h: h * torch.sigmoid(h)), (rows(4, 6),)),
    "nerf": Case(wm.NeRF, (rows(5, 9), rows(5, 4))),
    "deepfm": Case(wm.DeepFM, (lambda: torch.randint(20, (5, 4)),)),
    "gcn": Case(wm.GCN, (rows(5, 6), adjacency), policies=BOTH),
    "gpt": Case(wm.GPT, (tokens(3, 4),), 2),
    "gpt, as many positions as rows": Case(wm.GPT, (tokens(4, 4),), 2),
    "gpt, positions in the error": Case(wm.GPT, (tokens(3, 4),), 1, {"batch_dims": 1}),
    "gpt2": Case(lambda: wm.GPT(wm.Conv1D), (tokens(3, 4),), 2),
    "gpt2, tied": Case(lambda: wm.GPT(wm.Conv1D, tied=True), (tokens(3, 4),), 2),
    "bert": Case(wm.Bert, (tokens(3, 4),), 2),
    "bert, as many positions as rows": Case(wm.Bert, (tokens(4, 4),), 2),
    "bert, pooled": Case(lambda: wm.Bert(pooled=True), (tokens(3, 4),)),
    "bert, pooled, as many positions as rows": Case(lambda: wm.Bert(pooled=True), (tokens(4, 4),)),
    "sequence_first": Case(wm.SequenceFirst, (rows(3, 4, 6),), 2, policies=BOTH),
    "sequence_first, as many positions as rows": Case(wm.SequenceFirst, (rows(4, 4, 6),), 2),
    "sequence_first, pooled": Case(lambda: wm.SequenceFirst(pooled=True), (rows(3, 4, 6),)),
    "sequence_first, pooled, as many positions as rows": Case(lambda: wm.SequenceFirst(pooled=True), (rows(4, 4, 6),)),
    "unet": Case(wm.UNet, (rows(3, 2, 6, 6), rows(3, 1))),
    "segmentation": Case(wm.Segmentation, (rows(3, 3, 6, 6),), 1, {"batch_dims": 1}, BOTH),
    "bilstm_tagger": Case(wm.BiLSTMTagger, (tokens(3, 4),), 2, policies=BOTH),
    "bilstm_tagger, as many positions as rows": Case(wm.BiLSTMTagger, (tokens(4, 4),), 2),
    "gru_classifier": Case(wm.GRUClassifier, (rows(3, 4, 6),)),
    "gru_classifier, as many positions as rows": Case(wm.GRUClassifier, (rows(4, 4, 6),)),
    "rnn_classifier": Case(lambda: wm.GRUClassifier(nn.RNN), (rows(3, 4, 6),)),
    "bilstm_tagger, activated": Case(lambda: wm.BiLSTMTagger(F.relu), (tokens(3, 4),), 2, policies=BOTH),
    "attention_pooling": Case(wm.AttentionPooling, (rows(3, 4, 8),), policies=BOTH),
    "discriminator": Case(wm.Discriminator, (rows(3, 3, 8, 8),), policies=BOTH),
    "vae": Case(wm.VAE, (rows(5, 9), rows(5, 2))),
    "sparse_autoencoder": Case(wm.SparseAutoencoder, (rows(5, 9),), policies=BOTH),
    "resnet": Case(wm.ResNet, (rows(3, 3, 6, 6),)),
    "lora": Case(wm.LoRA, (rows(4, 6),)),
    "mlp_mixer": Case(wm.MLPMixer, (rows(3, 5, 6),)),
    "mlp_mixer, as many patches as rows": Case(wm.MLPMixer, (rows(5, 5, 6),)),
    "mlp_mixer, patches in the error": Case(lambda: wm.MLPMixer(dense=True), (rows(3, 5, 6),), 1, {"batch_dims": 1}),
    "conv_tagger": Case(lambda: wm.ConvTagger(7), (tokens(3, 5),), 2, policies=BOTH),
    "conv_tagger, as many channels as positions": Case(lambda: wm.ConvTagger(5), (tokens(3, 5),), 2),
    "conv_tagger, everything as many": Case(lambda: wm.ConvTagger(5), (tokens(5, 5),), 2),
    "multi_head, one": Case(wm.MultiHead, (rows(4, 6),), 1, {"output": lambda y: y["label"]}),
    "multi_head, both": Case(wm.MultiHead, (rows(4, 6),), 1, {"output": heads}),
    "pairs": Case(wm.Pairs, (rows(4, 6), rows(4, 5))),
}
for name in wm.FORMULAS:
    CASES[f"formula, {name}"] = Case(functools.partial(wm.FormulaMLP, name), (rows(4, 6),), policies=BOTH)
for name in wm.PRODUCTS:
    CASES[f"product, {name}"] = Case(functools.partial(wm.ProductMLP, name), (rows(4, 6),), policies=BOTH)
RUNS = [pytest.param(case, taps, id=f"{name}-{taps}") for name, case in CASES.items() for taps in case.policies]
ALONE = [pytest.param(case, id=name) for name, case in CASES.items()]


def loss(y: Tensor) -> Tensor:
    """Any will do whose gradient depends on y and differs from element to element."""
    return y.sin().sum()


def feedback() -> dfa.Feedback:
    return dfa.Feedback(seed=3, dtype=torch.float64)


def grads(net: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in net.parameters()]


def assert_gradients(net: nn.Module, expected: list[Tensor | None]) -> None:
    """No gradient may also be a zero one."""
    for (name, p), wanted in zip(net.named_parameters(), expected, strict=True):
        found = torch.zeros_like(p) if p.grad is None else p.grad
        wanted = torch.zeros_like(p) if wanted is None else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def assert_no_words(caught: list[warnings.WarningMessage]) -> None:
    assert not [str(w.message) for w in caught if "dfa_kernels" in str(w.message)]


# ---- the models ----


@pytest.mark.parametrize("case, taps", RUNS)
def test_gradients_equal_those_of_the_network_cut_by_hand(case, taps):
    net, inputs = case.batch()
    model = dfa.DFA(net, feedback(), taps=taps, **case.options)
    expected, _ = reference_gradients(net, inputs, loss, model.feedback.matrix, case.batch_dims, case.output)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = model(*inputs)
    loss(y).backward()
    assert_gradients(net, expected)
    assert_no_words(caught)


@pytest.mark.parametrize("case", ALONE)
def test_taps_are_named_after_the_layers_that_they_teach(case):
    net, inputs = case.batch()
    model = dfa.DFA(net, feedback(), **case.options)
    model(*inputs)
    _, places = reference_gradients(net, inputs, loss, model.feedback.matrix, case.batch_dims, case.output)
    assert [(tap.name, tap.shape) for tap in model.taps] == [(place.name, place.units) for place in places]


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3)], ids=["smaller", "larger"])
@pytest.mark.parametrize("case", ALONE)
def test_a_later_batch_of_another_size(case, sizes):
    """One row, where every size of 1 could be its dimension, included."""
    net, inputs = case.batch()
    model = dfa.DFA(net, feedback(), **case.options)
    for size in sizes:
        some = case.pick(inputs, torch.arange(size))
        expected, _ = reference_gradients(net, some, loss, model.feedback.matrix, case.batch_dims, case.output)
        model.zero_grad()
        loss(model(*some)).backward()
        assert_gradients(net, expected)


class Marked(nn.Module):
    """A model with a `dfa.Tap` at each of its places."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.net = net
        self.marks = nn.ModuleDict({name.replace(".", "/"): dfa.Tap() for name in names})

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs, tap=lambda h, name, rows=(0,): self.marks[name.replace(".", "/")](h))


@pytest.mark.parametrize("case", ALONE)
def test_marks_at_the_same_places_teach_the_same(case):
    net, inputs = case.batch()
    matrix = feedback().matrix
    expected, places = reference_gradients(net, inputs, loss, matrix, case.batch_dims, case.output)
    model = dfa.DFA(Marked(net, [place.name for place in places]), feedback(), **case.options)
    loss(model(*inputs)).backward()
    assert_gradients(net, expected)


# ---- the reference itself ----


@pytest.mark.parametrize("case", ALONE)
def test_the_pieces_of_the_reference_make_up_backpropagation(case):
    """Each from its tap's true gradient: then every place cuts, and no gradient is lost or counted twice."""
    net, inputs = case.batch()
    loss(case.output(net(*inputs))).backward()
    assert_gradients(net, chained_gradients(net, inputs, loss, case.output))


@pytest.mark.parametrize("case", ALONE)
def test_the_rows_of_the_reference_move_with_the_batch(case):
    net, inputs = case.batch()
    order = torch.randperm(inputs[0].shape[0])
    moved = case.pick(inputs, order)
    places, after = (
        reference_gradients(net, x, loss, feedback().matrix, case.batch_dims, case.output)[1] for x in (inputs, moved)
    )
    for place, other in zip(places, after, strict=True):
        torch.testing.assert_close(place.h.index_select(place.rows[0], order), other.h)


@pytest.mark.parametrize("place_rows, shape", [((0, 1), (2, 3, 4)), ((1, 0), (3, 2, 4)), ((0, 2), (2, 4, 3))])
def test_the_error_of_a_row_goes_to_the_same_row(place_rows, shape):
    e, h = torch.randn(2, 3, 5), torch.zeros(shape)
    found = delta(e, Place("", h, h, place_rows), feedback().matrix, 2)
    B = feedback().matrix(4, 5)
    for b in range(2):
        for t in range(3):
            at = [slice(None)] * 3
            at[place_rows[0]], at[place_rows[1]] = b, t
            torch.testing.assert_close(found[tuple(at)], B @ e[b, t])


def test_the_reference_equals_the_formulas_of_a_network_with_one_hidden_layer():
    net, x = wm.ProductMLP(), torch.randn(4, 6)
    h = torch.tanh(x @ net.first.W)
    e = (h @ net.last.W).cos()
    found, _ = reference_gradients(net, [x], loss, feedback().matrix, 1)
    expected = x.T @ ((e @ feedback().matrix(8, 3).T) * (1 - h * h)), h.T @ e
    torch.testing.assert_close(tuple(found), expected)


# ---- what flows past a tap ----


@pytest.mark.parametrize(
    "case, expected",
    [
        ("gpt", [True, True]),
        ("bert", [True, False, True, False]),
        ("mlp_mixer", [False, True]),
        ("resnet", [False] * 5),
        ("nerf", [False] * 4),
        ("squared_relu", [False, False]),
        ("formula, swish", [False, False]),
        ("sequence_first", [False, False]),
    ],
)
def test_bypassed_taps(case, expected):
    case = CASES[case]
    model = dfa.DFA(case.make(), feedback(), **case.options)
    model(*[make() for make in case.inputs])
    assert [tap.bypassed for tap in model.taps] == expected
    around = ", ".join(tap.name for tap in model.taps if tap.bypassed)
    said = f"reached by a chain past their tap, too: what is taught at {around}"
    assert (said in model.plan().lines) == any(expected)


def test_embeddings_that_go_around_the_deep_part_bypass_its_first_tap():
    model = dfa.DFA(wm.DeepFM(), feedback())
    model(torch.randint(20, (5, 4)))
    assert model.taps[0].bypassed


# ---- batch_dims and output ----


def test_an_image_as_output_is_taken_as_a_sequence():
    """[b, H, W] is read as [b, T, E], and in the second tap the rows of pixels were pooled."""
    with pytest.raises(ValueError, match="batch_dims"):
        dfa.DFA(wm.Segmentation(), feedback())(torch.randn(3, 3, 6, 6))


def test_a_tap_in_which_the_positions_are_mixed():
    with pytest.raises(ValueError, match="batch_dims"):
        dfa.DFA(wm.MLPMixer(dense=True), feedback())(torch.randn(3, 5, 6))


def test_a_tap_whose_positions_were_pooled():
    class Pooled(wm.ConvTagger):
        def forward(self, ids):
            h = F.relu(F.max_pool1d(self.conv1(self.tokens(ids).transpose(1, 2)), 2))
            return self.last(F.interpolate(h, scale_factor=2).transpose(1, 2))

    with pytest.raises(ValueError, match="batch_dims"):
        dfa.DFA(Pooled(7), feedback())(torch.randint(11, (3, 4)))


@pytest.mark.parametrize("batch_dims", [0, -1, 3])
def test_batch_dims_that_the_output_does_not_have(batch_dims):
    with pytest.raises(ValueError, match=rf"(?s)batch_dims.*{batch_dims}"):
        dfa.DFA(wm.ProductMLP(), feedback(), batch_dims=batch_dims)(torch.randn(4, 6))


def test_the_wrapped_model_returns_what_output_picks():
    net, x = wm.MultiHead(), torch.randn(4, 6)
    model = dfa.DFA(net, feedback(), output=lambda y: y["place"])
    y = model(x)
    assert torch.equal(y, net(x)["place"])
    with torch.no_grad():
        assert torch.equal(model(x), y)
    with model.backprop():
        assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "pack, pick",
    [
        (lambda y: (y, None), lambda r: r[0]),
        (lambda y: [y], lambda r: r[0]),
        (lambda y: {"logits": y}, lambda r: r["logits"]),
        (lambda y: types.SimpleNamespace(logits=y, loss=None), lambda r: r.logits),
    ],
    ids=["tuple", "list", "dict", "object"],
)
def test_outputs_that_are_not_one_tensor(pack, pick):
    class Packed(wm.ProductMLP):
        def forward(self, x, tap=wm.untapped):
            return pack(super().forward(x, tap))

    net, x = Packed(), torch.randn(4, 6)
    with pytest.raises(TypeError, match="output="):
        dfa.DFA(net, feedback())(x)
    model = dfa.DFA(net, feedback(), output=pick)
    expected, _ = reference_gradients(net, [x], loss, model.feedback.matrix, 1, pick)
    loss(model(x)).backward()
    assert_gradients(net, expected)


def test_output_that_picks_no_tensor():
    with pytest.raises(TypeError, match=r"(?s)output.*dict"):
        dfa.DFA(wm.MultiHead(), feedback(), output=lambda y: y)(torch.randn(4, 6))


# ---- side losses ----


def kl(net: wm.VAE) -> Tensor:
    return 0.5 * (net.mu**2 + net.logvar.exp() - 1 - net.logvar).sum(1).mean()


def kl_of(moments: Tensor) -> Tensor:
    mu, logvar = moments.chunk(2, -1)
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean()


@pytest.mark.parametrize("side", ["plain", "side_loss"])
def test_vae(side):
    """The KL term teaches the layer of mu and logvar, and not the encoder behind its tap."""
    net, inputs = wm.VAE(), [torch.randn(5, 9), torch.randn(5, 2)]
    model = dfa.DFA(net, feedback())
    expected, _ = reference_gradients(net, inputs, loss, model.feedback.matrix, 1, side=kl)
    y = model(*inputs)
    term = kl(net) if side == "plain" else dfa.side_loss(torch.cat([net.mu, net.logvar], 1), kl_of)
    torch.testing.assert_close(term, kl(net))
    (loss(y) + term).backward()
    assert_gradients(net, expected)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("taps", BOTH)
def test_sparse_autoencoder(taps, inplace, inside):
    """The penalty teaches the layer that made the code, though its tap is where the code is, and none before."""
    net, x = wm.SparseAutoencoder(inside, inplace), torch.randn(5, 9)
    model = dfa.DFA(net, feedback(), taps=taps)
    expected, _ = reference_gradients(net, [x], loss, model.feedback.matrix, 1, side=lambda net: wm.l1(net.h))
    without, _ = reference_gradients(net, [x], loss, model.feedback.matrix, 1)
    names = [name for name, _ in net.named_parameters()]
    changed = {n for n, a, b in zip(names, expected, without, strict=True) if not torch.equal(a, b)}
    assert changed == {"encode.weight", "encode.bias"}
    y = model(x)
    term = net.penalty if inside else dfa.side_loss(net.h, wm.l1)
    torch.testing.assert_close(term, wm.l1(net.h))
    (loss(y) + term).backward()
    assert_gradients(net, expected)


def test_a_side_loss_alone_scaled_and_after_another_pass():
    net, x = wm.SparseAutoencoder(), torch.randn(5, 9)
    model = dfa.DFA(net, feedback())
    model(x)
    code = net.h
    model(torch.randn(5, 9))
    (3 * dfa.side_loss(code, wm.l1)).backward()
    penalty = 3 * wm.l1(F.relu(net.encode(torch.tanh(net.first(x)))))
    wanted = torch.autograd.grad(penalty, [net.encode.weight, net.encode.bias])
    torch.testing.assert_close((net.encode.weight.grad, net.encode.bias.grad), wanted)
    for p in (net.first.weight, net.first.bias, net.decode.weight, net.decode.bias):
        assert p.grad is None or not p.grad.any()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_side_loss_without_taps_is_the_loss(wrapped):
    """In a network that is not wrapped, and under backprop(), its gradient goes all the way."""
    net, x = wm.SparseAutoencoder(), torch.randn(5, 9)
    model = dfa.DFA(net, feedback())
    model(x)
    with model.backprop():
        y = model(x) if wrapped else net(x)
        (loss(y) + dfa.side_loss(net.h, wm.l1)).backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    (loss(net(x)) + wm.l1(net.h)).backward()
    for a, b in zip(found, grads(net), strict=True):
        torch.testing.assert_close(a, b)


# ---- names of layers whose weight is computed ----

REWEIGHTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("taps", BOTH)
@pytest.mark.parametrize("change", REWEIGHTED)
def test_layers_whose_weight_is_computed(change, taps):
    net, x = wm.FormulaMLP("silu").eval(), torch.randn(4, 6)
    for layer in (net.first, net.second, net.last):
        REWEIGHTED[change](layer)
    model = dfa.DFA(net, feedback(), taps=taps)
    expected, _ = reference_gradients(net, [x], loss, model.feedback.matrix, 1)
    loss(model(x)).backward()
    assert_gradients(net, expected)
    assert [tap.name for tap in model.taps] == ["first", "second"]


# ---- messages ----


class HiddenProduct(torch.autograd.Function):
    """What no torch function shows: a product inside a custom autograd function."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        # Not by a function that is known as a product.
        return torch.ops.aten.mm(x, W)

    @staticmethod
    def backward(ctx, gradient):
        x, W = ctx.saved_tensors
        return gradient @ W.T, x.T @ gradient


class Hiding(wm.FormulaMLP):
    """``hidden`` is a layer between two taps that has none of its own: what is seen before its tanh is no layer."""

    def __init__(self, mark=False):
        super().__init__()
        self.hidden = wm.Matrix(8, 8)
        self.mark1, self.mark2, self.mark3 = (dfa.Tap() if mark else nn.Identity() for _ in range(3))

    def forward(self, x, tap=wm.untapped):
        h = tap(self.mark1(torch.tanh(self.first(x))), "mark1")
        h = tap(self.mark2(torch.tanh(HiddenProduct.apply(h, self.hidden.W))), "mark2")
        h = tap(self.mark3(torch.tanh(self.second(h))), "mark3")
        return self.last(h)


def test_a_parameter_that_no_tap_covers_is_named_once():
    model = dfa.DFA(Hiding(), feedback())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loss(model(torch.randn(4, 6))).backward()
    words = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "hidden.W" in str(w.message)]
    assert len(words) == 1
    assert "dfa_kernels.Tap()" in words[0]


class OwnActivation(torch.autograd.Function):
    """An activation that no observer sees."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.sin()

    @staticmethod
    def backward(ctx, gradient):
        (h,) = ctx.saved_tensors
        return gradient * h.cos()


@pytest.mark.parametrize(
    "unknown, name",
    [(OwnActivation.apply, "hidden"), (lambda h: h.softmax(-1), "softmax"), (lambda h: h.clamp(-2, 2), "clamp"),
     (lambda h: torch.maximum(h, torch.zeros(())), "maximum")],
)  # fmt: skip
def test_a_layer_before_an_activation_that_is_not_known_is_named_once(unknown, name):
    class Net(wm.FormulaMLP):
        def forward(self, x, tap=wm.untapped):
            h = tap(torch.tanh(self.second(unknown(self.first(x)))), "second")
            return self.last(h)

    net, x = Net(), torch.randn(4, 6)
    model = dfa.DFA(net, feedback())
    expected, _ = reference_gradients(net, [x], loss, model.feedback.matrix, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(model(x)).backward()
        model(torch.randn(3, 6))
    assert_gradients(net, expected)
    words = [str(w.message) for w in caught if "dfa_kernels.Tap()" in str(w.message)]
    assert len(words) == 1
    assert "'first'" in words[0]
    assert name in words[0]
    assert "'second'" not in words[0]


class Gates(nn.Module):
    """Layers that gates and what is beside them are made of: [b, 6] -> [b, 3]."""

    def __init__(self, body, training=True):
        super().__init__()
        self.body = body
        self.first, self.up, self.middle = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 8)
        self.both, self.gate, self.last = nn.Linear(16, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x, tap=wm.untapped):
        return self.body(self, x, tap)


def gate_at_the_output(net, x, tap):
    h = tap(torch.tanh(net.first(x)), "first")
    return tap(torch.sigmoid(net.gate(h)), "gate") * net.last(h)


def looked_at_without_gradients(net, x, tap):
    a = net.first(x)
    h = tap(F.relu(a), "first")
    with torch.no_grad():
        (h - a).abs().mean()
    return net.last(tap(torch.tanh(net.middle(h)), "middle"))


def another_path_after_the_gate(net, x, tap):
    gate = torch.sigmoid(net.first(x))
    h = tap(gate * net.up(x), "first")
    return net.last(tap(torch.tanh(net.both(torch.cat([h, 1 - gate], 1))), "both"))


def another_path_before_the_gate(net, x, tap):
    gate = torch.sigmoid(net.first(x))
    twice = gate * 2
    h = tap(gate * net.up(x), "first")
    return net.last(tap(torch.tanh(net.middle(twice) + h), "middle"))


def an_activation_on_the_other_path(net, x, tap):
    gate = torch.sigmoid(net.first(x))
    h = tap(gate * net.up(x), "first")
    other = tap(torch.tanh(1 - gate), "first#2")
    return net.last(tap(torch.tanh(net.both(torch.cat([h, other], 1))), "both"))


@pytest.mark.parametrize(
    "body",
    [gate_at_the_output, looked_at_without_gradients, another_path_after_the_gate, another_path_before_the_gate,
     an_activation_on_the_other_path],
)  # fmt: skip
def test_what_goes_on_beside_a_gate(body):
    """The last layer's gradient is true, and a path around a tap that moved is whole: neither was."""
    net, x = Gates(body), torch.randn(5, 6)
    model = dfa.DFA(net, feedback())
    expected, places = reference_gradients(net, [x], loss, model.feedback.matrix, 1)
    loss(model(x)).backward()
    assert [tap.name for tap in model.taps] == [place.name for place in places]
    assert_gradients(net, expected)


def test_a_gate_draws_dropout_once():
    """Where a tap moved, the mask was drawn again, and the output was another network's."""

    def body(net, x, tap):
        h = F.dropout(torch.sigmoid(net.first(x)), 0.5, net.training)
        return net.last(h * net.up(x) + h)

    net, x = Gates(body), torch.randn(5, 6)
    model = dfa.DFA(net, feedback())
    model(x)
    torch.manual_seed(3)
    found = model(x)
    torch.manual_seed(3)
    assert torch.equal(found, net(x))


def test_a_complex_tap_is_refused_by_name():
    def body(net, x, tap):
        h = torch.view_as_complex(net.first(x).view(-1, 4, 2))
        return net.last(torch.view_as_real(torch.tanh(h)).flatten(1))

    with pytest.raises(TypeError, match=r"complex.*dfa_kernels\.Tap\(\)"):
        dfa.DFA(Gates(body), feedback())(torch.randn(5, 6))


def test_the_plan_names_layers_that_a_chain_teaches():
    model = dfa.DFA(wm.GPT(), feedback())
    model(torch.randint(11, (3, 4)))
    (line,) = [line for line in model.plan().lines if "by a chain through later layers" in line]
    # The last layer of the last block is behind the last tap, where gradients are true.
    names = ["blocks.0.qkv", "blocks.0.project", "blocks.0.reduce", "blocks.1.qkv", "blocks.1.project"]
    assert line.endswith(": " + ", ".join(names))


def test_a_mark_covers_it():
    net, x = Hiding(mark=True), torch.randn(4, 6)
    model = dfa.DFA(net, feedback())
    expected, _ = reference_gradients(net, [x], loss, model.feedback.matrix, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss(model(x)).backward()
    assert_no_words(caught)
    assert_gradients(net, expected)


def test_a_named_tap_at_a_recurrent_module():
    model = dfa.DFA(wm.GRUClassifier(), feedback(), taps=["first"])
    with pytest.raises(TypeError, match=r"(?s)'first'.*tuple.*dfa_kernels\.Tap\(\)"):
        model(torch.randn(3, 4, 6))


def test_logits_of_all_positions_in_one_list():
    class Flat(wm.GPT):
        def forward(self, ids):
            return super().forward(ids).view(-1, 11)

    with pytest.raises(ValueError, match=r"(?s)taps.*" + re.escape("[b, T, ") + "[EV]" + re.escape("]")):
        dfa.DFA(Flat(), feedback())(torch.randint(11, (3, 4)))
