"""The main training job: a network trained by DFA and, for comparison, by backpropagation, on real data.

    python -m bench.learn.train
    python -m bench.learn.train --published --rule dfa
    python -m bench.learn.train --resume runs/NAME/checkpoint.pt --epochs 40

Writes a table, and to --out: run.json, curves.png and, every epoch, checkpoint.pt. Exit status: 0; 1 if
the loss became infinite or NaN; 2 if options or files cannot be used; 130 after Ctrl-C, which ends it after
the current batch and keeps what was measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.learn import data
from bench.learn.chart import draw
from bench.learn.options import Options, UsageError, parse, settle, settle_resumed
from bench.learn.report import describe, load_checkpoint, replace_file, save_checkpoint, save_json, table
from bench.learn.trainer import (
    DivergenceError,
    Interrupts,
    Learner,
    Task,
    build_network,
    check_batches,
    compare_steps,
    samples_per_epoch,
)

INTERRUPTED = 130
FILES = ("run.json", "curves.png", "checkpoint.pt")


class Run:
    """The learners of a run, the folder of its files, and how it went."""

    def __init__(self, options: Options, task: Task, learners: list[Learner], out: Path) -> None:
        self.options = options
        self.task = task
        self.learners = learners
        self.out = out
        self.timing: dict[str, Any] | None = None
        self.interrupted = False
        self.failure: str | None = None

    def work(self) -> int:
        """Train, time and report; the exit status."""
        status = 0
        with Interrupts() as interrupts:
            try:
                self.train(interrupts)
                self.time_steps(interrupts)
            except KeyboardInterrupt:
                self.interrupted, status = True, INTERRUPTED
            except DivergenceError as error:
                self.failure, status = str(error), 1
        self.report()
        return status

    def train(self, interrupts: Interrupts) -> None:
        for epoch in range(1, self.options.epochs + 1):
            for learner in self.learners:
                if len(learner.history) < epoch:
                    learner.epoch(self.task, interrupts.check)
                    save_checkpoint(self.out / "checkpoint.pt", self.options, self.learners)
                    tqdm.write(progress_line(learner, self.task), file=sys.stderr)
                    interrupts.check()

    def time_steps(self, interrupts: Interrupts) -> None:
        if self.options.timed_steps and self.learners[0].rule == "dfa":
            self.timing = compare_steps(self.learners[0], self.task, interrupts.check)

    def report(self) -> None:
        """Print the table and write run.json and curves.png."""
        ending = {"interrupted": self.interrupted, "failure": self.failure}
        result = describe(self.options, self.learners, self.task, self.timing, ending)
        save_json(self.out / "run.json", result)
        replace_file(self.out / "curves.png", partial(draw, result))
        print(table(result))
        if self.interrupted:
            print("interrupted: what was measured until then", file=sys.stderr)
        if self.failure:
            print(f"train.py: {self.failure}", file=sys.stderr)
        written = [name for name in FILES if (self.out / name).exists()]
        print(f"written: {self.out}/{', '.join(written)}", file=sys.stderr)


def progress_line(learner: Learner, task: Task) -> str:
    entry = learner.history[-1]
    line = f"{learner.rule} epoch {entry['epoch']}/{learner.options.epochs}: loss {entry['train_loss']:.4f}, "
    line += f"train {entry['train_accuracy']:.2%}, test {entry['test_accuracy']:.2%}"
    taps = "".join(f" {name} {tap['mean']:.2f}" for name, tap in entry.get("alignment", {}).items())
    seconds = learner.seconds[-1]
    rate = samples_per_epoch(task, learner.options) / seconds
    return f"{line}{', alignment' + taps if taps else ''} ({seconds:.1f} s, {rate:,.0f} samples/s)"


def prepare(argv: Sequence[str] | None) -> Run:
    """The run that the command line asks for, ready to start or to go on. Raises UsageError."""
    given, checkpoint = parse(argv)
    stored = None if checkpoint is None else load_checkpoint(checkpoint)
    options = _options(given, checkpoint, stored)
    if options.threads:
        torch.set_num_threads(options.threads)
    task = _load_task(options)
    check_batches(task, options)
    learners = make_learners(options, task)
    if stored is not None:
        _restore(learners, stored["learners"], checkpoint)
    return Run(options, task, learners, make_folder(options, checkpoint))


def _options(given: dict[str, Any], checkpoint: Path | None, stored: dict[str, Any] | None) -> Options:
    if checkpoint is None or stored is None:
        return settle(given)
    done = max(len(state["history"]) for state in stored["learners"].values())
    return settle_resumed(given, stored["options"], checkpoint, done)


def _load_task(options: Options) -> Task:
    try:
        return Task(data.load(options.data, options.data_dir, options.download, options.published), options.device)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"--data {options.data}: {error}") from error


def make_learners(options: Options, task: Task) -> list[Learner]:
    """A learner per rule; all start from the same weights, the same batches and the same random numbers."""
    net = build_network(task, options)
    state = torch.get_rng_state()
    learners = []
    for rule in options.rules():
        torch.set_rng_state(state)
        learners.append(Learner(rule, deepcopy(net), options))
    try:
        for learner in learners:
            learner.model.eval()
            # Shows what cannot work before anything is trained, and finds the taps.
            with torch.no_grad():
                learner.model(task.test_x[:2])
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return learners


def _restore(learners: list[Learner], states: dict[str, Any], checkpoint: Path | None) -> None:
    try:
        for learner in learners:
            learner.load_state_dict(states[learner.rule])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--resume: {checkpoint} does not fit its own options: {reason}") from error


def make_folder(options: Options, checkpoint: Path | None) -> Path:
    """The folder of the run's files, which holds no other run."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{options.data}-{options.network}-{options.rule}-seed{options.seed}-{stamp}"
    out = Path(options.out or Path("runs") / name)
    own = checkpoint is not None and checkpoint.parent.resolve() == out.resolve()
    if (out / "checkpoint.pt").exists() and not own:
        raise UsageError(f"--out: got {str(out)!r}, which holds a run, expected another folder, or --resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: got {str(out)!r}, expected a folder to write to: {error.strerror}") from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return prepare(argv).work()
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
