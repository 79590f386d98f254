"""A wrapped network behaves like a network: passes, modes, compilers, copies, states."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import assert_close_to_oracle, cut_gradients
from torch import nn

import dfa_kernels as dfa


def mlp(seed=0, norm=False):
    torch.manual_seed(seed)
    norms = [nn.BatchNorm1d(7)] if norm else []
    return nn.Sequential(nn.Linear(5, 7), *norms, nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5 * 2 * 2, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


def pooled():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.LeakyReLU(0.3),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def batch(n=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def images(n=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 10, 10, generator=generator), torch.randint(3, (n,), generator=generator)


def grads(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def grads_of(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return grads(model)


def autocast_grads(model, x, y, inside=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.dtype == torch.bfloat16
        loss = F.cross_entropy(output.float(), y)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return grads(model)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def assert_near(first, second):
    """Equal up to the order of summation."""
    for a, b in zip(first, second, strict=True):
        assert_close_to_oracle(a, b.double(), b, 0.0)


class TestPasses:
    def test_several_forward_passes_before_their_backward_passes(self):
        model = dfa.DFA(mlp(norm=True).eval())
        batches = [batch(8, 1), batch(3, 2), batch(8, 3)]
        alone = [grads_of(model, x, y) for x, y in batches]
        losses = [F.cross_entropy(model(x), y) for x, y in batches]
        for i in (1, 2, 0):
            model.zero_grad()
            losses[i].backward()
            assert_same(grads(model), alone[i])

    def test_one_backward_pass_of_several_forward_passes(self):
        model = dfa.DFA(mlp())
        batches = [batch(8, 1), batch(3, 2)]
        alone = [grads_of(model, x, y) for x, y in batches]
        model.zero_grad()
        sum(F.cross_entropy(model(x), y) for x, y in batches).backward()
        assert_near(grads(model), [a + b for a, b in zip(*alone, strict=True)])

    @pytest.mark.parametrize("make, data", [(mlp, batch), (cnn, images)])
    def test_retain_graph(self, make, data):
        x, y = data()
        model = dfa.DFA(make())
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        once = grads(model)
        loss.backward()
        assert_same(grads(model), [2 * g for g in once])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_gradient_accumulation(self):
        model = dfa.DFA(mlp())
        (x, y), (u, v) = batch(8, 1), batch(8, 2)
        first, second = grads_of(model, x, y), grads_of(model, u, v)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(u), v).backward()
        assert_same(grads(model), [a + b for a, b in zip(first, second, strict=True)])

    @pytest.mark.parametrize("make, data", [(mlp, batch), (cnn, images)])
    @pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
    def test_other_batch_sizes_after_the_first(self, make, data, taps):
        model = dfa.DFA(make().eval(), taps=taps)
        grads_of(model, *data(8))
        for n in (5, 1, 8):
            fresh = dfa.DFA(make().eval(), taps=taps)
            assert_same(grads_of(model, *data(n)), grads_of(fresh, *data(n)))

    @pytest.mark.parametrize("make, data", [(mlp, batch), (cnn, images)])
    @pytest.mark.parametrize("first", [True, False])
    def test_empty_batch_gives_zeros(self, make, data, first):
        model = dfa.DFA(make().eval())
        if not first:
            grads_of(model, *data(8))
            model.zero_grad()
        output = model(data(8)[0][:0])
        assert output.shape == (0, 3)
        output.sum().backward()
        for p in model.parameters():
            assert torch.equal(p.grad, torch.zeros_like(p))

    def test_autograd_grad_of_a_subset(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        expected = grads_of(model, x, y)
        model.zero_grad()
        parameters = list(model.parameters())
        chosen = [4, 1, 2]
        found = torch.autograd.grad(F.cross_entropy(model(x), y), [parameters[i] for i in chosen])
        assert_same(found, [expected[i] for i in chosen])
        assert all(p.grad is None for p in parameters)

    def test_double_backward_raises(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        with pytest.raises(RuntimeError, match=r"create_graph: got True.*backprop\(\)"):
            torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True)

    def test_two_models_in_one_graph(self):
        """One network's output is the other's input: each learns from the error at its own output."""
        torch.manual_seed(3)
        first = dfa.DFA(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)))
        second = dfa.DFA(mlp())
        x, y = batch()
        middle = first(x)
        F.cross_entropy(second(middle), y).backward()
        found = [*grads(first), *grads(second)]
        first.zero_grad()
        second.zero_grad()
        leaf = middle.detach().requires_grad_()
        F.cross_entropy(second(leaf), y).backward()
        first(x).backward(leaf.grad)
        assert_same(found, [*grads(first), *grads(second)])

    def test_output_equals_the_plain_network(self):
        for make, data in ((mlp, batch), (cnn, images)):
            x, _ = data()
            assert torch.equal(dfa.DFA(make())(x), make()(x))

    def test_keyword_arguments(self):
        class Keywords(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp()

            def forward(self, *, x, scale=1.0):
                return self.net(x * scale)

        x, y = batch()
        model = dfa.DFA(Keywords())
        F.cross_entropy(model(x=x, scale=2.0), y).backward()
        assert_same(grads(model), grads_of(dfa.DFA(mlp()), 2 * x, y))


class TestModes:
    def test_no_grad_and_eval_and_inference_mode(self):
        x, _ = batch()
        model, plain = dfa.DFA(mlp(norm=True)), mlp(norm=True)
        grads_of(model, *batch())
        grads_of(plain, *batch())
        for module in (model, plain):
            module.eval()
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
            assert not model(x).requires_grad
        with torch.inference_mode():
            assert torch.equal(model(x), plain(x))
            assert model(x).is_inference()
        assert torch.equal(model(x), plain(x))
        assert model(x).requires_grad

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_first_pass_without_gradients(self, context):
        x, y = batch()
        model = dfa.DFA(mlp())
        with context():
            output = model(x)
        assert torch.equal(output, mlp()(x))
        assert not output.requires_grad
        assert_same(grads_of(model, x, y), grads_of(dfa.DFA(mlp()), x, y))

    def test_taps_before_and_after_the_first_pass(self):
        model = dfa.DFA(mlp())
        with pytest.raises(RuntimeError, match="first forward pass"):
            _ = model.taps
        with pytest.raises(RuntimeError, match="first forward pass"):
            model.feedback_matrix("0")
        with torch.no_grad():
            model(batch()[0])
        assert model.taps == [dfa.TapInfo("0", (7,), 7), dfa.TapInfo("2", (6,), 6)]

    def test_taps_of_a_convolutional_network(self):
        model = dfa.DFA(cnn())
        model(images()[0])
        expected = [("0", (4, 8, 8), 256), ("4", (5, 2, 2), 20), ("7", (6,), 6)]
        assert [(t.name, t.shape, t.size) for t in model.taps] == expected
        model = dfa.DFA(cnn(), taps="layer_input")
        model(images()[0])
        expected = [("0", (4, 4, 4), 64), ("4", (20,), 20), ("7", (6,), 6)]
        assert [(t.name, t.shape, t.size) for t in model.taps] == expected

    def test_feedback_matrix(self):
        feedback = dfa.Feedback("rademacher", seed=4)
        model = dfa.DFA(mlp(), feedback)
        model(batch()[0])
        assert torch.equal(model.feedback_matrix("2"), feedback.matrix(6, 3))
        assert torch.equal(model.feedback_matrix("0"), feedback.matrix(7, 3))
        assert model.feedback_matrix("0").abs().unique().numel() == 1

    def test_meta_device(self):
        model = dfa.DFA(cnn().to("meta"))
        model(images()[0].to("meta"))
        assert [t.size for t in model.taps] == [256, 20, 6]
        model = dfa.DFA(cnn().to("meta"))
        with torch.no_grad():
            model(images()[0].to("meta"))
        assert [t.size for t in model.taps] == [256, 20, 6]

    @pytest.mark.parametrize("replaces", [False, True])
    def test_the_first_pass_leaves_no_trace(self, replaces):
        """Of the pass that counts the layers: running statistics, random numbers, and buffers that are replaced."""

        class Counting(nn.Module):
            """Not a Sequential, so that its layers have to be counted."""

            def __init__(self):
                super().__init__()
                self.net = cnn()
                self.drop = nn.Dropout(0.5)
                self.register_buffer("calls", torch.zeros(1))

            def forward(self, x):
                self.calls = self.calls + 1 if replaces else self.calls.add_(1)
                return self.drop(self.net(x))

        x, _ = images()
        net, plain = Counting(), Counting()
        torch.manual_seed(9)
        expected = plain(x)
        state = torch.get_rng_state()
        torch.manual_seed(9)
        output = dfa.DFA(net)(x)
        assert torch.equal(output, expected)
        assert torch.equal(torch.get_rng_state(), state)
        for (name, a), (_, b) in zip(net.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(a, b), name

    def test_eval_then_train(self):
        x, y = batch()
        model, fresh = dfa.DFA(mlp(norm=True)), dfa.DFA(mlp(norm=True))
        model.eval()
        model(x)
        model.train()
        assert_same(grads_of(model, x, y), grads_of(fresh, x, y))


class TestBackprop:
    @pytest.mark.parametrize("make, data", [(mlp, batch), (cnn, images)])
    def test_equals_plain_autograd(self, make, data):
        x, y = data()
        model, plain = dfa.DFA(make()), make()
        with model.backprop():
            found = grads_of(model, x, y)
        assert_same(found, grads_of(plain, x, y))

    def test_differs_from_feedback_alignment(self):
        x, y = batch()
        model = dfa.DFA(mlp(), backend="torch")
        aligned = grads_of(model, x, y)
        with model.backprop():
            exact = grads_of(model, x, y)
        assert_same(aligned[4:], exact[4:])
        assert not torch.allclose(aligned[0], exact[0])

    def test_nested_and_after_an_exception(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        aligned = grads_of(model, x, y)
        with model.backprop():
            with model.backprop():
                pass
            exact = grads_of(model, x, y)
        assert_same(exact, grads_of(mlp(), x, y))
        assert_same(grads_of(model, x, y), aligned)
        with pytest.raises(KeyError), model.backprop():
            raise KeyError
        assert_same(grads_of(model, x, y), aligned)

    def test_forward_inside_and_backward_outside(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        with model.backprop():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert_same(grads(model), grads_of(mlp(), x, y))

    def test_first_pass_under_backprop(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        with model.backprop():
            model(x)
        assert_same(grads_of(model, x, y), grads_of(dfa.DFA(mlp()), x, y))

    @pytest.mark.parametrize("taps", [["1"], "layer_input"])
    def test_with_other_taps(self, taps):
        x, y = batch()
        model = dfa.DFA(mlp(), taps=taps)
        with model.backprop():
            found = grads_of(model, x, y)
        assert_same(found, grads_of(mlp(), x, y))


class TestPrecision:
    @pytest.mark.parametrize(
        "make, data, taps, cuts",
        [
            (mlp, batch, "nonlinearity", ["1", "3"]),
            (mlp, batch, "layer_input", ["2", "4"]),
            (cnn, images, "nonlinearity", ["2", "5", "8"]),
            (cnn, images, "layer_input", ["4", "7", "9"]),
        ],
    )
    def test_autocast(self, make, data, taps, cuts):
        """Parameters and gradients in float32, as exact as the formula is under autocast."""
        x, y = data()
        found = autocast_grads(dfa.DFA(make(), taps=taps), x, y)
        U = dfa.Feedback(normalize=False).matrix(256, 3)
        at_input = taps == "layer_input"
        ref, scales = cut_gradients(
            make().double(), cuts, x.double(), lambda out: F.cross_entropy(out, y), U, at_input=at_input
        )
        with torch.autocast("cpu", torch.bfloat16):
            same, _ = cut_gradients(make(), cuts, x, lambda out: F.cross_entropy(out.float(), y), U, at_input=at_input)
        # The terms of each sum are bfloat16, though the sum is not.
        coarse = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
        for g, r, s, scale in zip(found, ref, same, scales, strict=True):
            assert g.dtype == torch.float32
            assert_close_to_oracle(g, r, s, scale * coarse)

    def test_backward_inside_autocast(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        assert_same(autocast_grads(model, x, y, inside=True), autocast_grads(model, x, y))

    def test_grad_scaler(self):
        """Scaling by a power of two and back changes no bit."""
        x, y = batch()
        models = [dfa.DFA(mlp()), dfa.DFA(mlp())]
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in models]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale(F.cross_entropy(models[0](x), y)).backward()
            scaler.step(optimizers[0])
            scaler.update()
            F.cross_entropy(models[1](x), y).backward()
            optimizers[1].step()
        assert_same(models[0].parameters(), models[1].parameters())

    def test_grad_scaler_skips_a_step_that_overflows(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        before = [p.clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_same(model.parameters(), before)
        assert scaler.get_scale() == 512.0


def compiled_grads(compiled, model, x, y):
    model.zero_grad()
    F.cross_entropy(compiled(x), y).backward()
    return grads(model)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
    @pytest.mark.parametrize("eager_first", [False, True])
    @pytest.mark.parametrize("make, data", [(mlp, batch), (cnn, images)])
    def test_whole_graph(self, make, data, eager_first, taps):
        x, y = data()
        expected = grads_of(dfa.DFA(make(), taps=taps), x, y)
        model = dfa.DFA(make(), taps=taps)
        if eager_first:
            with torch.no_grad():
                model.eval()
                model(x)
                model.train()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_near(compiled_grads(compiled, model, x, y), expected)
        assert_near(compiled_grads(compiled, model, x, y), expected)
        assert [t.size for t in model.taps] == [t.size for t in self.taps_of(make, data, taps)]

    @staticmethod
    def taps_of(make, data, taps):
        model = dfa.DFA(make(), taps=taps)
        model(data()[0])
        return model.taps

    def test_other_batch_size(self):
        model = dfa.DFA(mlp())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for n in (8, 5, 1):
            assert_near(compiled_grads(compiled, model, *batch(n)), grads_of(dfa.DFA(mlp()), *batch(n)))

    @pytest.mark.parametrize("make, data", [(mlp, batch), (cnn, images)])
    @pytest.mark.parametrize("inside", [False, True])
    def test_autocast(self, make, data, inside):
        """The compiled backward pass computes what the eager one does, inside autocast and after it."""
        model = dfa.DFA(make())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = autocast_grads(dfa.DFA(make()), *data(), inside)
        assert_near(autocast_grads(compiled, *data(), inside), expected)

    def test_meta_device(self):
        model = dfa.DFA(mlp().to("meta"))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(batch()[0].to("meta")).sum().backward()
        assert [p.grad.shape for p in model.parameters()] == [p.shape for p in model.parameters()]

    @pytest.mark.parametrize("dynamic, taps", [(None, "layer_input"), (True, "nonlinearity")])
    def test_numbers_that_vary(self, dynamic, taps):
        """Batch and image sizes, and with dynamic=True each number that a module holds."""
        model, eager = dfa.DFA(pooled(), taps=taps), dfa.DFA(pooled(), taps=taps)
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n, height, width in ((8, 10, 10), (5, 12, 11)):
            x, y = torch.randn(n, 3, height, width), torch.arange(n) % 3
            assert_near(compiled_grads(compiled, model, x, y), grads_of(eager, x, y))

    def test_mode_changes(self):
        """Entering backprop() or no_grad() after compiling takes effect."""
        x, y = batch()
        model = dfa.DFA(mlp())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        aligned = compiled_grads(compiled, model, x, y)
        with model.backprop():
            assert_near(compiled_grads(compiled, model, x, y), grads_of(mlp(), x, y))
        with torch.no_grad():
            assert torch.equal(compiled(x), mlp()(x))
        assert_near(compiled_grads(compiled, model, x, y), aligned)

    def test_inductor(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        compiled = torch.compile(model, fullgraph=True)
        assert_near(compiled_grads(compiled, model, x, y), grads_of(dfa.DFA(mlp()), x, y))


class Skips(nn.Module):
    """Stochastic depth: the middle layer is left out at times."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.skip = False

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(h if self.skip else torch.relu(self.middle(h)))


