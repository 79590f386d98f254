"""Builds the library of CUDA C++ kernels for this GPU, and checks its code for sm_75 as newer GPUs compile it.

Where the driver is told to compile PTX in place of loading machine code, what runs is the way that kernels take on an
RTX 2080 Ti. torch's own kernels cannot run then; the checks launch none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu.processes import ROOT, environment, python, read, step_parser, write
from bench.gpu.sanitizer_checks import CUDA_CHECKS

TURING = 75


def main(argv: list[str] | None = None) -> int:
    options = step_parser(__doc__ or "").parse_args(argv)
    if not torch.cuda.is_available() or (shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ):
        write(options.json, {"built": False})
        print("not built: there is no CUDA device, or no nvcc on the PATH or in CUDA_HOME")
        return 0
    built = build(architectures(*torch.cuda.get_device_capability(0)))
    compiles_ptx = built and torch.cuda.get_device_capability(0) >= (7, 5)
    rows = checked_by_ptx() if compiles_ptx else {}
    write(options.json, {"built": built, "ptx": rows})
    return 0 if built and (not compiles_ptx or all_right(rows)) else 1


def all_right(rows: dict[str, Any]) -> bool:
    """Whether every check ended, and well."""
    return {check.name for check in CUDA_CHECKS} == {name for name, row in rows.items() if row.get("correct")}


def architectures(major: int, minor: int) -> str:
    """For TORCH_CUDA_ARCH_LIST: this GPU's machine code, and sm_75 as PTX if it can compile that."""
    here = 10 * major + minor
    return f"{major}.{minor}" if here < TURING else "7.5+PTX" + ("" if here == TURING else f" {major}.{minor}")


def build(names: str) -> bool:
    """Whether the library was built, where this checkout's package finds it."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "TORCH_CUDA_ARCH_LIST": names})
    return ran.returncode == 0


def checked_by_ptx() -> dict[str, Any]:
    """A row for each check that ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checks.json"
        names = [check.name for check in CUDA_CHECKS]
        command = python("bench.gpu.sanitizer_checks", "--json", str(path), "--checks", *names)
        subprocess.run(command, cwd=ROOT, env={**environment(), "CUDA_FORCE_PTX_JIT": "1"})
        return read(path) or {}


if __name__ == "__main__":
    sys.exit(main())
