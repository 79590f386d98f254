"""One whole training step of VGG-16 at 224 x 224 with 1000 classes: peak memory and time by the form of the feedback.

    python -m bench.cpu.vgg16_memory [--batch 2] [--limit-gb 12] [--out bench/results/cpu/vgg_step.json]
    python -m bench.cpu.vgg16_memory --device cuda --batch 32 --out bench/results/gpu/vgg_step.json

Every form runs in a process of its own, after its gradients of a narrower VGG were compared with those of a matrix
per layer, written out. A form whose feedback alone is larger than the limit is not run; the file says what it needs.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfa_kernels as dfa
from bench import environment
from bench.cpu.large_networks import vgg16

CLASSES, SIDE = 1000, 224
LR = 1e-2


@dataclass(frozen=True)
class Form:
    """How the feedback is kept; naive: a matrix per layer, in plain torch."""

    name: str
    kind: str
    storage: str

    @property
    def naive(self) -> bool:
        return self.name == "naive"

    def feedback(self, **options: Any) -> dfa.Feedback:
        return dfa.Feedback(self.kind, self.storage, **options)


FORMS = (
    Form("naive", "gaussian", "dense"),
    Form("unified", "gaussian", "dense"),
    Form("fastfood, dense", "fastfood", "dense"),
    Form("fastfood, procedural", "fastfood", "procedural"),
    Form("rademacher, procedural", "rademacher", "procedural"),
    Form("gaussian, procedural", "gaussian", "procedural"),
)


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    limit = _limit_bytes(options)
    rows = []
    for form in FORMS:
        if options.forms and form.name not in options.forms:
            continue
        rows.append(_measured_apart(form, options.device, options.batch, options.steps, limit))
        print(line(rows[-1]), flush=True)
    result = {
        "environment": environment.describe(),
        "device": options.device,
        "batch": options.batch,
        "limit_bytes": limit,
        "memory": "peak of torch's allocations" if options.device == "cuda" else "peak resident set of the process",
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row.get("correct", True) for row in rows) else 1


def _measured_apart(form: Form, device: str, batch: int, steps: int, limit: int) -> dict[str, Any]:
    """`measure` in a fresh process: the peak of resident memory never falls."""
    kept = feedback_bytes(form)
    row: dict[str, Any] = {"form": form.name, "computed_feedback_bytes": kept}
    if kept > limit:
        return {**row, "fails": f"needs {kept / 1e9:.2f} GB for feedback alone, the limit is {limit / 1e9:.2f} GB"}
    with get_context("spawn").Pool(1) as process:
        return {**row, **process.apply(measure, (form, device, batch, steps))}


def feedback_bytes(form: Form) -> int:
    """What the form keeps between steps, counted on the meta device."""
    with torch.device("meta"):
        model = dfa.DFA(vgg16(CLASSES, SIDE), dfa.Feedback(storage="procedural"))
        model(torch.zeros(1, 3, SIDE, SIDE))
    if form.naive:
        return dfa.feedback_memory(model, CLASSES)["naive"]
    return form.feedback().nbytes(max(tap.size for tap in model.taps), CLASSES)


def measure(form: Form, device: str, batch: int, steps: int) -> dict[str, Any]:
    """Checks the form on a narrower VGG, then takes steps on the whole one."""
    found, allowed = deviation(form, device)
    if found > allowed:
        return {"correct": False, "deviation": found, "allowed_deviation": allowed}
    checked = {"correct": True, "deviation": found, "allowed_deviation": allowed}
    try:
        return checked | _time_steps(form, device, batch, steps)
    except torch.OutOfMemoryError as error:
        return checked | {"fails": str(error).partition("\n")[0]}


def _time_steps(form: Form, device: str, batch: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = vgg16(CLASSES, SIDE).to(device)
    x, y = torch.randn(batch, 3, SIDE, SIDE, device=device), torch.randint(CLASSES, (batch,), device=device)
    before = _peak_bytes(device)
    gradients = gradient_maker(form, net)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    seconds, losses = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = gradients(x, y)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return {
        "first_step_seconds": seconds[0],
        "step_seconds": min(seconds[1:], default=None),
        "losses": losses,
        "peak_bytes": _peak_bytes(device),
        "peak_before_first_step_bytes": before,
        "parameter_bytes": sum(p.nbytes for p in net.parameters()),
    }


def gradient_maker(form: Form, net: nn.Sequential, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, y) → the loss, with the gradients left in .grad; options: of the feedback."""
    if form.naive:
        return naive_gradients(net, lambda i, size, like: _own_matrix(i, size, like, options))
    model = dfa.DFA(net, form.feedback(**options), backend="torch" if _on_cpu(net) else "auto")

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return gradients