class TestTaps:
    def test_names_equal_the_automatic_mode(self):
        x, y = batch()
        automatic, named = dfa.DFA(mlp()), dfa.DFA(mlp(), taps=["1", "3"])
        assert_same(grads_of(named, x, y), grads_of(automatic, x, y))
        assert [(t.name, t.size) for t in named.taps] == [("1", 7), ("3", 6)]

    def test_marks_equal_the_automatic_mode(self):
        x, y = batch()
        plain = mlp()
        marked = nn.Sequential(*plain[:2], dfa.Tap(), *plain[2:4], dfa.Tap(), plain[4])
        model = dfa.DFA(marked)
        found = grads_of(model, x, y)
        assert_same(found, grads_of(dfa.DFA(mlp()), x, y))
        assert [(t.name, t.size) for t in model.taps] == [("2", 7), ("5", 6)]

    def test_names_equal_the_layer_input_mode(self):
        x, y = images()
        automatic, named = dfa.DFA(cnn(), taps="layer_input"), dfa.DFA(cnn(), taps=["3", "6", "8"])
        assert_same(grads_of(named, x, y), grads_of(automatic, x, y))

    def test_one_tap_leaves_the_rest_to_backpropagation(self):
        """With the only tap after the first layer, the layers behind it get their true gradient."""
        x, y = batch()
        model = dfa.DFA(mlp(), taps=["1"])
        found, exact = grads_of(model, x, y), grads_of(mlp(), x, y)
        assert_near(found[2:], exact[2:])
        assert_same(found[:2], grads_of(dfa.DFA(mlp()), x, y)[:2])

    def test_marks_outside_a_wrapped_network_do_nothing(self):
        x, y = batch()
        plain = mlp()
        marked = nn.Sequential(*copy.deepcopy(plain)[:2], dfa.Tap(), *copy.deepcopy(plain)[2:])
        assert_same(grads_of(marked, x, y), grads_of(plain, x, y))

    def test_a_mark_used_in_two_places(self):
        x, y = batch()
        plain, mark = mlp(), dfa.Tap()
        marked = nn.Sequential(*plain[:2], mark, *plain[2:4], mark, plain[4])
        model = dfa.DFA(marked)
        assert_same(grads_of(model, x, y), grads_of(dfa.DFA(mlp()), x, y))
        assert len({t.name for t in model.taps}) == 2

    def test_one_network_wrapped_twice_with_other_taps(self):
        x, y = batch()
        net = mlp()
        first, second = dfa.DFA(net, taps=["1"]), dfa.DFA(net, taps=["3"])
        assert_same(grads_of(first, x, y), grads_of(dfa.DFA(mlp(), taps=["1"]), x, y))
        assert_same(grads_of(second, x, y), grads_of(dfa.DFA(mlp(), taps=["3"]), x, y))
        assert [t.name for t in first.taps] == ["1"]
        assert [t.name for t in second.taps] == ["3"]
        with first.backprop():
            assert_same(grads_of(first, x, y), grads_of(mlp(), x, y))

    def test_one_network_wrapped_twice_with_the_same_names(self):
        x, y = batch()
        net = mlp()
        for _ in range(2):
            model = dfa.DFA(net, taps=["1", "3"])
            assert_same(grads_of(model, x, y), grads_of(dfa.DFA(mlp()), x, y))
            assert [t.name for t in model.taps] == ["1", "3"]

    def test_varying_depth(self):
        x, y = batch()
        torch.manual_seed(5)
        net = Skips()
        model = dfa.DFA(net)
        grads_of(model, x, y)
        net.skip = True
        with pytest.raises(RuntimeError, match=r"2 weight layers ran.*expected 3.*layer_input"):
            model(x)

    def test_varying_depth_with_taps_at_the_layer_inputs(self):
        x, y = batch()
        torch.manual_seed(5)
        net = Skips()
        model = dfa.DFA(net, taps="layer_input")
        whole = grads_of(model, x, y)
        net.skip = True
        short = grads_of(model, x, y)
        assert short[2] is None and short[3] is None
        plain = nn.Sequential(net.first, nn.ReLU(), net.last)
        assert_same([short[i] for i in (0, 1, 4, 5)], grads_of(dfa.DFA(copy.deepcopy(plain), taps="layer_input"), x, y))
        net.skip = False
        assert_same(grads_of(model, x, y), whole)


