"""Training of a network by one rule: a step, an epoch, what is measured, the state to go on from."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dfa_kernels as dfa
from bench.learn.data import Dataset
from bench.learn.networks import cnn, mlp
from bench.learn.options import Options, UsageError

ALIGNMENT_ROWS = 128
TEST_ROWS = 1000
# Reading the running loss waits for the device, so it is not done at every batch.
REPORT_EVERY = 20
WARM_UP = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DivergenceError(Exception):
    """The loss is no longer finite."""


class Interrupts:
    """Within it, a first Ctrl-C waits for `check`, so that no step is cut short; a second acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt


class Task:
    """A data set on the device, as the trainers use it."""

    def __init__(self, dataset: Dataset, device: str) -> None:
        self.train_x, self.train_y = dataset.train_x.to(device), dataset.train_y.to(device)
        self.test_x, self.test_y = dataset.test_x.to(device), dataset.test_y.to(device)
        self.classes = len(dataset.classes)

    def batches(self, options: Options, generator: torch.Generator) -> list[Tensor]:
        """One epoch's rows, in an order drawn from `generator`."""
        order = torch.randperm(len(self.train_y), generator=generator).to(self.train_y.device)
        batches = list(order.split(options.batch))
        if options.drop_last and len(batches[-1]) < options.batch:
            batches.pop()
        return batches


def samples_per_epoch(task: Task, options: Options) -> int:
    """The images that an epoch trains on."""
    rows = len(task.train_y)
    return rows - rows % options.batch if options.drop_last else rows


def check_batches(task: Task, options: Options) -> None:
    rows, batch = len(task.train_y), options.batch
    if batch > rows:
        raise UsageError(f"--batch: got {batch}, expected at most {rows}, the training images")
    if options.batch_norm and (batch == 1 or (rows % batch == 1 and not options.drop_last)):
        raise UsageError(f"--batch: got {batch}, which makes a batch of 1 image; --batch-norm needs 2")


def build_network(task: Task, options: Options) -> nn.Sequential:
    """The network, on the device, as the seed initialises it."""
    torch.manual_seed(options.seed)
    shape = tuple(task.train_x.shape[1:])
    if options.network == "cnn":
        net = cnn(shape, task.classes, options.style())
    else:
        net = mlp(shape, options.widths, task.classes, options.style())
    return net.to(options.device)


class Learner:
    """A network with the rule that trains it, random numbers of its own, and what was measured of it.

    `history` has an entry per epoch; `seconds`, the time that its batches took, stays out of it so that the
    histories of two equal runs are equal.
    """

    def __init__(self, rule: str, net: nn.Module, options: Options) -> None:
        self.rule = rule
        self.options = options
        self.device = torch.device(options.device)
        wrapped = dfa.DFA(net, options.make_feedback(), taps=options.taps) if rule == "dfa" else net
        self.model = wrapped
        self.optimizer = make_optimizer(wrapped, options, options.learning_rate(rule))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.order = torch.Generator().manual_seed(options.seed)
        self.random = random_state(self.device)
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.graphed: dfa.GraphedStep | None = None
        self.output = torch.empty(0, device=self.device)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One update from one batch; its loss and output."""
        if self.options.is_graphed():
            return self.graphed_step(x, y)
        self.optimizer.zero_grad()
        with self.autocast():
            output = self.model(x)
            loss = F.cross_entropy(output.float(), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), output.detach()

    def graphed_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As `step`, by a CUDA graph; the output is overwritten by the next."""
        if self.graphed is None:
            self.graphed = self.capture(x, y)
        loss = self.graphed(x, y)
        return loss, self.output[: len(y)]

    def capture(self, x: Tensor, y: Tensor) -> dfa.GraphedStep:
        def loss_fn(output: Tensor, y: Tensor) -> Tensor:
            # Each graph has its output elsewhere, so it is copied to one place; the first batch is the largest.
            if len(self.output) < len(output):
                self.output = torch.empty_like(output)
            self.output[: len(y)].copy_(output.detach())
            return F.cross_entropy(output.float(), y)

        precision = self.options.precision
        scaler = self.scaler if self.scaler.is_enabled() else None
        amp_dtype = None if precision == "fp32" else DTYPES[precision]
        return dfa.GraphedStep(self.model, self.optimizer, loss_fn, x, y, amp_dtype=amp_dtype, scaler=scaler)

    def autocast(self) -> torch.autocast:
        precision = self.options.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")

    def epoch(self, task: Task, check: Callable[[], None]) -> None:
        """Train for one epoch and add what is measured of it to the history. Raises DivergenceError."""
        number = len(self.history) + 1
        started = time.perf_counter()
        with self.own_random_numbers():
            loss, accuracy = self.pass_over(task, f"{self.rule} epoch {number}/{self.options.epochs}", check)
        self.seconds.append(time.perf_counter() - started)
        self.model.eval()
        entry: dict[str, Any] = {"epoch": number, "train_loss": loss, "train_accuracy": accuracy}
        entry["test_accuracy"] = self.test_accuracy(task)
        if isinstance(self.model, dfa.DFA):
            entry["alignment"] = measure_alignment(self.model, task)
        self.history.append(entry)

    def pass_over(self, task: Task, title: str, check: Callable[[], None]) -> tuple[float, float]:
        """One update from every batch; mean loss and accuracy over them."""
        self.model.train()
        running = Running(self.device)
        batches = task.batches(self.options, self.order)
        with tqdm(batches, desc=title, unit="batch", leave=False, disable=None) as bar:
            for i, rows in enumerate(bar, start=1):
                x, y = task.train_x[rows], task.train_y[rows]
                running.add(*self.step(x, y), y)
                check()
                if i % REPORT_EVERY == 0 or i == len(batches):
                    loss, accuracy = running.means()
                    self.check_loss(loss)
                    bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
        return loss, accuracy

    def check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            rate, option = self.options.learning_rate(self.rule), "--lr" if self.rule == "dfa" else "--bp-lr"
            epoch = len(self.history) + 1
            reason = f"the loss became {loss} in epoch {epoch}"
            raise DivergenceError(f"{self.rule}: {reason}; try {option} below {rate:g}")

    @torch.no_grad()
    def test_accuracy(self, task: Task) -> float:
        correct = 0
        for x, y in zip(task.test_x.split(TEST_ROWS), task.test_y.split(TEST_ROWS), strict=True):
            with self.autocast():
                correct += int((self.model(x).argmax(1) == y).sum())
        return correct / len(task.test_y)

    @contextlib.contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Dropout draws from this learner's sequence, whatever others drew in between."""
        set_random_state(self.random, self.device)
        yield
        self.random = random_state(self.device)

    def copy(self) -> Learner:
        """A learner at its first step, with a copy of the network as it is now."""
        return Learner(self.rule, deepcopy(self.plain_network()), self.options)

    def plain_network(self) -> nn.Module:
        return self.model.net if isinstance(self.model, dfa.DFA) else self.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.get_state(),
            "random": self.random,
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        self.random = state["random"]
        self.history, self.seconds = state["history"], state["seconds"]


