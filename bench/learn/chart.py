"""The curves of a run as a PNG: accuracy over the epochs, and alignment of each layer over the epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLORS = {"dfa": "tab:blue", "bp": "tab:orange"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the curves of `result`, the content of run.json, to `path`."""
    figure = Figure(figsize=(12.5, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, result["history"])
    draw_alignment(right, result["history"].get("dfa", []))
    figure.suptitle(title(result))
    figure.savefig(path, format="png")


def title(result: dict[str, Any]) -> str:
    options = result["options"]
    text = f"{options['data']}, {options['network']}, {options['activation']}, {options['feedback']} feedback"
    return text + (" (interrupted)" if result["interrupted"] else "")


def draw_accuracy(axes: Axes, histories: dict[str, list[dict[str, Any]]]) -> None:
    """Train (dashed) and test (solid) accuracy of every rule."""
    for rule, history in histories.items():
        epochs = [entry["epoch"] for entry in history]
        for part, style in (("test", "-"), ("train", "--")):
            values = [entry[f"{part}_accuracy"] for entry in history]
            label = f"{rule.upper()}, {part}"
            axes.plot(epochs, values, style, color=COLORS[rule], marker="o", markersize=3, label=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    finish(axes, "Accuracy", "accuracy")


def draw_alignment(axes: Axes, history: list[dict[str, Any]]) -> None:
    """Mean alignment of every layer, with a band of a standard deviation to either side."""
    epochs = [entry["epoch"] for entry in history]
    for name in history[-1]["alignment"] if history else ():
        means = [entry["alignment"][name]["mean"] for entry in history]
        stds = [entry["alignment"][name]["std"] for entry in history]
        (line,) = axes.plot(epochs, means, marker="o", markersize=3, label=name)
        low = [mean - std for mean, std in zip(means, stds, strict=True)]
        high = [mean + std for mean, std in zip(means, stds, strict=True)]
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    finish(axes, "Alignment of DFA with BP (mean ± std)", "cosine similarity")


def finish(axes: Axes, heading: str, quantity: str) -> None:
    axes.set_title(heading)
    axes.set_xlabel("epoch")
    axes.set_ylabel(quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    else:
        axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", transform=axes.transAxes)
