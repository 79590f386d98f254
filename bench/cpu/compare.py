"""A training step by DFA beside backpropagation, every variant interleaved in one process: one table and a JSON file.

    python -m bench.cpu.compare [--rounds 60] [--threads 2] [--compile] [--out runs/compare.json]

Before anything is timed, every variant takes three steps from the same weights, and must end as near to the same steps
in float64 as the plainest float32 variant does, within a factor of two. A variant that does not is reported as wrong,
without a time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa
from bench import environment
from bench.cpu.interleaved import interleaved, medians
from bench.cpu.training_steps import BP_VARIANTS, DFA_VARIANTS, Step, Variant, bp_compiled

BATCH = 128
LR = 1e-3
OURS = "dfa.DFA + dfa.optim.SGD"
BY_HAND = "DFA by hand"


@dataclass(frozen=True)
class Case:
    """A network, and the least speed-up over each baseline that the project sets itself."""

    name: str
    widths: tuple[int, ...]
    targets: dict[str, float]


CASES = (
    Case(
        "3072-800-800-800-10",
        (3072, 800, 800, 800, 10),
        {"BP": 1.15, "BP, update in hooks": 1.10, "BP, update in product": 1.10, BY_HAND: 0.95},
    ),
    Case(
        "1024x8-10",
        (*[1024] * 9, 10),
        {"BP": 1.40, "BP, update in hooks": 1.30, "BP, update in product": 1.30, BY_HAND: 0.95},
    ),
)


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [run_case(case, options.rounds, options.compile) for case in CASES]
    result = {"environment": environment.describe(), "batch": BATCH, "rounds": options.rounds, "cases": cases}
    print(table(cases))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0 if all(variant["correct"] for case in cases for variant in case["variants"]) else 1


def run_case(case: Case, rounds: int, compiled: bool) -> dict[str, Any]:
    """Checks and times every variant on one network."""
    torch.manual_seed(0)
    net = network(case.widths)
    x, y = torch.randn(BATCH, case.widths[0]), torch.randint(case.widths[-1], (BATCH,))
    feedback = dfa.Feedback().stored(max(case.widths[1:-1]), case.widths[-1], "cpu")[0]
    variants = {**BP_VARIANTS, **({"BP, torch.compile": bp_compiled} if compiled else {}), **DFA_VARIANTS}
    errors = weight_errors(net, x, y, feedback, variants)
    right = {name: error <= 2 * errors[_plainest(name)] + 1e-9 for name, error in errors.items()}
    steps = {name: variant(copy.deepcopy(net), x, y, LR, feedback) for name, variant in variants.items() if right[name]}
    seconds = medians(interleaved(steps, rounds))
    return {
        "name": case.name,
        "variants": [_row(name, right[name], errors[name], seconds, case.targets.get(name)) for name in variants],
        "phases_ms": phases(net, x, y, feedback, rounds),
    }


def network(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def weight_errors(
    net: nn.Sequential, x: Tensor, y: Tensor, feedback: Tensor, variants: dict[str, Variant]
) -> dict[str, float]:
    """Largest deviation of any weight from the float64 reference after three steps, by variant."""
    exact = {rule: _after_steps(rule_step, net, x, y, feedback, torch.float64) for rule, rule_step in _PLAIN.items()}
    errors = {}
    for name, variant in variants.items():
        weights = _after_steps(variant, net, x, y, feedback, torch.float32)
        reference = exact[_plainest(name)]
        errors[name] = max((a.double() - b).abs().max().item() for a, b in zip(weights, reference, strict=True))
    return errors


def _after_steps(
    variant: Variant, net: nn.Sequential, x: Tensor, y: Tensor, feedback: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    own = copy.deepcopy(net).to(dtype)
    step = variant(own, x.to(dtype), y, LR, feedback.to(dtype))
    for _ in range(3):
        step()
    return [parameter.detach() for parameter in own.parameters()]


_PLAIN: dict[str, Variant] = {"BP": BP_VARIANTS["BP"], BY_HAND: DFA_VARIANTS[BY_HAND]}


def _plainest(name: str) -> str:
    """The variant whose float32 error the named one is held to, and whose float64 run is the reference."""
    return "BP" if name.startswith("BP") else BY_HAND


def _row(name: str, correct: bool, error: float, seconds: dict[str, float], target: float | None) -> dict[str, Any]:
    row = {"name": name, "correct": correct, "weight_error": error, "ms": None, "speedup": None, "target": target}
    if correct:
        row["ms"] = seconds[name] * 1e3
        row["speedup"] = seconds[name] / seconds[OURS] if OURS in seconds else None
    return row


def phases(net: nn.Sequential, x: Tensor, y: Tensor, feedback: Tensor, rounds: int) -> dict[str, float]:
    """Median ms of each phase of the wrapped step, and of the bare forward pass: where the wrapper's time goes."""
    plain = copy.deepcopy(net)
    model = dfa.DFA(copy.deepcopy(net), dfa.Feedback.from_matrix(feedback))
    optimizer = dfa.optim.SGD(model, lr=LR)
    output: list[Tensor] = []

    def bare_forward() -> None:
        with torch.no_grad():
            plain(x)

    def forward() -> None:
        optimizer.zero_grad()
        output[:] = [model(x)]

    def backward() -> None:
        F.cross_entropy(output[0], y).backward()

    steps: dict[str, Step] = {
        "forward without DFA": bare_forward,
        "forward": forward,
        "loss and backward": backward,
        "update": optimizer.step,
    }
    seconds = medians(interleaved(steps, rounds, rotate=False))
    return {name: value * 1e3 for name, value in seconds.items()}


def table(cases: list[dict[str, Any]]) -> str:
    """The result for a reader: ms a step, and how many times faster this project's step is."""
    lines = []
    for case in cases:
        lines.append(f"{case['name']}, batch {BATCH}, one training step (median)")
        lines.append(f"  {'variant':<26}{'ms':>9}{'  / ' + OURS:>28}{'target':>9}")
        lines += [f"  {_line(row)}" for row in case["variants"]]
        phases_ms = ", ".join(f"{name} {ms:.2f}" for name, ms in case["phases_ms"].items())
        lines += [f"  phases of the last, ms: {phases_ms}", ""]
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The table of compare.json."""
    cases = result["cases"]
    lines = [f"| one step, ms (and over `{OURS}`) | " + " | ".join(case["name"] for case in cases) + " |"]
    lines.append("|---" * (1 + len(cases)) + "|")
    for rows in zip(*(case["variants"] for case in cases), strict=True):
        cells = [f"{row['ms']:.1f} ({row['speedup']:.2f}×)" if row["correct"] else "wrong result" for row in rows]
        lines.append(f"| {rows[0]['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if not row["correct"]:
        return f"{row['name']:<26}  wrong result (weights off by {row['weight_error']:.2g}): not timed"
    speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
    target = "" if row["target"] is None else f"{row['target']:.2f} {'ok' if row['speedup'] >= row['target'] else 'no'}"
    return f"{row['name']:<26}{row['ms']:>9.2f}{speedup:>28}{target:>9}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.compare", description="One DFA training step beside backpropagation, interleaved."
    )
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each variant (default 60)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--compile", action="store_true", help="also BP under torch.compile")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.json"), help="JSON file, default %(default)s")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.threads < 0:
        parser.error(f"--rounds {options.rounds} --threads {options.threads}: expected at least 1 and 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
