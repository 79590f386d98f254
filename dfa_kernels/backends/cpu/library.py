"""The library for CPUs, which `setup.py` builds where it finds a C++ compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..csrc.arguments import Arguments
from ..csrc.opened import LibraryError, opened

PATH = Path(__file__).with_name("libdfa_cpu.so")


@dataclass(frozen=True)
class Library:
    """The functions, their types declared; see `csrc/cpu.cpp`."""

    path: Path
    _run: Any
    _message: Any

    def bound(self, arguments: Arguments, places: Any) -> Callable[[bytes], None]:
        """A call with these arguments, that takes as many addresses as there are places for them."""
        run, given, count = self._run, ctypes.byref(arguments), len(places)

        def call(addresses: bytes) -> None:
            if run(given, addresses, places, count):
                raise RuntimeError(f"dfa_kernels' CPU library: {self._message().decode(errors='replace')}")

        return call


def load(path: Path) -> Library:
    """The library at this path; LibraryError as for that of CUDA."""
    made = opened(path, "a C++ compiler for Linux", ("dfa_run_small",))
    made.dfa_message.restype = ctypes.c_char_p
    made.dfa_run_small.argtypes = [
        ctypes.POINTER(Arguments),
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_int,
    ]
    made.dfa_run_small.restype = ctypes.c_int
    return Library(path, made.dfa_run_small, made.dfa_message)


@cache
def installed() -> Library | LibraryError:
    """The library beside this file, loaded once, or why it cannot be used."""
    try:
        return load(PATH)
    except LibraryError as error:
        return error


def library() -> Library:
    """The library.

    Raises:
        LibraryError: there is none.
    """
    found = installed()
    if isinstance(found, LibraryError):
        raise found
    return found


def why_not() -> str:
    """Why the library cannot be used; empty if it can."""
    found = installed()
    return str(found) if isinstance(found, LibraryError) else ""


def describe_library() -> str:
    """The library, or why it cannot be used."""
    return why_not() or str(library().path)
