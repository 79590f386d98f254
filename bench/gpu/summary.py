"""What must be reached, what was, and the report for a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.gpu import timing
from bench.gpu.cases import CASES, DEEP, LARGE, MIDDLE, SMALL, SMALL_HALF, SMALL_IEEE, WIDE, WIDE_ERROR
from bench.gpu.kernel_counts import PROFILED
from bench.gpu.kernel_times import CHOSEN, CUDA, LIBRARY
from bench.gpu.reference import complaint
from bench.gpu.regions import (
    BACKWARD,
    BP,
    BP_GRAPHED,
    BP_GRAPHED_STEP,
    BY_HAND,
    BY_HAND_GRAPHED,
    OURS,
    OURS_GRAPHED,
    OURS_GRAPHED_STEP,
    OURS_TORCH_SGD,
    STEP,
    UPDATE,
)  # fmt: skip
from bench.gpu.sanitizer import TOOLS

Results = dict[str, Any]
Measure = Callable[[Results], float]
HOST_MICROSECONDS = 25.0
FACTS = ("gpu", "capability", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "date")


class NotMeasuredError(Exception):
    """Why there is no number; the message is for the report."""


@dataclass(frozen=True)
class Requirement:
    """A number that has to be reached: at least ``wanted``, or with a negative sign, at most."""

    name: str
    relation: str
    wanted: float
    measure: Measure
    unit: str = ""


@dataclass(frozen=True)
class Verdict:
    """A requirement, measured. Without a number it is not met, for ``note``."""

    name: str
    wanted: str
    measured: float | None
    met: bool
    note: str = ""


def requirements() -> list[Requirement]:
    found = []
    for case in PROFILED:
        # Wide networks take one or two, whichever was measured to be shorter on the card.
        most = 1 if case is SMALL else 2
        found += [
            Requirement(f"{case.name}: backward, kernels", "≤", most, _kernels(case.name, BACKWARD, most)),
            Requirement(f"{case.name}: backward and SGD, kernels", "≤", most, _kernels(case.name, UPDATE, most)),
        ]
    host = Requirement("host's part of one layer_grads", "≤", HOST_MICROSECONDS, _host_microseconds, " µs")
    return [*found, *_of_kernels(), *_of_steps(), host]


def _of_kernels() -> list[Requirement]:
    """Backward passes and updates, all as graphs."""
    found = []
    for case, microseconds, update in ((SMALL, 18, 4), (SMALL_HALF, 11, 5), (SMALL_IEEE, 27, 3.3)):
        name, faster = case.name, _faster(case.name)
        found += [
            Requirement(f"{name}: backward", "≤", microseconds, _microseconds(name, BACKWARD, OURS_GRAPHED), " µs"),
            Requirement(
                f"{name}: backward and SGD over BP's", "≥", update, faster(UPDATE, BP_GRAPHED, OURS_GRAPHED), "×"
            ),
        ]
    for case, backward in ((DEEP, 7), (LARGE, 1.95), (WIDE, 1.8), (WIDE_ERROR, 1.7)):
        over_bp = _faster(case.name)(BACKWARD, BP_GRAPHED, OURS_GRAPHED)
        found += [Requirement(f"{case.name}: backward over BP's", "≥", backward, over_bp, "×")]
    large, middle = _faster(LARGE.name), _faster(MIDDLE.name)(BACKWARD, BY_HAND_GRAPHED, OURS_GRAPHED)
    found += [
        Requirement(
            f"{LARGE.name}: backward and SGD over BP's", "≥", 1.9, large(UPDATE, BP_GRAPHED, OURS_GRAPHED), "×"
        ),
        Requirement(f"{MIDDLE.name}: backward over {BY_HAND}", "≥", 2.1, middle, "×"),
    ]
    found += [
        Requirement(f"{case.name}: layer_grads over the best of its ways", "≤", 1.05, _of_best(case.name), "×")
        for case in CASES
    ]
    found += [
        Requirement(f"{case.name}: CUDA C++ over layer_grads", "≤", 1.3, _of_chosen(case.name, CUDA), "×")
        for case in (SMALL_HALF, SMALL_IEEE)
    ]
    return found


def _of_steps() -> list[Requirement]:
    small, large = _faster(SMALL.name), _faster(LARGE.name)
    found = [
        Requirement(f"{SMALL.name}: step over BP, both eager", "≥", 2, small(STEP, BP, OURS), "×"),
        Requirement(f"{SMALL.name}: the same with torch's SGD", "≥", 1.2, small(STEP, BP, OURS_TORCH_SGD), "×"),
        Requirement(f"{SMALL.name}: GraphedStep over eager BP", "≥", 10, small(STEP, BP, OURS_GRAPHED_STEP), "×"),
        Requirement(f"{LARGE.name}: step over BP, both graphed", "≥", 1.45, large(STEP, BP_GRAPHED, OURS_GRAPHED), "×"),
    ]
    for case in (SMALL, SMALL_HALF):
        name, faster = case.name, _faster(case.name)
        found += [
            Requirement(f"{name}: step over BP, both graphed", "≥", 2, faster(STEP, BP_GRAPHED, OURS_GRAPHED), "×"),
            Requirement(
                f"{name}: GraphedStep over BP's", "≥", 2, faster(STEP, BP_GRAPHED_STEP, OURS_GRAPHED_STEP), "×"
            ),
        ]
    return found


def verdicts(results: Results) -> list[Verdict]:
    return [_verdict(requirement, results) for requirement in requirements()]


def _verdict(requirement: Requirement, results: Results) -> Verdict:
    wanted = f"{requirement.relation} {requirement.wanted:g}{requirement.unit}"
    try:
        measured = requirement.measure(results)
    except NotMeasuredError as reason:
        return Verdict(requirement.name, wanted, None, False, str(reason))
    holds = {
        "=": measured == requirement.wanted,
        "≥": measured >= requirement.wanted,
        "≤": measured <= requirement.wanted,
    }
    return Verdict(requirement.name, wanted, measured, holds[requirement.relation])


def _kernels(case: str, region: str, most: int) -> Measure:
    def measure(results: Results) -> float:
        made = _found(results, "profile", case)
        names = made[OURS][region]
        ours = made["backward is by our kernels" if region == BACKWARD else "backward and SGD are by our kernels"]
        if len(names) <= most and not ours:
            raise NotMeasuredError(f"not our kernels: {', '.join(names)}" if names else "no kernel ran")
        return float(len(names))

    return measure


def _faster(case: str) -> Callable[[str, str, str], Measure]:
    def of(region: str, baseline: str, ours: str) -> Measure:
        def measure(results: Results) -> float:
            rows = _found(results, "time", "items", case)["regions"][region]
            return _seconds(rows, baseline) / _seconds(rows, ours)

        return measure

    return of


def _microseconds(case: str, region: str, variant: str) -> Measure:
    return lambda results: _seconds(_found(results, "time", "items", case)["regions"][region], variant) * 1e6


def _of_chosen(case: str, kernel: str) -> Measure:
    def measure(results: Results) -> float:
        rows = _found(results, "time", "items", case)["kernels"]
        return _seconds(rows, kernel) / _seconds(rows, CHOSEN)

    return measure


def _of_best(case: str) -> Measure:
    """The kernel that the plan picks, over the shortest that there is for this call."""

    def measure(results: Results) -> float:
        rows = _found(results, "time", "items", case)["kernels"]
        others = [name for name, row in rows.items() if name not in (CUDA, LIBRARY) and "seconds" in row]
        return _seconds(rows, CHOSEN) / min(_seconds(rows, name) for name in others)

    return measure


def _host_microseconds(results: Results) -> float:
    made = _found(results, "time", "items", timing.HOST)
    if results.get("quick"):
        raise NotMeasuredError("tiny sizes")
    if not made["correct"]:
        raise NotMeasuredError(complaint(made))
    return float(made[CHOSEN]) * 1e6


def _found(results: Results, *path: str) -> Any:
    made: Any = results
    for name in path:
        made = (made or {}).get(name)
    if not made:
        raise NotMeasuredError("not measured")
    if "reason" in made:
        raise NotMeasuredError(made["reason"])
    return made


def _seconds(rows: dict[str, Any], variant: str) -> float:
    row = rows.get(variant)
    if row is None:
        raise NotMeasuredError(f"{variant}: not measured")
    if "seconds" not in row:
        raise NotMeasuredError(f"{variant}: {timing.cell(row).strip()}")
    return float(row["seconds"])


def markdown(results: Results) -> str:
    """The report."""
    environment = results.get("environment") or {}
    facts = [f"- {name}: {environment.get(name)}" for name in FACTS]
    parts = ["# What a GPU showed", "\n".join(facts), _requirements_table(results["requirements"])]
    parts.append(_table(["step", "status", "seconds"], [_step_row(step) for step in results["steps"]]))
    parts += ["## Tests", _tests(results.get("tests")), "## Memory checker", _sanitizer(results.get("sanitizer"))]
    made = results.get("time")
    parts += ["## Times", f"```\n{timing.report(made)}\n```" if made else "not measured"]
    return "\n\n".join(parts) + "\n"


def _requirements_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for verdict in found:
        measured = "–" if verdict["measured"] is None else f"{verdict['measured']:.3g}"
        met = "met" if verdict["met"] else verdict["note"] or "**not met**"
        rows.append([verdict["name"], measured, verdict["wanted"], met])
    return _table(["must be reached", "measured", "wanted", ""], rows)


def _step_row(step: dict[str, Any]) -> list[str]:
    return [step["name"], step["status"], f"{step['seconds']:.0f}"]


def _tests(made: Any) -> str:
    if not made:
        return "not run"
    lines = [f"passed {made['passed']}, failed {len(made['failed'])}, skipped {len(made['skipped'])}"]
    lines += [f"- failed: {name}" for name in made["failed"]]
    lines += [f"- began and did not end: {name}" for name in made["unfinished"]]
    lines += [f"- skipped: {name}: {why}" for name, why in list(made["skipped"].items())[:10]]
    return "\n".join(lines)


def _sanitizer(made: Any) -> str:
    if not made:
        return "not run"
    if made["tool"] is None:
        return "compute-sanitizer is not here"
    lines = [_check_row(name, row) for name, row in made.get("checks", {}).items()]
    lines += [_tool_row(name, made[name]) for name in TOOLS if name in made]
    return "\n".join(filter(None, lines)) or "nothing ran"


def _check_row(name: str, row: dict[str, Any]) -> str:
    """Nothing for what ran and was right."""
    if row["exit_code"] is None:
        return f"- {name}: did not end in time without a tool"
    if row["exit_code"] != 0:
        return f"- {name}: fails without a tool, with exit code {row['exit_code']}; launched {row.get('launched', {})}"
    if not row["correct"]:
        return f"- {name}: wrong without a tool: off by {float(row['off']):.1e}, allowed {row['allowed']:.1e}"
    return ""


def _tool_row(name: str, row: dict[str, Any]) -> str:
    launched = ", ".join(f"{kernel} {count}" for kernel, count in row.get("launched", {}).items())
    return f"- {name}: {row['summary']} (clean: {row['clean']}; launched: {launched or 'not known'})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
