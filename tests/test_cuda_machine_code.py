"""csrc's machine code: the library that setup.py builds by nvcc for sm_75, and the kernels by NVRTC 12.9 for sm_70."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nvrtc
import pytest
import triton
from test_cuda_build import LIBRARY, ROOT, build, checkout  # noqa: F401

from dfa_kernels.backends.cuda.library import load

NVCC = shutil.which("nvcc")
TRITONS = [Path(triton.__file__).parent, *sorted((ROOT / ".venv" / "triton").glob("*/triton"))]
"""Each has a disassembler, and not every one of them knows old architectures."""
BY_TENSOR_CORES = ("dfa_strip_float16", "dfa_product_float16")
KERNELS = {"dfa_strip_float32", "dfa_product_float32", "dfa_deltas", "dfa_write", *BY_TENSOR_CORES}


def told(tool: str, *arguments: str | Path) -> str:
    """By the first version of NVIDIA's tool that understands the file."""
    ran = None
    for place in TRITONS:
        command = [place / "backends" / "nvidia" / "bin" / tool, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode == 0 and "not supported" not in ran.stderr:
            return ran.stdout
    assert ran is not None
    raise AssertionError(ran.stderr)


def stacks(binary: Path) -> dict[str, int]:
    """Bytes that each kernel keeps in memory for want of registers, or of an index into them."""
    said = told("cuobjdump", "--dump-resource-usage", binary)
    found = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    return {name: int(stack) + int(local) for name, stack, local in found if "bfloat16" not in name}


def opcodes(listing: str) -> dict[str, set[str]]:
    """The instructions of each kernel."""
    found: dict[str, set[str]] = {}
    for part in re.split(r"(?=\.text\.\w+:|Function : )", listing):
        if name := re.match(r"(?:\.text\.|Function : )(\w+)", part):
            found[name[1]] = set(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part))
    return found


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here")
def test_the_library_for_turing(checkout: Path, tmp_path: Path) -> None:  # noqa: F811
    """Built without a warning, as an install builds it; loaded as the package loads it."""
    home = Path(str(NVCC)).parents[1]
    strict = {"NVCC_APPEND_FLAGS": "-Werror all-warnings", "TORCH_CUDA_ARCH_LIST": "7.5"}
    made, _, _ = build("wheel", checkout, home, **strict)
    path = Path(zipfile.ZipFile(made).extract(LIBRARY, tmp_path))
    assert load(path).architectures == ("sm_75",)
    assert stacks(path) == dict.fromkeys(KERNELS, 0)
    code = opcodes(told("cuobjdump", "--dump-sass", path))
    for kernel in BY_TENSOR_CORES:
        assert {"HMMA.1688.F32", "LDSM.16.MT88.2"} <= code[kernel], "tensor cores, fed from shared memory"
    for kernel in ("dfa_strip_float32", "dfa_product_float32", *BY_TENSOR_CORES):
        assert {"LDG.E.128.SYS", "STS.128", "LDS.U.128"} <= code[kernel], "16 bytes at once"


@pytest.mark.skipif(nvrtc.library() is None, reason="nvidia-cuda-nvrtc-cu12 is not installed")
def test_the_kernels_for_volta(tmp_path: Path) -> None:
    cubin, ptx = nvrtc.compiled('#include "kernels.cuh"\n', "sm_70", ROOT / "csrc")
    assert len(re.findall(r"wmma\.mma\.sync\.aligned\.col\.row\.m16n16k16\.f32\.f32", ptx)) == 16
    path = tmp_path / "kernels.cubin"
    path.write_bytes(cubin)
    if len(TRITONS) == 1:
        pytest.skip("the older disassemblers of `make setup` are not here")
    # For two programs on a multiprocessor ptxas keeps 4 of 64 sums, and of float32 some addresses, in memory.
    most, found = {"dfa_product_float16": 16, "dfa_product_float32": 40}, stacks(path)
    assert found.keys() == KERNELS
    assert all(found[kernel] <= most.get(kernel, 0) for kernel in KERNELS), found
    code = opcodes(told("nvdisasm", "-c", path))
    for kernel in BY_TENSOR_CORES:
        assert "HMMA.884.F32.F32.STEP0" in code[kernel]
