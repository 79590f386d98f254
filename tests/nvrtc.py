"""NVIDIA's runtime compiler, from the package index: 12.9 is the last that makes code for V100."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path


@cache
def library() -> ctypes.CDLL | None:
    """The compiler of the package nvidia-cuda-nvrtc-cu12, if it is installed."""
    try:
        found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        return None
    places = list(found.submodule_search_locations or []) if found else []
    paths = [path for place in places for path in Path(place).glob("lib/libnvrtc.so.*")]
    return ctypes.CDLL(str(paths[0])) if paths else None


def compiled(source: str, architecture: str, include: Path) -> tuple[bytes, str]:
    """Machine code and PTX of this CUDA C++; RuntimeError with the compiler's log if it says anything."""
    nvrtc = library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}", "-std=c++17", f"-I{include}"]
    given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), given)
    log = _taken(nvrtc, program, "ProgramLog").decode()
    # That sm_70 will not be known for ever it always says.
    if status or [line for line in log.splitlines() if line.strip("\0 ") and "are deprecated" not in line]:
        raise RuntimeError(log)
    return _taken(nvrtc, program, "CUBIN"), _taken(nvrtc, program, "PTX").decode()


def _taken(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    memory = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, memory)
    return memory.raw.rstrip(b"\0") if what != "CUBIN" else memory.raw
