"""`csrc` without a GPU: a host compiler makes the library, which then runs its kernels thread by thread on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from dfa_kernels.backends.cuda import library, operators, plan
from dfa_kernels.backends.cuda.library import Library

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
CACHE = ROOT / ".pytest_cache" / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
# Floating point by the letter: a fused multiply-add would not round as the definition of U does.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-shared")

needs_a_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")


def compiled(source: Path, flags: Sequence[str] = FLAGS) -> Path:
    """The library that a host compiler makes of this C++: made once, and kept while nothing changes."""
    read = [path.read_bytes() for path in (source, *sorted(SOURCES.glob("*.*h")), *sorted(SOURCES.glob("*.cu")))]
    digest = hashlib.sha256(b"\0".join([*read, repr(flags).encode()])).hexdigest()[:16]
    made = CACHE / f"{source.stem}-{digest}.so"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        subprocess.run([str(COMPILER), *flags, "-fPIC", str(source), "-o", str(part)], check=True)
        part.replace(made)
    return made


@cache
def host_library() -> tuple[Library, ctypes.CDLL]:
    """The library as the package loads it, and with what is there for tests alone."""
    path = compiled(ROOT / "tests" / "cuda_host.cpp")
    return library.load(path), ctypes.CDLL(str(path))


@contextmanager
def on_host(task: str = "", backwards: bool = False, multiprocessors: int = 4) -> Iterator[list[str]]:
    """The backend runs on the CPU. Every layers' call by this task, if one is named; the tasks that ran.

    backwards: the threads of a block run in the opposite order between barriers.
    """
    found, raw = host_library()
    ran: list[str] = []

    def run(arguments: Any, device: int, stream: int) -> int:
        ran.append(plan_names[arguments._obj.task])
        return int(found._run(arguments, device, stream))

    plan_names = {number: name for name, number in plan.TASKS.items()}
    # Without shared memory no strip fits; with all the memory that there is, all do.
    shared = {"wide": 0, "strip": 2**30}.get(task, operators.EMULATED.shared)
    target = operators.EMULATED._replace(multiprocessors=multiprocessors, shared=shared)
    largest = plan.LARGEST_STRIP_ERROR if task != "strip" else 2**30
    operators.forget_plans()
    raw.test_order(backwards)
    with (
        mock.patch.object(library, "installed", lambda: replace(found, _run=run)),
        mock.patch.object(operators, "target_of", lambda device: target),
        mock.patch.object(plan, "LARGEST_STRIP_ERROR", largest),
    ):
        yield ran
    raw.test_order(False)
    operators.forget_plans()


def floats(tensor: Tensor) -> Any:
    """A contiguous float32 tensor as C takes it."""
    assert tensor.is_contiguous()
    return ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))
