"""Running a program under every version of Triton that is promised to work, in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PINNED = re.findall(r"^triton==([\w.]+)", (ROOT / "requirements-triton.txt").read_text(), re.MULTILINE)
INSTALLED = "installed"
OWN_VENV = Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()
# Where rare cases are compiled as well; another version rarely changes those alone.
THOROUGH = PINNED[0] if OWN_VENV else INSTALLED
NO_VENV = pytest.mark.skip(reason="not in the .venv of `make setup`, which alone has this version of Triton")


def every_version() -> list[Any]:
    """Parameters of a test: the pinned versions, each kept beside the installed one, and that."""
    return [*(pytest.param(version, marks=() if OWN_VENV else NO_VENV) for version in PINNED), INSTALLED]


def output_under(version: str, program: str, *arguments: str) -> str:
    """What a program (a path from tests/) prints with this version of Triton, a cache of its own and real kernels."""
    folders = [ROOT, ROOT / "tests"]
    if version != INSTALLED:
        folders.insert(0, ROOT / ".venv" / "triton" / version)
    for folder in folders:
        assert folder.is_dir(), f"{folder} is missing, expected Triton {version} there: run `make setup`"
    command = [sys.executable, str(ROOT / "tests" / program), *arguments]
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": cache,
            "TRITON_DISABLE_LINE_INFO": "1",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}"
    return done.stdout
