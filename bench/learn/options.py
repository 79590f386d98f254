"""The options of the main training job: what the command line says, what follows from it, what is refused."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

import dfa_kernels as dfa
from bench.learn.networks import ACTIVATION_NAMES, Style, activation_maker
from dfa_kernels.feedback.spec import KINDS, STORAGES

# Options that may differ between a run and its continuation.
FREE = {"epochs", "out", "data_dir", "download", "graph"}


class UsageError(Exception):
    """Input that cannot be used; the message is one line that names it, its value and what is expected."""


@dataclass(frozen=True)
class Options:
    """All that defines a run. lr and bp_lr are 0 until `settle` has chosen what is not given."""

    data: str = "digits"
    data_dir: str = "data"
    download: bool = True
    network: str = "mlp"
    widths: tuple[int, ...] = ()
    rule: str = "both"
    feedback: str = "gaussian"
    storage: str = "dense"
    nonzeros: int | None = None
    normalize: bool = True
    gain: float = 1.0
    taps: str = "layer_input"
    activation: str = "tanh"
    dropout: tuple[float, float, float] = (0.0, 0.0, 0.0)
    batch_norm: bool = False
    epochs: int = 20
    batch: int = 32
    drop_last: bool = False
    lr: float = 0.0
    bp_lr: float = 0.0
    momentum: float = 0.0
    optimizer: str = "sgd"
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    precision: str = "fp32"
    graph: bool = True
    timed_steps: int = 40
    published: bool = False
    out: str = ""

    def rules(self) -> tuple[str, ...]:
        return ("dfa", "bp") if self.rule == "both" else (self.rule,)

    def learning_rate(self, rule: str) -> float:
        return self.lr if rule == "dfa" else self.bp_lr

    def is_graphed(self) -> bool:
        """Whether steps are CUDA graphs."""
        return self.graph and self.device.startswith("cuda")

    def style(self) -> Style:
        return Style(self.activation, *self.dropout, self.batch_norm)

    def make_feedback(self) -> dfa.Feedback:
        try:
            return dfa.Feedback(
                self.feedback,
                self.storage,
                seed=self.seed,
                normalize=self.normalize,
                gain=self.gain,
                nonzeros=self.nonzeros,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error


TASK_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "mlp"): {"widths": (1024, 1024, 1024), "batch": 128},
    ("digits", "cnn"): {},
    ("cifar10", "mlp"): {"widths": (800, 800, 800), "epochs": 10, "batch": 128},
    ("cifar10", "cnn"): {"epochs": 10, "batch": 128},
}
DEFAULT_LR = {
    ("digits", "mlp", "sgd"): 0.5,
    ("digits", "mlp", "adamw"): 3e-3,
    ("digits", "cnn", "sgd"): 0.3,
    ("digits", "cnn", "adamw"): 1e-3,
    ("cifar10", "mlp", "sgd"): 0.1,
    ("cifar10", "mlp", "adamw"): 3e-4,
    ("cifar10", "cnn", "sgd"): 0.1,
    ("cifar10", "cnn", "adamw"): 1e-3,
}
PUBLISHED: dict[str, Any] = {
    "data": "cifar10",
    "epochs": 50,
    "batch": 128,
    "drop_last": True,
    "lr": 5e-4,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: Sequence[str] | None) -> tuple[dict[str, Any], Path | None]:
    """The options given on the command line, and those only; and the checkpoint to go on from."""
    given = vars(make_parser().parse_args(argv))
    return given, given.pop("resume", None)


def settle(given: dict[str, Any]) -> Options:
    """All options of a new run: those given, then the preset's, then the defaults of the data and network."""
    preset = PUBLISHED if given.get("published") else {}
    chosen = {"device": "cuda" if torch.cuda.is_available() else "cpu", **preset, **given}
    task = (chosen.get("data", Options.data), chosen.get("network", Options.network))
    options = Options(**{**TASK_DEFAULTS[task], **chosen})
    if options.published and "gain" not in given:
        # With one mean loss, this sums the hidden layers' error over the batch, as the published code did.
        options = replace(options, gain=float(options.batch))
    options = replace(options, lr=options.lr or DEFAULT_LR[(*task, options.optimizer)])
    # The gain scales the hidden layers' rate under DFA; BP, without it, gets that rate everywhere.
    options = replace(options, bp_lr=options.bp_lr or options.lr * (abs(options.gain) or 1.0))
    check(options)
    return options


def settle_resumed(given: dict[str, Any], stored: dict[str, Any], checkpoint: Path, done: int) -> Options:
    """The options of a checkpoint, of which `done` epochs are done. UsageError where a given one differs."""
    for name in given.keys() - FREE:
        got, made_with = given[name], stored.get(name)
        if got != made_with:
            raise UsageError(f"{flag(name)}: got {got!r}, but {checkpoint} was made with {made_with!r}")
    try:
        options = Options(**stored)
    except TypeError as error:
        raise UsageError(f"--resume: {checkpoint} holds unknown options: {error}") from error
    free = {name: given[name] for name in FREE & given.keys()}
    options = replace(options, **{"out": str(checkpoint.parent), **free})
    if options.epochs < done:
        raise UsageError(f"--epochs: got {options.epochs}, expected at least {done}, done in {checkpoint}")
    check(options)
    return options


def flag(name: str) -> str:
    """The option on the command line that sets the field `name`."""
    return f"--no-{name}" if name in ("normalize", "graph") else f"--{name.replace('_', '-')}"


