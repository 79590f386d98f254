"""The JSON files by which a step tells its results: whole at any time, also when the step is ended in the middle."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any


def write(path: Path, content: Any) -> None:
    """Takes the place of the file at once."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def read(path: Path) -> Any:
    """The content, or None if there is none yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def plain(value: Any) -> Any:
    """The value, with strings for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def step_parser(description: str) -> argparse.ArgumentParser:
    """The options that every step takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds it may take")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    return parser
