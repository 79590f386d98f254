"""Every misuse raises an error that says which argument, what was got and what is expected."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import nn

import dfa_kernels as dfa


def mlp(*sizes):
    sizes = sizes or (5, 7, 6, 3)
    net = nn.Sequential()
    for fan_in, fan_out in itertools.pairwise(sizes):
        net.extend([nn.Linear(fan_in, fan_out), nn.ReLU()])
    return net[:-1]


X = torch.ones(4, 5)


def raises(error, *words):
    """Expects an error whose message has all these words, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(word) for word in words))


class Body(nn.Module):
    """A network with a forward pass of one's own."""

    def __init__(self, forward, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers or [nn.Linear(5, 6), nn.Linear(6, 3)])
        self.body = forward

    def forward(self, x):
        return self.body(x, *self.layers)


class TestConstruction:
    @pytest.mark.parametrize("net", [None, "net", torch.relu, nn.Linear])
    def test_net_is_no_module(self, net):
        with raises(TypeError, "net", type(net).__name__, "Module"):
            dfa.DFA(net)

    def test_net_learns_by_dfa_already(self):
        with raises(TypeError, "net", "net itself", "once"):
            dfa.DFA(dfa.DFA(mlp()))
        with raises(TypeError, "net", "'1'", "once"):
            dfa.DFA(nn.Sequential(nn.Linear(5, 5), dfa.DFA(mlp())))

    @pytest.mark.parametrize("feedback", ["gaussian", torch.ones(7, 3), dfa.Feedback])
    def test_feedback_is_no_feedback(self, feedback):
        with raises(TypeError, "feedback", type(feedback).__name__, "Feedback"):
            dfa.DFA(mlp(), feedback)

    def test_unknown_backend(self):
        with raises(ValueError, "backend", "'tpu'", "auto", "torch"):
            dfa.DFA(mlp(), backend="tpu")

    def test_unknown_tap_policy(self):
        with raises(ValueError, "taps", "'outputs'", "nonlinearity", "layer_input"):
            dfa.DFA(mlp(), taps="outputs")

    def test_unknown_tap_name(self):
        with raises(ValueError, "taps", "'9'", "['0', '1', '2', '3', '4']"):
            dfa.DFA(mlp(), taps=["1", "9"])

    def test_name_of_the_network_itself(self):
        with raises(ValueError, "taps", "''", "['0'"):
            dfa.DFA(mlp(), taps=[""])

    def test_empty_list_of_taps(self):
        with raises(ValueError, "taps", "empty list", "at least one"):
            dfa.DFA(mlp(), taps=[])

    @pytest.mark.parametrize("taps", [[1], [nn.ReLU()], [None]])
    def test_taps_are_no_names(self, taps):
        with raises(TypeError, "taps", repr(taps[0]), "name"):
            dfa.DFA(mlp(), taps=taps)

    @pytest.mark.parametrize("taps", [None, 3])
    def test_taps_are_no_list(self, taps):
        with raises(TypeError, "taps", repr(taps), "nonlinearity"):
            dfa.DFA(mlp(), taps=taps)

    def test_a_rejected_list_leaves_no_hook(self):
        net = mlp()
        with pytest.raises(ValueError, match="not a submodule"):
            dfa.DFA(net, taps=["1", "9"])
        assert not net[1]._forward_hooks


class TestFeedbackArguments:
    def test_unknown_kind(self):
        with raises(ValueError, "kind", "'gaussian'", "'cauchy'"):
            dfa.Feedback("cauchy")

    def test_unknown_storage(self):
        with raises(ValueError, "storage", "'dense'", "'procedural'", "'disk'"):
            dfa.Feedback(storage="disk")

    def test_more_nonzeros_than_error_components(self):
        model = dfa.DFA(mlp(), dfa.Feedback("sparse", nonzeros=4))
        with raises(ValueError, "nonzeros", "3", "4"):
            model(X)

    def test_error_width_of_a_given_matrix(self):
        model = dfa.DFA(mlp(), dfa.Feedback.from_matrix(torch.ones(7, 4)))
        with raises(ValueError, "error", "4", "given matrix", "3"):
            model(X)

    def test_rows_of_a_given_matrix(self):
        model = dfa.DFA(mlp(), dfa.Feedback.from_matrix(torch.ones(6, 3)))
        with raises(ValueError, "size", "6", "given matrix", "7"):
            model(X)