class TestCopies:
    def copies(self, model):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]

    @pytest.mark.parametrize("before", [True, False])
    @pytest.mark.parametrize("taps", ["nonlinearity", "layer_input", ["1", "3"]])
    def test_copies_are_independent_and_equal(self, taps, before):
        x, y = batch()
        model = dfa.DFA(mlp(), dfa.Feedback(seed=8), taps=taps)
        if before:
            model(x)
        expected = grads_of(dfa.DFA(mlp(), dfa.Feedback(seed=8), taps=taps), x, y)
        for other in self.copies(model):
            assert_same(grads_of(other, x, y), expected)
            assert all(p.grad is None for p in model.parameters())
            assert all(a is not b for a, b in zip(model.parameters(), other.parameters(), strict=True))
            with torch.no_grad():
                next(other.parameters()).zero_()
        assert_same(grads_of(model, x, y), expected)

    def test_copy_of_a_given_matrix(self):
        x, y = batch()
        torch.manual_seed(6)
        model = dfa.DFA(mlp(), dfa.Feedback.from_matrix(torch.randn(9, 3)))
        expected = grads_of(model, x, y)
        for other in self.copies(model):
            assert_same(grads_of(other, x, y), expected)


class TestState:
    def test_keys_of_the_network_load_into_the_plain_one(self):
        model = dfa.DFA(mlp(seed=1, norm=True))
        state = model.state_dict()
        own = {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}
        plain = mlp(seed=2, norm=True)
        plain.load_state_dict(own)
        assert_same(plain.parameters(), model.parameters())
        plain.load_state_dict(model.net.state_dict())

    @pytest.mark.parametrize("kind", ["gaussian", "matrix", "unnormalised"])
    def test_round_trip_carries_the_feedback(self, kind):
        x, y = batch()
        torch.manual_seed(6)
        feedback = {
            "gaussian": lambda: dfa.Feedback("rademacher", "procedural", seed=8),
            "matrix": lambda: dfa.Feedback.from_matrix(torch.randn(9, 3)),
            "unnormalised": lambda: dfa.Feedback(seed=8, normalize=False, gain=0.3),
        }[kind]()
        model = dfa.DFA(mlp(seed=1), feedback)
        expected = grads_of(model, x, y)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = dfa.DFA(mlp(seed=2))
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert_same(grads_of(other, x, y), expected)

    def test_loading_keeps_the_feedback_on_its_device(self):
        """Where the feedback lives belongs to the machine, not to what is learnt."""
        source = dfa.DFA(mlp(seed=1), dfa.Feedback(seed=8))
        model = dfa.DFA(mlp(seed=2), dfa.Feedback(seed=9, device="cpu"))
        model.load_state_dict(source.state_dict())
        assert model.feedback.spec.seed == 8
        assert model.feedback.device == torch.device("cpu")

    @pytest.mark.parametrize("fused", [False, True])
    def test_resumed_training_continues_bit_for_bit(self, fused):
        def start(seed):
            model = dfa.DFA(mlp(seed, norm=True), dfa.Feedback(seed=seed))
            if fused:
                return model, dfa.optim.SGD(model, 0.1, momentum=0.9)
            return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

        def train(model, optimizer, seeds):
            for seed in seeds:
                x, y = batch(8, seed)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

        model, optimizer = start(1)
        train(model, optimizer, range(3))
        buffer = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], buffer)
        train(model, optimizer, range(3, 6))
        resumed, resumed_optimizer = start(2)
        buffer.seek(0)
        for part, state in zip((resumed, resumed_optimizer), torch.load(buffer, weights_only=True), strict=True):
            part.load_state_dict(state)
        train(resumed, resumed_optimizer, range(3, 6))
        assert_same(resumed.parameters(), model.parameters())
        assert_same(resumed.buffers(), model.buffers())

    def test_to_another_dtype(self):
        x, y = batch()
        model = dfa.DFA(mlp())
        grads_of(model, x, y)
        model.zero_grad()
        model.double()
        assert_same(grads_of(model, x.double(), y), grads_of(dfa.DFA(mlp().double()), x.double(), y))


