"""The README's tables of what a GPU showed, from `bench/results/<card>`. A result that was wrong has no speed."""

from __future__ import annotations

from typing import Any

from bench.gpu.regions import BACKWARD, BP, BP_GRAPHED, BY_HAND, BY_HAND_GRAPHED, OURS, OURS_GRAPHED, STEP, UPDATE

GRAPHED, EAGER = (BP_GRAPHED, BY_HAND_GRAPHED, OURS_GRAPHED), (BP, BY_HAND, OURS)
REGIONS = {
    "backward": (BACKWARD, GRAPHED),
    "backward + SGD": (UPDATE, GRAPHED),
    "step": (STEP, GRAPHED),
    "step, eager": (STEP, EAGER),
}
BACKPROP = "backprop"


def times(result: dict[str, Any]) -> str:
    """A line a network, of what `bench.gpu` found in its times; a cell of three variants for every region."""
    cases = {name: made["regions"] for name, made in result["time"]["items"].items() if "regions" in made}
    rows = [
        [name, *(_microseconds(regions[region], variants) for region, variants in REGIONS.values())]
        for name, regions in cases.items()
    ]
    return table(["µs: BP / by hand / `dfa`", *REGIONS], rows)


def _microseconds(rows: dict[str, Any], variants: tuple[str, ...]) -> str:
    found = [rows[variant] for variant in variants]
    return " / ".join(f"{row['seconds'] * 1e6:,.0f}" if row["correct"] else "wrong" for row in found)


def vgg_step(result: dict[str, Any]) -> str:
    """A line a form of the feedback; time and peak memory in both precisions, beside backpropagation's time."""
    found = {(row["feedback"], row["precision"]): row for row in result["rows"]}
    precisions = list(dict.fromkeys(precision for _, precision in found))
    rows = []
    for form in dict.fromkeys(form for form, _ in found):
        cells = [form, f"{found[form, precisions[0]]['kept_bytes'] / 1e9:.2f} GB"]
        for precision in precisions:
            row = found[form, precision]
            ratio = found[BACKPROP, precision]["ms"] / row["ms"]
            cells += [f"{row['ms']:.1f} ({ratio:.2f}×)", f"{row['peak_bytes'] / 1e9:.1f} GB"]
        rows.append(cells)
    return table(["feedback", "kept", *(f"{p}{what}" for p in precisions for what in (", ms", ", peak"))], rows)


def projection(result: dict[str, Any]) -> str:
    """A line a function, a column a form of the feedback; a cell of both precisions."""
    functions = {"e @ U.T": "`e @ U.T`", "project_taps": "one launch", "Feedback.project": "`Feedback.project`"}
    found = {(row["function"], row["feedback"], row["precision"]): _milliseconds(row) for row in result["rows"]}
    forms = list(dict.fromkeys(form for _, form, _ in found))
    rows = []
    for function, name in functions.items():
        both = ((found.get((function, form, precision), "–") for precision in ("tf32", "float32")) for form in forms)
        rows.append([name, *map(" / ".join, both)])
    return table(["ms: tf32 / float32", *forms], rows)


def _milliseconds(row: dict[str, Any]) -> str:
    if not row["correct"]:
        return "wrong"
    return f"{row['ms']:,.{2 if row['ms'] < 10 else 0}f}" if "ms" in row else "–"


def hadamard(result: dict[str, Any]) -> str:
    """The share of a clone's bandwidth, a line a type and a column a length."""
    found = {(row["dtype"], row["n"]): f"{row['part']:.0%}" if row["correct"] else "wrong" for row in result["rows"]}
    dtypes, lengths = (list(dict.fromkeys(column)) for column in zip(*found, strict=True))
    rows = [[f"`hadamard_transform`, {dtype}", *(found[dtype, n] for n in lengths)] for dtype in dtypes]
    return table(["share of a clone's bandwidth, n =", *map(str, lengths)], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lines of cells as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
