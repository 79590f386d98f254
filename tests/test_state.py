"""State dicts of a wrapped network: tensors alone, whatever is done to them before they are loaded."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dfa_kernels as dfa

FEEDBACKS = {
    "seeded": lambda: dfa.Feedback("sparse", "procedural", seed=2**64 - 3, gain=0.1, nonzeros=2),
    "float16": lambda: dfa.Feedback("uniform", dtype=torch.float16, normalize=False, seed=8),
    "given": lambda: dfa.Feedback.from_matrix(given(9), gain=-1e-3),
    "given bfloat16": lambda: dfa.Feedback.from_matrix(given(8).bfloat16(), normalize=False),
    "given float64": lambda: dfa.Feedback.from_matrix(given(8).double()),
}
every_feedback = pytest.mark.parametrize("feedback", FEEDBACKS)


def given(rows):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(6))


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def model_with(feedback, seed=1):
    return dfa.DFA(mlp(seed), FEEDBACKS[feedback]())


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)


def gradients(model):
    model.zero_grad()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def assert_same_feedback(found, expected):
    """The same U to the last bit: within a dtype, the gradients of equal weights."""
    assert found.feedback.spec == expected.feedback.spec
    assert torch.equal(found.feedback.matrix(8, 3), expected.feedback.matrix(8, 3))
    other = copy.deepcopy(found)
    other.net.load_state_dict(expected.net.state_dict())
    assert_same(gradients(other), gradients(copy.deepcopy(expected)))


def through_torch_save(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def average(state):
    """An exponential one of equal states, in float32: some bytes come out a little too small."""
    total = {key: value.float() for key, value in state.items()}
    for _ in range(9):
        total = {key: 0.9 * total[key] + 0.1 * value for key, value in state.items()}
    assert (total["_extra_state"] < state["_extra_state"]).any()
    return total


def over_another(state):
    """As a loader does that copies into the tensors of the model that asks."""
    other = dfa.DFA(mlp(seed=3), dfa.Feedback.from_matrix(given(9))).state_dict()
    for key in other:
        if key != "_extra_state" or other[key].shape == state[key].shape:
            other[key].copy_(state[key])
        else:
            other[key] = state[key]
    return other


@every_feedback
def test_every_value_is_a_tensor_of_its_own(feedback):
    """What safetensors asks for, and what a cast or an average of all values does."""
    model = model_with(feedback)
    state = model.state_dict()
    assert all(type(value) is torch.Tensor and value.is_contiguous() for value in state.values())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    extra = state["_extra_state"]
    assert (extra.dtype, extra.dim(), extra.device.type) == (torch.uint8, 1, "cpu")
    before = model.feedback.matrix(8, 3)
    extra.zero_()
    assert torch.equal(model.feedback.matrix(8, 3), before)


@pytest.mark.parametrize(
    "change",
    [
        through_torch_save,
        average,
        over_another,
        copy.deepcopy,
        lambda state: {key: value.half() for key, value in state.items()},
        lambda state: {key: value.bfloat16() for key, value in state.items()},
        lambda state: {key: value.double() for key, value in state.items()},
        lambda state: {key: value.long() for key, value in state.items()},
        # Where it starts in a file need not suit its dtype.
        lambda state: {**state, "_extra_state": torch.cat([torch.zeros(1).byte(), state["_extra_state"]])[1:]},
        lambda state: {**state, "_extra_state": state["_extra_state"].repeat_interleave(2)[::2]},
    ],
    ids=["saved", "average", "over", "copy", "half", "bfloat16", "double", "long", "unaligned", "strided"],
)
@every_feedback
def test_a_changed_state_carries_the_feedback(feedback, change):
    model = model_with(feedback)
    other = dfa.DFA(mlp(seed=2))
    other(batch()[0])
    assert other.load_state_dict(change(model.state_dict())) == ([], [])
    assert_same_feedback(other, model)


def test_seeded_states_have_one_length():
    """A loader that copies in place needs it."""
    longest = dict(seed=2**64 - 1, dtype=torch.bfloat16, normalize=False, gain=-1.2345678901234567e-30)
    feedbacks = [dfa.Feedback(), dfa.Feedback("rademacher", "procedural", **longest)]
    feedbacks.append(dfa.Feedback("sparse", "procedural", nonzeros=2**63, **longest))
    assert len({dfa.DFA(mlp(), feedback).state_dict()["_extra_state"].shape for feedback in feedbacks}) == 1


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True}])
@every_feedback
def test_averaged_model(feedback, options):
    model = model_with(feedback)
    averaged = AveragedModel(model, **options)
    for _ in range(3):
        averaged.update_parameters(model)
    other = AveragedModel(dfa.DFA(mlp(seed=2)), **options)
    other.load_state_dict({key: value.half() for key, value in averaged.state_dict().items()})
    assert_same_feedback(other.module, model)


def test_an_average_in_place_leaves_the_model_alone():
    """As of all tensors of a state dict; of uint8 it would truncate."""
    model = model_with("given")
    for mean, value in zip(model.state_dict().values(), model.state_dict().values(), strict=True):
        mean.copy_(0.999 * mean + 0.001 * value)
    assert_same_feedback(model, model_with("given"))


@pytest.mark.parametrize("prefix", ["module", "module.model"])
@every_feedback
def test_prefixes(feedback, prefix):
    """Inside another module, and from it: "module." is what DistributedDataParallel puts before every key."""
    model = model_with(feedback)
    other = dfa.DFA(mlp(seed=2))
    outer = other
    for name in reversed(prefix.split(".")):
        outer = nn.ModuleDict({name: outer})
    outer.load_state_dict({f"{prefix}.{key}": value for key, value in model.state_dict().items()})
    assert_same_feedback(other, model)
    state = outer.state_dict()
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state, f"{prefix}.")
    third = dfa.DFA(mlp(seed=3))
    third.load_state_dict(state)
    assert_same_feedback(third, model)


class TestWithoutFeedback:
    @every_feedback
    def test_a_plain_state_leaves_the_model_its_own(self, feedback):
        plain = mlp(seed=4)
        model = model_with(feedback)
        state = {f"net.{key}": value for key, value in plain.state_dict().items()}
        assert model.load_state_dict(state, strict=True) == ([], [])
        assert_same_feedback(model, dfa.DFA(plain, FEEDBACKS[feedback]()))
        assert_same(model.net.state_dict().values(), plain.state_dict().values())

    def test_inside_another_module(self):
        outer = nn.ModuleDict({"model": model_with("given")})
        state = {f"model.net.{key}": value for key, value in mlp(seed=4).state_dict().items()}
        assert outer.load_state_dict(state, strict=True) == ([], [])
        assert_same_feedback(outer["model"], dfa.DFA(mlp(seed=4), FEEDBACKS["given"]()))

    def test_weights_are_still_asked_for(self):
        state = model_with("seeded").state_dict()
        del state["_extra_state"], state["net.3.weight"]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\).*: "net\.3\.weight"\. $'):
            model_with("seeded").load_state_dict(state)


@every_feedback
def test_older_checkpoints_hold_a_dict(feedback):
    model = model_with(feedback)
    old = {**model.state_dict(), "_extra_state": {"feedback": model.feedback.state_dict()}}
    other = dfa.DFA(mlp(seed=2))
    assert other.load_state_dict(through_torch_save(old)) == ([], [])
    assert_same_feedback(other, model)


class TestDevices:
    def test_a_given_matrix_goes_to_where_that_of_the_model_is(self):
        """A checkpoint is read to the CPU; U would be there then, beside a copy where it is used."""
        model = dfa.DFA(mlp(), dfa.Feedback.from_matrix(torch.empty(9, 3, device="meta")))
        model.load_state_dict(model_with("given").state_dict())
        assert model.feedback.matrix(8, 3).device.type == "meta"
        assert model.feedback.device is None

    def test_a_default_device_is_not_that_of_the_state(self):
        model = model_with("seeded")
        with torch.device("meta"):
            state = model.state_dict()["_extra_state"]
            model.set_extra_state(state)
        assert state.device.type == "cpu"
        assert_same_feedback(model, model_with("seeded"))


class TestDamaged:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda state: state[:0],
            lambda state: state[:100],
            lambda state: state[:-1],
            lambda state: torch.cat([state, state[:1]]),
            lambda state: torch.cat([state[:60], state[60:61] + 1, state[61:]]),
            lambda state: torch.cat([state[:-1], state[-1:] + 1]),
            lambda state: state * 2,
            lambda state: state.float() / 0.0,
            lambda state: state > 0,
            torch.zeros_like,
        ],
    )
    @pytest.mark.parametrize("feedback", ["seeded", "given"])
    def test_damaged_bytes(self, feedback, damage):
        model = dfa.DFA(mlp())
        state = damage(model_with(feedback).state_dict()["_extra_state"])
        with pytest.raises(ValueError, match=r"state: \d+ bytes.*checksum.*get_extra_state.*leave _extra_state out"):
            model.set_extra_state(state)
        assert_same_feedback(model, dfa.DFA(mlp()))

    def test_averages_of_different_feedback(self):
        """The mean of the digits 1 and 3 is a digit, too."""
        states = [dfa.DFA(mlp(), dfa.Feedback(seed=seed)).state_dict()["_extra_state"].float() for seed in (1, 3)]
        with pytest.raises(ValueError, match="checksum"):
            dfa.DFA(mlp()).set_extra_state(sum(states) / 2)

    @pytest.mark.parametrize("state", [None, b"bytes", {}, {"feedback": None}])
    def test_another_thing(self, state):
        with pytest.raises(TypeError, match=r"state: got .*expected the uint8 tensor of DFA\.get_extra_state\(\)"):
            dfa.DFA(mlp()).set_extra_state(state)


@pytest.mark.parametrize("fused", [False, True])
@every_feedback
def test_a_resumed_run_continues_bit_for_bit(feedback, fused):
    def start(model):
        make = dfa.optim.SGD if fused else torch.optim.SGD
        return model, make(model if fused else model.parameters(), lr=0.1, momentum=0.9)

    def train(model, optimizer, seeds):
        for seed in seeds:
            x, y = batch(seed)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    model, optimizer = start(model_with(feedback))
    train(model, optimizer, range(3))
    saved = through_torch_save([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(3, 6))
    resumed, resumed_optimizer = start(dfa.DFA(mlp(seed=2)))
    train(resumed, resumed_optimizer, range(1))
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    train(resumed, resumed_optimizer, range(3, 6))
    assert_same(resumed.state_dict().values(), model.state_dict().values())