def check(options: Options) -> None:
    """Refuse combinations that mean nothing or that the device cannot run."""
    widths, momentum = options.widths, options.momentum
    if options.network == "cnn" and widths:
        raise UsageError(f"--widths: got {widths} with --network cnn, expected --network mlp")
    if options.optimizer == "adamw" and momentum:
        raise UsageError(f"--momentum: got {momentum} with --optimizer adamw, expected --optimizer sgd")
    options.make_feedback()
    _check_device(options)


def _check_device(options: Options) -> None:
    if options.device != "cpu":
        try:
            torch.empty(1, device=options.device)
        except (RuntimeError, AssertionError):
            count = torch.cuda.device_count()
            raise UsageError(
                f"--device: got {options.device!r}, expected 'cpu' or one of {count} CUDA devices"
            ) from None
    if options.precision == "fp16" and options.device == "cpu":
        raise UsageError(f"--precision: got 'fp16' on device {options.device!r}, expected fp32 or bf16 there")


def to_dict(options: Options) -> dict[str, Any]:
    """The options as plain values, by name."""
    return asdict(options)


def _number(kind: Callable[[str], float], wanted: str, accept: Callable[[float], bool]) -> Callable[[str], Any]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not accept(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {wanted}")
        return value

    return convert


_count = _number(int, "an integer of at least 1", lambda n: n >= 1)
_count_or_none = _number(int, "an integer of at least 0", lambda n: n >= 0)
_seed = _number(int, "an integer from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
_rate = _number(float, "a number above 0", lambda x: x > 0)
_momentum = _number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
_finite = _number(float, "a finite number", lambda x: True)
_probability = _number(float, "numbers from 0 to below 1: one, or IN,FC,CONV", lambda x: 0 <= x < 1)


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(_count(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers like 800,800,800") from None


def _dropout(text: str) -> tuple[float, ...]:
    rates = tuple(_probability(part) for part in text.split(","))
    if len(rates) not in (1, 3):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one number, or three: IN,FC,CONV")
    return rates * 3 if len(rates) == 1 else rates


def _activation(text: str) -> str:
    try:
        activation_maker(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu, cuda or cuda:N")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m bench.learn.train",
        description="Train a network by Direct Feedback Alignment (DFA) and by backpropagation (BP).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_task(parser)
    _add_feedback(parser)
    _add_training(parser)
    _add_machine(parser)
    return parser


def _add_task(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and network")
    group.add_argument("--data", choices=("digits", "cifar10"), help="default digits (no download)")
    group.add_argument("--data-dir", metavar="DIR", help="where CIFAR-10 is or goes, default data")
    group.add_argument("--no-download", dest="download", action="store_false", help="use the files in --data-dir")
    group.add_argument("--network", choices=("mlp", "cnn"), help="default mlp")
    group.add_argument("--widths", type=_widths, help="hidden units; default 1024 three times (digits), 800 (cifar10)")
    group.add_argument("--activation", type=_activation, help=f"{ACTIVATION_NAMES}; default tanh")
    group.add_argument("--dropout", type=_dropout, metavar="P", help="one rate or IN,FC,CONV; default 0")
    group.add_argument("--batch-norm", action="store_true", help="after every activation")


def _add_feedback(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("learning rule and feedback")
    group.add_argument("--rule", choices=("dfa", "bp", "both"), help="default both")
    group.add_argument("--feedback", choices=KINDS, help="its distribution, default gaussian")
    group.add_argument("--storage", choices=STORAGES, help="keep the matrix, or its seed; default dense")
    group.add_argument("--nonzeros", type=_count, help="of sparse feedback, in a row; default sqrt(classes)")
    group.add_argument("--no-normalize", dest="normalize", action="store_false", help="do not scale it by layer size")
    group.add_argument("--gain", type=_finite, help="factor of the feedback matrix, default 1")
    group.add_argument("--taps", choices=("nonlinearity", "layer_input"), help="default layer_input")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=_count, help="default 20 (digits), 10 (cifar10)")
    group.add_argument("--batch", type=_count, help="default 128, for a cnn on digits 32")
    group.add_argument("--drop-last", action="store_true", help="leave out a smaller last batch")
    group.add_argument("--optimizer", choices=("sgd", "adamw"), help="default sgd")
    group.add_argument("--lr", type=_rate, help="learning rate of DFA; the default depends on the task")
    group.add_argument("--bp-lr", type=_rate, help="learning rate of BP, default |gain| times --lr")
    group.add_argument("--momentum", type=_momentum, help="of sgd, default 0")
    group.add_argument("--seed", type=_seed, help="default 0")
    group.add_argument(
        "--published",
        action="store_true",
        help="the published settings for CIFAR-10: 50 epochs, --lr 5e-4 with the hidden layers' error"
        " summed over the batch (--gain 128), --drop-last, its pixel statistics; other options still apply",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", type=_device, help="default cuda if there is one, else cpu")
    group.add_argument("--threads", type=_count, help="of the CPU, default torch's choice")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="autocast; default fp32")
    group.add_argument("--no-graph", dest="graph", action="store_false", help="on a GPU: no CUDA graphs of steps")
    group.add_argument("--timed-steps", type=_count_or_none, help="timed per rule, default 40")
    group.add_argument("--out", metavar="DIR", help="default a new folder in runs/")
    group.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on from OUT/checkpoint.pt")
