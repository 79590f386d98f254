"""bench.learn.train on digits: what it learns, writes and refuses; resuming, interruption, divergence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dfa_kernels as dfa
from bench.learn import data, networks, options, trainer
from bench.learn.networks import Style
from bench.learn.train import main, make_learners

SMALL = ["--widths", "32,24", "--batch", "64", "--device", "cpu", "--timed-steps", "0"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(out: Path, *argv: str, status: int = 0) -> dict[str, Any]:
    """What a run left in `out`."""
    assert main([*SMALL, *argv, "--out", str(out)]) == status
    return read(out)


def read(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "run.json").read_text())
    return result


def checkpoint(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return content


def assert_equal(a: Any, b: Any) -> None:
    """Equal to the last bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which a command line is refused."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def on_call(number: int, function: Callable[..., Any], effect: Callable[[], Any]) -> Callable[..., Any]:
    """`function`, with `effect` before its call of this number (from 1)."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            effect()
        return function(*args, **kwargs)

    return wrapped


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def test_default_network_learns_by_both_rules(tmp_path: Path) -> None:
    argv = ["--device", "cpu", "--epochs", "4", "--timed-steps", "3", "--out", str(tmp_path)]
    assert main(argv) == 0
    results = read(tmp_path)["results"]
    assert results["dfa"]["test_accuracy"]["final"] > 0.9
    assert results["bp"]["test_accuracy"]["final"] > 0.9
    assert results["dfa"]["alignment"]["fc2"]["mean"] > 0.25


def test_the_json_tells_what_was_run_and_measured(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--epochs", "2", "--timed-steps", "3", "--feedback", "rademacher", "--gain", "2", "--lr", "0.1"
    )
    told = result["options"]
    assert (told["widths"], told["batch"], told["seed"], told["gain"]) == ([32, 24], 64, 0, 2.0)
    assert (told["lr"], told["bp_lr"]) == (0.1, 0.2)
    assert not result["interrupted"]
    assert result["failure"] is None
    machine = result["environment"]
    assert machine["threads"] == 1
    assert machine["torch"] == torch.__version__
    assert machine["dfa_kernels"] == dfa.__version__
    # (32 + 24) rows of 10 floats; 32 of them; 32 rows of one word of sign bits.
    assert result["feedback_bytes"] == {"naive": 2240, "unified": 1280, "in_use": 128}
    timing = result["step_time"]
    assert timing["ratio"] == timing["dfa_step_seconds"] / timing["bp_step_seconds"]
    for rule in ("dfa", "bp"):
        check_summary(result["results"][rule], result["history"][rule])
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphed_steps_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Where there is no GPU the graphs' steps run eagerly; the last batch is a smaller one."""
    argv = ("--epochs", "2", "--dropout", "0.1", "--batch-norm", "--momentum", "0.5", "--precision", precision)
    expected = run(tmp_path / "eager", *argv)["history"]
    made: list[dfa.GraphedStep] = []
    capture = trainer.Learner.capture
    monkeypatch.setattr(options.Options, "is_graphed", lambda self: True)
    monkeypatch.setattr(trainer.Learner, "capture", lambda *given: made.append(capture(*given)) or made[-1])
    found = run(tmp_path / "graphed", *argv)
    assert len(made) == 2
    for rule, entries in expected.items():
        for entry, other in zip(entries, found["history"][rule], strict=True):
            assert other["train_loss"] == pytest.approx(entry["train_loss"], rel=1e-2 if precision == "bf16" else 1e-4)
            assert other["train_accuracy"] == pytest.approx(entry["train_accuracy"], abs=0.01)
    assert found["samples_per_epoch"] == 1437


def test_graphs_can_be_turned_off() -> None:
    given, _ = options.parse(["--no-graph"])
    assert given == {"graph": False}
    assert not options.Options(device="cuda", graph=False).is_graphed()
    assert options.Options(device="cuda:1").is_graphed()
    assert not options.Options(device="cpu").is_graphed()


def check_summary(summary: dict[str, Any], history: list[dict[str, Any]]) -> None:
    assert [entry["epoch"] for entry in history] == [1, 2]
    for part in ("test_accuracy", "train_accuracy"):
        values = [entry[part] for entry in history]
        assert summary[part] == {"final": values[1], "best": max(values)}
    assert summary["alignment"] == history[1].get("alignment", {})


def test_the_numbers_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    result = run(tmp_path, "--epochs", "1", "--activation", "leaky:-0.5")
    digits = data.load("digits")
    net = networks.mlp((1, 8, 8), (32, 24), 10, Style("leaky:-0.5"))
    state = checkpoint(tmp_path)["learners"]["dfa"]["model"]
    net.load_state_dict({name.removeprefix("net."): v for name, v in state.items() if name.startswith("net.")})
    (entry,) = result["history"]["dfa"]
    right = int((net(digits.test_x).argmax(1) == digits.test_y).sum())
    assert entry["test_accuracy"] == right / 360
    model = dfa.DFA(net, dfa.Feedback(), taps="layer_input")
    measured = dfa.alignment(model, digits.test_x[:128], digits.test_y[:128], F.cross_entropy)
    for name, tap in measured.items():
        assert entry["alignment"][name] == pytest.approx({"mean": tap.mean, "std": tap.std}, abs=1e-6)