def test_distributed_data_parallel(tmp_path):
    x, y = batch()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        models = [dfa.DFA(mlp(norm=True)), dfa.DFA(mlp(norm=True))]
        parallel = nn.parallel.DistributedDataParallel(models[0])
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
        for _ in range(3):
            for module, optimizer in zip((parallel, models[1]), optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(module(x), y).backward()
                optimizer.step()
            assert_same(grads(models[0]), grads(models[1]))
        assert_same(models[0].parameters(), models[1].parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "storage"), [("gaussian", "dense"), ("sparse", "dense"), ("fastfood", "procedural")])
def test_a_whole_step_on_the_meta_device(kind, storage, fused):
    """Shapes and devices alone, as for planning memory."""
    with torch.device("meta"):
        convolution = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()]
        net = nn.Sequential(*convolution, nn.Linear(144, 20), nn.Tanh(), nn.Linear(20, 10))
        model = dfa.DFA(net, dfa.Feedback(kind, storage))
        x, y = torch.empty(5, 3, 8, 8), torch.empty(5, dtype=torch.long)
    optimizer = dfa.optim.SGD(model, lr=0.1) if fused else torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    if not fused:
        assert [p.grad.shape for p in model.parameters()] == [p.shape for p in model.parameters()]
    optimizer.step()
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("optimizer", [None, dfa.optim.SGD])
def test_an_output_changed_in_place(optimizer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    gradients = []
    for in_place in (True, False):
        model = dfa.DFA(copy.deepcopy(net))
        kept = optimizer and optimizer(model, lr=0.1)
        output = model(torch.ones(2, 4))
        output = output.mul_(2) if in_place else output * 2
        output.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        del kept
    torch.testing.assert_close(*gradients)