class Running:
    """Sums over the batches of an epoch, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.rows = 0

    def add(self, loss: Tensor, output: Tensor, y: Tensor) -> None:
        self.loss += loss * len(y)
        self.correct += (output.argmax(1) == y).sum()
        self.rows += len(y)

    def means(self) -> tuple[float, float]:
        return self.loss.item() / self.rows, self.correct.item() / self.rows


def make_optimizer(model: nn.Module, options: Options, lr: float) -> torch.optim.Optimizer:
    """For DFA the fused optimizer, except under fp16, whose loss scaling needs gradients; else torch's."""
    graphed = options.is_graphed()
    if isinstance(model, dfa.DFA) and options.precision != "fp16":
        if options.optimizer == "adamw":
            return dfa.optim.AdamW(model, lr, capturable=graphed)
        return dfa.optim.SGD(model, lr, options.momentum, capturable=graphed)
    # Of torch's only the fused ones take a scaler's verdict without waiting for it.
    if options.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, capturable=graphed, fused=graphed or None)
    return torch.optim.SGD(model.parameters(), lr, options.momentum, fused=graphed or None)


def measure_alignment(model: dfa.DFA, task: Task) -> dict[str, dict[str, float]]:
    """Mean and standard deviation at every tap, on the first test images, in the mode the model is in."""
    rows = slice(ALIGNMENT_ROWS)
    measured = dfa.alignment(model, task.test_x[rows], task.test_y[rows], F.cross_entropy)
    return {name: {"mean": tap.mean, "std": tap.std} for name, tap in measured.items()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else {**states, "cuda": torch.cuda.get_rng_state(device)}


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def time_steps(learners: list[Learner], task: Task, check: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of single steps of each learner, taken in turns on the same batches, which trains them.

    A step is zero_grad, forward, loss, backward and update.
    """
    options = learners[0].options
    rows = torch.arange(min(options.batch, len(task.train_y)), device=options.device)
    seconds: dict[str, list[float]] = {learner.rule: [] for learner in learners}
    for i in range(WARM_UP + options.timed_steps):
        shifted = (rows + i * len(rows)) % len(task.train_y)
        x, y = task.train_x[shifted], task.train_y[shifted]
        # Who goes first alternates, too: it finds the batch in another state of the caches.
        for learner in learners if i % 2 else reversed(learners):
            seconds[learner.rule].append(timed(learner, x, y))
        check()
    return {rule: times[WARM_UP:] for rule, times in seconds.items()}


def timed(learner: Learner, x: Tensor, y: Tensor) -> float:
    synchronize(learner.device)
    started = time.perf_counter()
    learner.step(x, y)
    synchronize(learner.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_steps(learner: Learner, task: Task, check: Callable[[], None]) -> dict[str, Any]:
    """Median seconds of a step of DFA and of BP, and their ratio, on copies of a DFA learner's network."""
    dfa_copy = learner.copy()
    bp_copy = Learner("bp", deepcopy(learner.plain_network()), learner.options)
    for copy in (dfa_copy, bp_copy):
        copy.model.train()
    seconds = time_steps([dfa_copy, bp_copy], task, check)
    medians = {rule: statistics.median(times) for rule, times in seconds.items()}
    return {
        "dfa_step_seconds": medians["dfa"],
        "bp_step_seconds": medians["bp"],
        "ratio": medians["dfa"] / medians["bp"],
        "steps": learner.options.timed_steps,
    }