def test_both_rules_start_alike_and_one_alone_trains_the_same(tmp_path: Path) -> None:
    argv = ["--epochs", "1", "--dropout", "0.1", "--batch-norm"]
    both = run(tmp_path / "both", *argv)["history"]
    for rule in ("dfa", "bp"):
        assert run(tmp_path / rule, *argv, "--rule", rule)["history"] == {rule: both[rule]}


def test_learners_have_the_same_weights_and_batches() -> None:
    chosen = options.settle({"device": "cpu", "widths": (16,)})
    task = trainer.Task(data.load("digits"), "cpu")
    first, second = make_learners(chosen, task)
    assert_equal(first.plain_network().state_dict(), second.plain_network().state_dict())
    assert_equal(task.batches(chosen, first.order), task.batches(chosen, second.order))


@pytest.mark.parametrize(
    ("half", "argv"),
    [
        (2, ["--dropout", "0.1,0.2,0", "--batch-norm", "--momentum", "0.9"]),
        (1, ["--optimizer", "adamw", "--feedback", "fastfood", "--storage", "procedural", "--precision", "bf16"]),
    ],
)
def test_resuming_equals_going_through(tmp_path: Path, half: int, argv: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, *argv, "--epochs", str(2 * half))
    run(parts, *argv, "--epochs", str(half))
    assert main(["--resume", str(parts / "checkpoint.pt"), "--epochs", str(2 * half)]) == 0
    assert read(parts)["history"] == read(whole)["history"]
    for rule in ("dfa", "bp"):
        one, other = checkpoint(whole)["learners"][rule], checkpoint(parts)["learners"][rule]
        del one["seconds"], other["seconds"]
        assert_equal(one, other)


def test_resuming_goes_on_from_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", "--epochs", "2")
    with monkeypatch.context() as patch:
        # Of 46 batches an epoch and 2 rules: in the second epoch of the second rule.
        patch.setattr(trainer.Learner, "step", on_call(75, trainer.Learner.step, raise_interrupt))
        cut = run(tmp_path / "cut", "--epochs", "2", status=130)
    assert [len(cut["history"][rule]) for rule in ("dfa", "bp")] == [2, 1]
    assert main(["--resume", str(tmp_path / "cut" / "checkpoint.pt")]) == 0
    assert read(tmp_path / "cut")["history"] == read(tmp_path / "whole")["history"]


def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = on_call(30, trainer.Learner.step, raise_interrupt)
    monkeypatch.setattr(trainer.Learner, "step", interrupt)
    result = run(tmp_path, "--epochs", "3", "--rule", "dfa", status=130)
    assert result["interrupted"]
    assert len(result["history"]["dfa"]) == 1
    assert checkpoint(tmp_path)["learners"]["dfa"]["history"] == result["history"]["dfa"]
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert f"{result['results']['dfa']['test_accuracy']['final']:.2%}" in capsys.readouterr().out


