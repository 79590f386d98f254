"""What a run leaves behind: the table, run.json, and the checkpoint file."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import dfa_kernels as dfa
from bench.environment import describe as describe_machine
from bench.learn.options import Options, UsageError, to_dict
from bench.learn.trainer import Learner, Task, samples_per_epoch

NONE = "-"
# Where things lie on one machine says nothing about a result.
MACHINE_PATHS = ("data_dir", "out")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a new file, which takes the place of `path` only once it is whole."""
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    write(part)
    os.replace(part, path)


def save_checkpoint(path: Path, options: Options, learners: Sequence[Learner]) -> None:
    states = {learner.rule: learner.state_dict() for learner in learners}
    content = {"options": to_dict(options), "learners": states}
    replace_file(path, lambda part: torch.save(content, part))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; UsageError if it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"--resume: got {str(path)!r}, expected a checkpoint: {error.strerror}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        content = None
    if not isinstance(content, dict) or not {"options", "learners"} <= content.keys():
        raise UsageError(f"--resume: got {str(path)!r}, expected a checkpoint that this program has written")
    return content


def save_json(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1, allow_nan=False)
    replace_file(path, lambda part: part.write_text(text + "\n"))


def describe(
    options: Options,
    learners: Sequence[Learner],
    task: Task,
    timing: dict[str, Any] | None,
    ending: dict[str, Any],
) -> dict[str, Any]:
    """All that run.json holds. `ending`: whether the run was interrupted, and what made it stop."""
    settings = {name: value for name, value in to_dict(options).items() if name not in MACHINE_PATHS}
    return {
        **ending,
        "options": settings,
        "environment": environment(options),
        "history": {learner.rule: learner.history for learner in learners},
        "samples_per_epoch": samples_per_epoch(task, options),
        "seconds_per_epoch": {learner.rule: learner.seconds for learner in learners},
        "step_time": timing,
        "feedback_bytes": feedback_bytes(learners, task),
        "results": {learner.rule: summary(learner) for learner in learners},
    }


def summary(learner: Learner) -> dict[str, Any]:
    """A learner's final and best accuracies and its final alignment, as far as there are any."""
    history = learner.history
    result: dict[str, Any] = {
        "learning_rate": learner.options.learning_rate(learner.rule),
        "epochs": len(history),
    }
    for part in ("test", "train"):
        values = [entry[f"{part}_accuracy"] for entry in history]
        result[f"{part}_accuracy"] = {"final": values[-1], "best": max(values)} if values else None
    result["alignment"] = history[-1].get("alignment", {}) if history else {}
    return result


def feedback_bytes(learners: Sequence[Learner], task: Task) -> dict[str, int] | None:
    """Bytes kept between steps: a matrix per layer, one matrix for all, and what this run keeps."""
    for learner in learners:
        if isinstance(learner.model, dfa.DFA):
            model = learner.model
            memory = dfa.feedback_memory(model, task.classes)
            in_use = model.feedback.nbytes(max(tap.size for tap in model.taps), task.classes)
            return {"naive": memory["naive"], "unified": memory["unified"], "in_use": in_use}
    return None


def environment(options: Options) -> dict[str, Any]:
    facts = describe_machine()
    device = facts["processor" if options.device == "cpu" else "gpu"]
    return {**facts, "device": device}


def table(result: dict[str, Any]) -> str:
    """The results as aligned text, a column per rule."""
    rules = list(result["results"])
    rows = [["", *(rule.upper() for rule in rules)]]
    rows += _result_rows([result["results"][rule] for rule in rules])
    rows += _time_rows(result, rules) + _memory_rows(result, rules)
    return align(rows)


def _result_rows(summaries: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["learning rate", *(f"{s['learning_rate']:g}" for s in summaries)]]
    rows.append(["epochs", *(str(s["epochs"]) for s in summaries)])
    for part in ("test", "train"):
        label = f"{part} accuracy, final (best)"
        rows.append([label, *(_accuracy(s[f"{part}_accuracy"]) for s in summaries)])
    taps = list(dict.fromkeys(name for s in summaries for name in s["alignment"]))
    for tap in taps:
        rows.append([f"alignment {tap}, mean (std)", *(_cosine(s["alignment"].get(tap)) for s in summaries)])
    return rows


def _accuracy(value: dict[str, float] | None) -> str:
    return NONE if value is None else f"{value['final']:.2%} ({value['best']:.2%})"


def _cosine(value: dict[str, float] | None) -> str:
    return NONE if value is None else f"{value['mean']:.3f} ({value['std']:.3f})"


def _time_rows(result: dict[str, Any], rules: list[str]) -> list[list[str]]:
    timing = result["step_time"]
    spent = [sum(result["seconds_per_epoch"][rule]) for rule in rules]
    rows = [["training time, s", *(f"{seconds:.1f}" for seconds in spent)]]
    samples = [result["samples_per_epoch"] * len(result["seconds_per_epoch"][rule]) for rule in rules]
    rates = [f"{n / seconds:,.0f}" if n else NONE for n, seconds in zip(samples, spent, strict=True)]
    rows.append(["training, samples/s", *rates])
    if timing is not None:
        medians = [timing[f"{rule}_step_seconds"] for rule in rules]
        rows.append(["step, median ms", *(f"{median * 1e3:.3f}" for median in medians)])
        rows.append(["step, ratio to BP", *(f"{m / timing['bp_step_seconds']:.3f}" for m in medians)])
    return rows


def _memory_rows(result: dict[str, Any], rules: list[str]) -> list[list[str]]:
    memory = result["feedback_bytes"]
    if memory is None:
        return []
    names = {"naive": "a matrix per layer", "unified": "one for all layers", "in_use": "in use"}
    return [
        [f"feedback bytes, {label}", *(f"{memory[key]:,}" if rule == "dfa" else NONE for rule in rules)]
        for key, label in names.items()
    ]


def align(rows: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
