"""The library of kernels: where it is, whether it is the right one, and which GPUs it has code for.

`setup.py` builds it where it finds nvcc. It knows nothing of Python or torch, so that one build serves every version.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..csrc.arguments import Arguments
from ..csrc.opened import LibraryError, opened

PATH = Path(__file__).with_name("libdfa_kernels.so")
HOST = "host"
"""In place of its architectures, a library says that it runs the kernels on the CPU: a host compiler made it."""


@dataclass(frozen=True)
class Library:
    """The functions, their types declared; see `csrc/library.cu`."""

    path: Path
    architectures: tuple[str, ...]
    """"sm_75" for machine code, "compute_75" for PTX, which newer GPUs' drivers compile when it is first used."""
    strip_bytes: Any
    _run: Any
    _write_numbers: Any
    _message: Any

    @property
    def on_host(self) -> bool:
        return self.architectures == (HOST,)

    def has_code_for(self, capability: int) -> bool:
        """Machine code runs on later minor versions of its architecture, PTX on every later one."""
        for name in self.architectures:
            kind, _, number = name.partition("_")
            of = int(number) if number else capability
            if of <= capability and (kind != "sm" or of // 10 == capability // 10):
                return True
        return False

    def run(self, arguments: Arguments, device: int, stream: int) -> None:
        """The launches of a task, on this stream of the device, which is the current one."""
        if self._run(ctypes.byref(arguments), device, stream):
            self._fail()

    def write_numbers(self, to: int, numbers: Any, device: int, stream: int) -> None:
        """Floats of the host to the device's memory at this address."""
        if self._write_numbers(to, numbers, len(numbers), device, stream):
            self._fail()

    def _fail(self) -> None:
        raise RuntimeError(f"dfa_kernels' CUDA library: {self._message().decode(errors='replace')}")


def load(path: Path) -> Library:
    """The library at this path.

    Raises:
        LibraryError: it is not there, cannot be loaded, or is of another version.
    """
    return _declared(path, opened(path, "nvcc", _FUNCTIONS))


_FUNCTIONS = ("dfa_architectures", "dfa_run", "dfa_strip_bytes", "dfa_write_numbers")


def _declared(path: Path, made: ctypes.CDLL) -> Library:
    pointer = ctypes.c_void_p
    made.dfa_architectures.restype = made.dfa_message.restype = ctypes.c_char_p
    made.dfa_run.argtypes, made.dfa_run.restype = [ctypes.POINTER(Arguments), ctypes.c_int, pointer], ctypes.c_int
    made.dfa_strip_bytes.argtypes, made.dfa_strip_bytes.restype = [ctypes.POINTER(Arguments)], ctypes.c_longlong
    made.dfa_write_numbers.argtypes = [pointer, ctypes.POINTER(ctypes.c_float), ctypes.c_int, ctypes.c_int, pointer]
    made.dfa_write_numbers.restype = ctypes.c_int
    architectures = made.dfa_architectures().decode().split("+")
    return Library(
        path, tuple(architectures), made.dfa_strip_bytes, made.dfa_run, made.dfa_write_numbers, made.dfa_message
    )


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


def why_not(capability: int | None = None) -> str:
    """Why there are no kernels, or none for GPUs of this compute capability (75 for sm_75); empty if there are."""
    found = installed()
    if isinstance(found, LibraryError):
        return str(found)
    if capability is None or found.has_code_for(capability):
        return ""
    return (
        f"{found.path} has code for {', '.join(found.architectures)}, none of which runs on sm_{capability}; build it "
        "by an nvcc that knows this architecture (CUDA 12.9 is the last that knows sm_70)"
    )


def describe_library() -> str:
    """The library, and what it has code for; or why it cannot be used."""
    return why_not() or f"{library().path}, {', '.join(library().architectures)}"
