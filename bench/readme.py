"""The tables of README.md and bench/results/README.md, written from the committed results and never by hand.

    python -m bench.readme

Each stands between <!-- name --> and <!-- /name -->.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cpu import compare, feedback_memory, projection, vgg16_memory
from bench.gpu import tables
from bench.learn import kinds

ROOT = Path(__file__).resolve().parents[1]
# The name of a table's marks is that of its result file.
PAGES = ("README.md", "bench/results/README.md")
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu/compare": compare.markdown,
    "cpu/kinds": kinds.markdown,
    "cpu/projection": projection.markdown,
    "cpu/memory": feedback_memory.markdown,
    "cpu/vgg_step": vgg16_memory.markdown,
    "h200/times": tables.times,
    "h200/vgg_step": tables.vgg_step,
    "h200/projection": tables.projection,
    "h200/hadamard": tables.hadamard,
}


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description="Write the tables of the pages from the results.").parse_args(argv)
    for page in PAGES:
        (ROOT / page).write_text(with_tables((ROOT / page).read_text(), ROOT / "bench" / "results"))
    return 0


def with_tables(text: str, results: Path) -> str:
    """The text with every table that it has the marks of made anew from the results in this folder."""
    for name, markdown in TABLES.items():
        if f"<!-- {name} -->" in text:
            text = with_table(text, name, markdown(json.loads((results / f"{name}.json").read_text())))
    return text


def with_table(text: str, name: str, table: str) -> str:
    """The text with this table between the marks; ValueError if they are not there once and in order."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end or begin in rest or end in after:
        raise ValueError(f"expected {begin} and then {end}, once each")
    return f"{before}{begin}\n{table}\n{end}{after}"


if __name__ == "__main__":
    sys.exit(main())
