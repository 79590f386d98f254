"""`csrc/cpu.cpp` as this checkout has it, whatever is installed."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

from cuda_host import ROOT, compiled

from dfa_kernels.backends.cpu import library, operators, plan
from dfa_kernels.backends.cpu.library import Library
from dfa_kernels.backends.csrc.opened import LibraryError


@cache
def flags() -> tuple[str, ...]:
    """Those that an installation compiles it with, and every warning is an error."""
    with mock.patch("setuptools.setup"):
        return (*runpy.run_path(str(ROOT / "setup.py"))["CPU_FLAGS"], "-Wall", "-Wextra", "-Werror")


@cache
def fresh_library(*more: str) -> Library:
    return library.load(compiled(ROOT / "csrc" / "cpu.cpp", (*flags(), *more)))


@contextmanager
def installed(
    found: Library | LibraryError, most: int = plan.MOST_PRODUCTS, stored: int = plan.MOST_STORED
) -> Iterator[None]:
    """This is the library, or why there is none; most products for each layer, and entries of a stored U, in a call."""
    operators.forget_plans()
    with (
        mock.patch.object(library, "installed", lambda: found),
        mock.patch.multiple(plan, MOST_PRODUCTS=most, MOST_STORED=stored),
    ):
        yield
    operators.forget_plans()