def test_ctrl_c_lets_the_batch_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    steps: list[str] = []

    def step(self: trainer.Learner, *batch: Any) -> Any:
        steps.append("started")
        os.kill(os.getpid(), signal.SIGINT)
        output = original(self, *batch)
        steps.append("ended")
        return output

    original = trainer.Learner.step
    monkeypatch.setattr(trainer.Learner, "step", step)
    result = run(tmp_path, status=130)
    assert steps == ["started", "ended"]
    assert result["interrupted"]
    assert result["history"] == {"dfa": [], "bp": []}
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, losses = trainer.Learner.step, []

    def step(self: trainer.Learner, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, output = original(self, *batch)
        losses.append(loss)
        return loss * (float("nan") if len(losses) == 30 else 1), output

    monkeypatch.setattr(trainer.Learner, "step", step)
    result = run(tmp_path, "--rule", "dfa", "--epochs", "5", "--lr", "0.3", status=1)
    assert result["failure"] == "dfa: the loss became nan in epoch 2; try --lr below 0.3"
    assert result["failure"] in capsys.readouterr().err
    assert not result["interrupted"]
    assert len(result["history"]["dfa"]) == 1


def test_stderr_has_one_line_per_epoch_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--epochs", "2")
    starts = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert starts == ["dfa epoch 1/2", "bp epoch 1/2", "dfa epoch 2/2", "bp epoch 2/2", "written"]


def test_timing_leaves_the_trained_weights_alone() -> None:
    chosen = options.settle({"device": "cpu", "widths": (16,), "timed_steps": 2, "dropout": (0.1, 0.1, 0.1)})
    task = trainer.Task(data.load("digits"), "cpu")
    learner, _ = make_learners(chosen, task)
    learner.epoch(task, lambda: None)
    before = deepcopy(learner.state_dict())
    trainer.compare_steps(learner, task, lambda: None)
    assert_equal(learner.state_dict(), before)


def test_batches_partition_the_training_set() -> None:
    task = trainer.Task(data.load("digits"), "cpu")
    for drop_last, rows in ((False, 1437), (True, 1408)):
        chosen = options.settle({"device": "cpu", "batch": 128, "drop_last": drop_last})
        batches = torch.cat(task.batches(chosen, torch.Generator().manual_seed(3)))
        assert len(batches.unique()) == len(batches) == rows


def test_published_settings() -> None:
    chosen = options.settle({"published": True, "device": "cpu"})
    assert chosen.widths == (800, 800, 800)
    assert (chosen.data, chosen.network, chosen.activation) == ("cifar10", "mlp", "tanh")
    assert (chosen.lr, chosen.gain, chosen.momentum, chosen.optimizer) == (5e-4, 128.0, 0.0, "sgd")
    assert (chosen.epochs, chosen.batch, chosen.drop_last, chosen.taps) == (50, 128, True, "layer_input")
    assert chosen.normalize
    assert options.settle({"published": True, "batch": 64, "epochs": 2}).gain == 64.0


def test_cnn_sizes() -> None:
    large = networks.cnn((3, 32, 32), 10, Style(batch_norm=True, conv_dropout=0.1))
    names = ["conv1", "dropout_conv1", "activation_conv1", "norm_conv1", "pool1"]
    assert [name for name, _ in large.named_children()][:5] == names
    assert large.get_submodule("fc1").weight.shape == (128, 576)
    assert large.get_submodule("conv2").weight.shape == (64, 32, 5, 5)
    small = networks.cnn((1, 8, 8), 10, Style())
    assert small(torch.ones(2, 1, 8, 8)).shape == (2, 10)


def test_cnn_runs(tmp_path: Path) -> None:
    argv = ["--device", "cpu", "--network", "cnn", "--epochs", "1", "--batch", "256", "--timed-steps", "0"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert list(read(tmp_path)["results"]["dfa"]["alignment"]) == ["conv1", "conv2", "conv3", "fc1"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--lr", "-1"], ["--lr", "'-1'", "above 0"]),
        (["--lr", "nan"], ["--lr", "'nan'", "above 0"]),
        (["--widths", "8,x"], ["--widths", "'8,x'", "800,800,800"]),
        (["--dropout", "0.1,0.2"], ["--dropout", "'0.1,0.2'", "IN,FC,CONV"]),
        (["--dropout", "1"], ["--dropout", "'1'", "below 1"]),
        (["--activation", "leaky:x"], ["--activation", "'leaky:x'", "leaky:SLOPE"]),
        (["--data", "mnist"], ["--data", "'mnist'", "cifar10"]),
        (["--device", "gpu"], ["--device", "'gpu'", "cuda"]),
        (["--device", "cpu", "--precision", "fp16"], ["--precision", "fp16", "bf16"]),
        (["--nonzeros", "3"], ["nonzeros", "3", "sparse"]),
        (["--feedback", "sparse", "--nonzeros", "11"], ["nonzeros", "11", "10"]),
        (["--optimizer", "adamw", "--momentum", "0.9"], ["--momentum", "0.9", "sgd"]),
        (["--network", "cnn", "--widths", "8"], ["--widths", "8", "mlp"]),
        (["--batch", "1438"], ["--batch", "1438", "1437"]),
        (["--batch", "1436", "--batch-norm"], ["--batch", "1436", "batch of 1"]),
        (["--data", "cifar10", "--data-dir", "nowhere", "--no-download"], ["cifar10", "nowhere"]),
        (["--resume", "nowhere.pt"], ["--resume", "nowhere.pt", "No such file"]),
    ],
)
def test_bad_input_is_refused_in_one_line(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, *argv)
    assert all(part in line for part in parts), line


def test_resume_refuses_other_options_and_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--epochs", "2", "--rule", "bp")
    capsys.readouterr()
    resume = ["--resume", str(tmp_path / "checkpoint.pt")]
    line = refusal(capsys, *resume, "--lr", "0.7")
    assert "--lr: got 0.7" in line
    assert "--epochs: got 1, expected at least 2" in refusal(capsys, *resume, "--epochs", "1")
    assert "--resume" in refusal(capsys, "--out", str(tmp_path))
    (tmp_path / "torn.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:1000])
    assert "torn.pt" in refusal(capsys, "--resume", str(tmp_path / "torn.pt"))
    assert main([*resume, "--widths", "32,24", "--seed", "0"]) == 0


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "bench.learn.train", "--epochs", "0"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "train.py: argument --epochs: got '0', expected an integer of at least 1\n"