def _on_cpu(net: nn.Module) -> bool:
    return next(net.parameters()).device.type == "cpu"


def _own_matrix(layer: int, size: int, like: Tensor, options: dict[str, Any]) -> Tensor:
    feedback = dfa.Feedback(**{"seed": layer, "dtype": like.dtype, **options})
    return feedback.matrix(size, like.shape[1], device=like.device)


def naive_gradients(
    net: nn.Sequential, matrix: Callable[[int, int, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """DFA in plain torch, with a matrix B_i [l_i, E] kept per layer: cut after every ReLU, each segment on its own.

    matrix: (layer, l_i, the error [b, E]) → B_i.
    """
    kept: dict[int, Tensor] = {}

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        h, ends = x, []
        for module in net:
            h = module(h)
            if isinstance(module, nn.ReLU):
                ends.append(h)
                h = h.detach()
        loss = F.cross_entropy(h, y)
        (error,) = torch.autograd.grad(loss, h, retain_graph=True)
        for i, end in enumerate(ends):
            if i not in kept:
                kept[i] = matrix(i, end[0].numel(), error)
        deltas = [(error @ kept[i].T).view_as(end) for i, end in enumerate(ends)]
        torch.autograd.backward([*ends, h], [*deltas, error])
        return loss.detach()

    return gradients


def deviation(form: Form, device: str) -> tuple[float, float]:
    """Largest deviation of a narrower VGG's gradients from float64 and explicit matrices, relative to each
    gradient's size, and twice that of float32 with explicit matrices."""
    torch.manual_seed(0)
    net = vgg16(20, 64, 16).eval().to(device)
    x, y = torch.randn(4, 3, 64, 64, device=device), torch.randint(20, (4,), device=device)
    explicit = dfa.Feedback(form.kind, seed=1)

    def matrix(layer: int, size: int, error: Tensor) -> Tensor:
        return explicit.matrix(size, error.shape[1], device=error.device).to(error.dtype)

    def by_hand(dtype: torch.dtype) -> list[Tensor]:
        own = copy.deepcopy(net).to(dtype)
        naive_gradients(own, matrix)(x.to(dtype), y)
        return _gradients(own)

    exact, plain = by_hand(torch.float64), by_hand(torch.float32)
    gradient_maker(form, net, seed=1)(x, y)
    return _largest_ratio(_gradients(net), exact), 2 * _largest_ratio(plain, exact) + 1e-6


def _gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def _largest_ratio(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    ratios = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
    return max(ratio.item() for ratio in ratios)


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_bytes(options: argparse.Namespace) -> int:
    if options.limit_gb is not None:
        return int(options.limit_gb * 1e9)
    return torch.cuda.get_device_properties(0).total_memory if options.device == "cuda" else 12 * 10**9


def line(row: dict[str, Any]) -> str:
    """The row for a reader."""
    if "fails" in row:
        return f"{row['form']:<24}{row['fails']}"
    if not row["correct"]:
        return f"{row['form']:<24}wrong gradients (off by {row['deviation']:.1e}): not timed"
    later = "" if row["step_seconds"] is None else f", then {row['step_seconds']:.2f} s a step"
    return (
        f"{row['form']:<24}peak {row['peak_bytes'] / 1e9:.2f} GB ({row['peak_before_first_step_bytes'] / 1e9:.2f} "
        f"before), first step {row['first_step_seconds']:.2f} s{later}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The table of vgg_step.json."""
    lines = ["| feedback | kept | peak of the whole step | s a step |", "|---|---|---|---|"]
    for row in result["rows"]:
        kept = f"{row['computed_feedback_bytes'] / 1e9:.2f} GB"
        if "fails" in row or not row["correct"]:
            outcome = f"{row.get('fails', 'wrong gradients: not timed')} | "
        else:
            outcome = f"{row['peak_bytes'] / 1e9:.2f} GB | {row['step_seconds']:.1f}"
        lines.append(f"| {row['form']} | {kept} | {outcome} |")
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.vgg16_memory", description="A training step of VGG-16 by DFA: time and peak memory."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit-gb", type=float, help="do not run larger feedback (CPU: 12, GPU: its memory)")
    parser.add_argument("--forms", nargs="*", help=f"of {', '.join(repr(form.name) for form in FORMS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/vgg_step.json"), help="default %(default)s")
    options = parser.parse_args(argv)
    if options.batch < 1 or options.steps < 1:
        parser.error(f"--batch {options.batch} --steps {options.steps}: expected at least 1")
    unknown = set(options.forms or ()) - {form.name for form in FORMS}
    if unknown:
        parser.error(f"--forms: unknown {sorted(unknown)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
