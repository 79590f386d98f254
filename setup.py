"""Builds the libraries of `csrc` where there is a compiler for them; everything else is declared in pyproject.toml.

The CPU's library, on Linux, takes a C++ compiler: CXX names it, with CXXFLAGS and LDFLAGS; without it, c++, g++ or
clang++ on the PATH is taken, and if it fails the library is left out.

The library of CUDA C++ kernels takes an nvcc: CUDA_HOME names the toolkit; without it, nvcc is looked for on the PATH.
TORCH_CUDA_ARCH_LIST ("7.5 8.6+PTX") names the architectures, as for torch's own extensions. Without it a wheel gets
code for every GPU from V100 on that this nvcc knows, and an editable install for the GPUs of this machine.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
CUDA_LIBRARY, CPU_LIBRARY = "dfa_kernels.backends.cuda.libdfa_kernels", "dfa_kernels.backends.cpu.libdfa_cpu"
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
OLDEST = 70
"""The first with tensor cores."""
FLAGS = ("-std=c++17", "-O3", "--threads=0", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden")
# Sums are to have the same bits on every processor; nobody asks what a root or an exception left behind.
CPU_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
             "-fvisibility=hidden")  # fmt: skip


def find_nvcc() -> str | None:
    """Of CUDA_HOME alone where that is set, so that one without nvcc means none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")


def known_to(nvcc: str) -> list[int]:
    """Those of ARCHITECTURES that this nvcc compiles for."""
    told = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [number for number in ARCHITECTURES if f"sm_{number}" in told.split()]


def asked_for() -> list[str]:
    """The names that TORCH_CUDA_ARCH_LIST means: "sm_75" for machine code, "compute_75" for PTX; none too old."""
    names: list[str] = []
    for item in os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {item!r}, expected numbers as in '7.5 8.6+PTX'")
        major, minor, variant, ptx = match.groups()
        if int(major) * 10 + int(minor) >= OLDEST:
            names += [f"sm_{major}{minor}{variant}"] + [f"compute_{major}{minor}{variant}"] * bool(ptx)
    return names


def all_of(numbers: list[int]) -> list[str]:
    """Machine code for each, and PTX of the lowest and of 80, which is that of the highest, for GPUs to come."""
    return [f"sm_{number}" for number in numbers] + [f"compute_{n}" for n in sorted({numbers[0], min(80, numbers[-1])})]


def gpus_here() -> list[int]:
    """Architectures of this machine's GPUs."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({int(line.replace(".", "")) for line in told.split() if re.fullmatch(r"\d+\.\d", line)})


def architectures(nvcc: str | None, editable: bool) -> tuple[list[str], str]:
    """What the library gets code for, or why none is built."""
    if sys.platform != "linux" or nvcc is None:
        return [], "no nvcc was found, in CUDA_HOME or on the PATH"
    if names := asked_for():
        return names, ""
    if not editable:
        return all_of(known_to(nvcc)), ""
    names = [f"sm_{number}" for number in gpus_here() if number >= OLDEST]
    return names, "" if names else "an editable install builds for this machine's GPUs, and none was found"


def front_end(name: str) -> str:
    """The architecture that the source is read for: from 80 on that makes no difference, and it is half of the time."""
    number = name.partition("_")[2]
    return number if name.startswith("compute") or int(number.rstrip("af")) < 80 else "80"


def words(name: str) -> list[str]:
    """The environment variable's, as a shell reads them."""
    given = os.environ.get(name, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise SystemExit(f"{name}: got {given!r}, expected words as in a shell: {error}") from error


def find_cxx() -> tuple[list[str], str]:
    """The C++ compiler's command, or why there is none. Of CXX alone where that is set."""
    if sys.platform != "linux":
        return [], "it is for Linux"
    given = words("CXX")
    if "CXX" in os.environ:
        found = shutil.which(given[0]) if given else None
        return ([found, *given[1:]], "") if found else ([], f"CXX is {os.environ['CXX']!r}, which names no program")
    found = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
    return ([found], "") if found else ([], "none of c++, g++ and clang++ was found")


def cpu_command(cxx: list[str], library: str) -> list[str]:
    """The C++ compiler's command line."""
    return [*cxx, *words("CXXFLAGS"), *CPU_FLAGS, str(SOURCES / "cpu.cpp"), "-o", library, *words("LDFLAGS")]


def cuda_command(nvcc: str, names: list[str], library: str) -> list[str]:
    """nvcc's command line."""
    codes = [f"-gencode=arch=compute_{front_end(name)},code={name}" for name in names]
    return [nvcc, *FLAGS, *codes, f"-DDFA_ARCHITECTURES={'+'.join(names)}", str(SOURCES / "library.cu"), "-o", library]


def is_editable() -> bool:
    return not {"editable_wheel", "develop"}.isdisjoint(sys.argv)


NVCC, (CXX, WHY_NO_CXX) = find_nvcc(), find_cxx()
NAMES, WHY_NOT = architectures(NVCC, is_editable())


class SaysWhatIsBuilt(build_py):
    """In one line each, whether the libraries are part of it."""

    def run(self) -> None:
        print(f"C++ for small networks on a CPU: {f'by {shlex.join(CXX)}' if CXX else 'left out: ' + WHY_NO_CXX}")
        print(f"CUDA C++ kernels: {f'by {NVCC} for ' + ', '.join(NAMES) if NAMES else 'left out: ' + WHY_NOT}")
        super().run()


class BuildsLibraries(build_ext):
    """None of them is a module of Python: their names have no version of Python in them."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CPU_LIBRARY:
            run(cpu_command(CXX, str(target)), "the CPU's library, set CXX to the name of no program")
        else:
            assert NVCC is not None
            run(cuda_command(NVCC, NAMES, str(target)), "the CUDA C++ kernels, set CUDA_HOME to a folder without nvcc")


def run(command: list[str], way_out: str) -> None:
    """Runs a compiler; CompileError with how to do without what it was to make."""
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(
            f"{command[0]} ended with status {error.returncode}; its messages are above. To install without {way_out}"
        ) from error


# Nobody has asked for a compiler that only was there, so one that fails is no reason not to install.
EXTENSIONS = [Extension(CPU_LIBRARY, ["csrc/cpu.cpp"], optional="CXX" not in os.environ)] * bool(CXX)
EXTENSIONS += [Extension(CUDA_LIBRARY, ["csrc/library.cu"])] * bool(NAMES)


class ServesEveryPython(bdist_wheel):
    """The libraries do not depend on Python's version, so neither does the wheel."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if EXTENSIONS else (python, abi, platform)


setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": SaysWhatIsBuilt, "build_ext": BuildsLibraries, "bdist_wheel": ServesEveryPython},
)