class TestNetworks:
    @pytest.mark.parametrize("taps", ["nonlinearity", "layer_input"])
    @pytest.mark.parametrize("net, seen", [(nn.Linear(5, 3), "1"), (nn.Flatten(), "0"), (nn.ReLU(), "0")])
    def test_no_layer_before_the_last(self, net, seen, taps):
        model = dfa.DFA(nn.Sequential(net, nn.Softmax(1)), taps=taps)
        with raises(ValueError, "net", seen, "weight layer"):
            model(X)

    def test_one_sample_without_a_batch(self):
        with raises(ValueError, "one sample", "x[None]"):
            dfa.DFA(mlp())(X[0])

    def test_no_activation(self):
        model = dfa.DFA(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)))
        with raises(ValueError, "net", "no activation", "layer_input", "Tap()"):
            model(X)

    def test_activation_after_the_last_layer_only(self):
        """It belongs to the output, so it is no place for a tap."""
        model = dfa.DFA(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.Tanh()))
        with raises(ValueError, "net", "no activation", "layer_input"):
            model(X)

    def test_named_tap_that_the_pass_does_not_reach(self):
        """A network that learns by plain backpropagation is not what was asked for."""
        net = Body(lambda x, a, b, unused: b(a(x).relu()), nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(3, 3))
        model = dfa.DFA(net, taps=["layers.2"])
        with raises(ValueError, "taps", "layers.2"):
            model(X)

    @pytest.mark.parametrize("result", ["tuple", "dict", "none"])
    @pytest.mark.parametrize("gradients", [True, False])
    def test_output_is_not_one_tensor(self, result, gradients):
        pack = {"tuple": lambda y: (y, y), "dict": lambda y: {"y": y}, "none": lambda y: None}[result]
        names = {"tuple": "tuple", "dict": "dict", "none": "NoneType"}
        model = dfa.DFA(Body(lambda x, a, b: pack(b(a(x).relu()))))
        with raises(TypeError, "net", "one tensor", names[result]), torch.set_grad_enabled(gradients):
            model(X)

    def test_scalar_output(self):
        model = dfa.DFA(Body(lambda x, a, b: b(a(x).relu()).sum()))
        with raises(ValueError, "net", "[b, E]", "scalar"):
            model(X)

    @pytest.mark.parametrize("gradients", [True, False])
    def test_input_on_another_device(self, gradients):
        model = dfa.DFA(mlp().to("meta"))
        with raises(ValueError, "x", "meta", "cpu"), torch.set_grad_enabled(gradients):
            model(X)

    def test_input_on_another_device_after_a_pass(self):
        model = dfa.DFA(mlp())
        model(X)
        for gradients in (True, False):
            with raises((ValueError, RuntimeError), "cpu", "meta"), torch.set_grad_enabled(gradients):
                model(X.to("meta"))

    def test_output_of_a_named_tap_is_not_one_tensor(self):
        net = nn.Sequential(nn.LSTM(5, 6), Body(lambda x, last: last(x[0]), nn.Linear(6, 3)))
        model = dfa.DFA(net, taps=["0"])
        with raises(TypeError, "taps", "'0'", "one tensor", "tuple"):
            model(X)


class TestRows:
    def test_a_tap_without_the_rows_of_the_output(self):
        """The output has 4·3 rows, the tap 4."""
        net = Body(lambda x, a, b: b(a(x).relu()).reshape(12, 1))
        model = dfa.DFA(net)
        with raises(ValueError, "taps", "[4, 6]", "rows", "[12]"):
            model(X)

    def test_a_later_pass_with_other_rows(self):
        net = Body(lambda x, a, b: b(a(x).relu()).flatten(0, -2))
        model = dfa.DFA(net)
        model(X)
        with raises(ValueError, "taps", "[4, 2, 6]", "[8]"):
            model(torch.ones(4, 2, 5))

    def test_a_later_pass_with_another_error_width(self):
        """`taps` and `feedback_matrix` speak of the newest pass."""
        net = Body(lambda x, a, b: b(a(x).relu())[:, : 3 if len(x) == 4 else 2])
        model = dfa.DFA(net)
        model(X).sum().backward()
        model(X[:2]).sum().backward()
        assert model.feedback_matrix("layers.0").shape == (6, 2)


class TestState:
    def test_unknown_name_for_the_feedback_matrix(self):
        model = dfa.DFA(mlp())
        model(X)
        with raises(ValueError, "name", "'4'", "['0', '2']"):
            model.feedback_matrix("4")

    @pytest.mark.parametrize("ask", [lambda m: m.taps, lambda m: m.feedback_matrix("0")])
    def test_before_the_first_pass(self, ask):
        with raises(RuntimeError, "taps", "first forward pass"):
            ask(dfa.DFA(mlp()))

    def test_state_of_another_thing(self):
        with pytest.raises((KeyError, RuntimeError, ValueError, TypeError)):
            dfa.DFA(mlp()).load_state_dict(mlp().state_dict())
