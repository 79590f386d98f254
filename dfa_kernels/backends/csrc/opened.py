"""A library of `csrc/` is opened only if it is whole, and takes the struct that this version fills.

Neither knows anything of Python or torch, so that one build serves every version.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path

from .arguments import ABI_VERSION, Arguments

ELF_HEADER = 64


class LibraryError(RuntimeError):
    """Why there is no library to call."""


def opened(path: Path, compiler: str, functions: Sequence[str]) -> ctypes.CDLL:
    """The library at this path, which this kind of compiler makes, with these functions; LibraryError as for `load`."""
    again = f"build it again: `pip install .` in a checkout of this version, where {compiler} is"
    if not path.exists():
        raise LibraryError(f"no library was built: {path} is not there; install where {compiler} is")
    if not is_whole(path):
        raise LibraryError(f"{path} is not whole, or no library for 64-bit Linux; {again}")
    try:
        made = ctypes.CDLL(str(path))
        version = made.dfa_abi_version()
        if version != ABI_VERSION:
            raise LibraryError(f"{path} has ABI version {version}, expected {ABI_VERSION}; {again}")
        made.dfa_arguments_bytes.restype = ctypes.c_longlong
        size, expected = made.dfa_arguments_bytes(), ctypes.sizeof(Arguments)
        if size != expected:
            raise LibraryError(f"{path} takes {size} bytes of arguments, expected {expected}; {again}")
        for name in (*functions, "dfa_message"):
            getattr(made, name)
        return made
    except (OSError, AttributeError) as failure:
        raise LibraryError(f"{path} cannot be used: {failure}; {again}") from failure


def is_whole(path: Path) -> bool:
    """Whether an ELF file reaches as far as its header says. The loader does not ask, and ends the process instead."""
    with path.open("rb") as file:
        header = file.read(ELF_HEADER)
    if len(header) < ELF_HEADER or header[:5] != b"\x7fELF\x02":
        return False
    (sections,), (entry_size, entries) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size >= int(sections) + int(entry_size) * int(entries)
