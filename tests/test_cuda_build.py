"""Installing: where there is a compiler for it a library is built and packed, where there is none the rest is.

Most of it by an nvcc that only writes down what it was asked for, and by no other compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from cuda_host import COMPILER, needs_a_compiler

from dfa_kernels.backends.cpu.library import load

ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "dfa_kernels", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")
BACKEND = "dfa_kernels/backends/cuda"
LIBRARY, CPU_LIBRARY = f"{BACKEND}/libdfa_kernels.so", "dfa_kernels/backends/cpu/libdfa_cpu.so"
KNOWN = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)

NVCC = f"""#!/bin/sh
if [ "$1" = --list-gpu-code ]; then
  echo {" ".join(f"sm_{number}" for number in KNOWN)} | tr ' ' '\\n'
  exit
fi
echo "$@" > "$ASKED"
for argument; do made=$argument; done
echo a library > "$made"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a package is made of."""
    there = tmp_path / "checkout"
    there.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(ROOT / name, there / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, there / name)
    return there


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    program(tmp_path / "toolkit" / "bin" / "nvcc", NVCC)
    return tmp_path / "toolkit"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def build(
    what: str, checkout: Path, home: Path, path: str | None = None, **environment: str | None
) -> tuple[Path, str, str]:
    """What setuptools makes ("wheel", "editable", "sdist") when pip asks; what was said; what nvcc was asked.

    None takes a variable out of the environment.
    """
    asked, out = checkout.parent / "asked.txt", checkout.parent / "out"
    asked.unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print('made', build_meta.build_{what}({str(out)!r}))"
    kept = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    given = {**kept, "CUDA_HOME": str(home), "ASKED": str(asked), "PATH": path or os.environ["PATH"], "CXX": "none"}
    given = {name: value for name, value in (given | environment).items() if value is not None}
    ran = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    name = next(line for line in ran.stdout.splitlines() if line.startswith("made ")).split()[1]
    return out / name, ran.stdout + ran.stderr, asked.read_text() if asked.exists() else ""


def codes(asked: str) -> list[str]:
    """ "75:sm_75" for each kind of code that nvcc was asked for."""
    return [
        word.removeprefix("-gencode=arch=compute_").replace(",code=", ":")
        for word in asked.split()
        if word.startswith("-gencode")
    ]


def test_without_compilers(checkout: Path, tmp_path: Path) -> None:
    made, said, _ = build("wheel", checkout, tmp_path)
    assert made.name.endswith("-py3-none-any.whl")
    assert "C++ for small networks on a CPU: left out: CXX is 'none', which names no program" in said.splitlines()
    assert "CUDA C++ kernels: left out: no nvcc was found, in CUDA_HOME or on the PATH" in said.splitlines()
    names = zipfile.ZipFile(made).namelist()
    assert f"{BACKEND}/library.py" in names
    assert LIBRARY not in names and CPU_LIBRARY not in names


@needs_a_compiler
@pytest.mark.parametrize("what", ["wheel", "editable"])
def test_with_a_cpp_compiler(checkout: Path, tmp_path: Path, what: str) -> None:
    """One wheel for every Python; the library in it is one that the package takes."""
    made, said, _ = build(what, checkout, tmp_path, CXX=f"{COMPILER} -DDFA_FOR_ANY_PROCESSOR", CXXFLAGS="-DX='a b'")
    assert f"C++ for small networks on a CPU: by {COMPILER} -DDFA_FOR_ANY_PROCESSOR" in said.splitlines()
    if what == "wheel":
        assert "-py3-none-linux_" in made.name
        assert LIBRARY not in zipfile.ZipFile(made).namelist()
        zipfile.ZipFile(made).extract(CPU_LIBRARY, checkout)
    assert load(checkout / CPU_LIBRARY).path == checkout / CPU_LIBRARY


def test_a_cpp_compiler_that_fails(checkout: Path, tmp_path: Path) -> None:
    program(tmp_path / "cxx", "#!/bin/sh\nexit 4\n")
    with pytest.raises(AssertionError, match=r"cxx ended with status 4; .* without the CPU's library, set CXX to the"):
        build("wheel", checkout, tmp_path, CXX=str(tmp_path / "cxx"))


@pytest.mark.parametrize("what", ["wheel", "editable"])
def test_a_cpp_compiler_that_nobody_asked_for_and_that_fails(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The rest is installed, and it says so."""
    program(tmp_path / "bin" / "c++", "#!/bin/sh\nexit 4\n")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.delenv("CXX", raising=False)
    made, said, _ = build(what, checkout, tmp_path, path, CXX=None)
    assert f"C++ for small networks on a CPU: by {tmp_path}/bin/c++" in said.splitlines()
    assert "c++ ended with status 4" in said
    names = zipfile.ZipFile(made).namelist()
    assert CPU_LIBRARY not in names
    assert any(name.endswith(".dist-info/METADATA") for name in names)


def test_words_that_no_shell_reads(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"CXX: got \"g\+\+'\", expected words as in a shell: No closing quotation"
    ):
        build("wheel", checkout, tmp_path, CXX="g++'")


def test_with_nvcc(checkout: Path, toolkit: Path) -> None:
    """Everything that is wanted and that it knows; one wheel for every Python."""
    made, said, asked = build("wheel", checkout, toolkit)
    assert "-py3-none-linux_" in made.name
    assert LIBRARY in zipfile.ZipFile(made).namelist()
    assert codes(asked) == [
        "75:sm_75", "80:sm_80", "80:sm_86", "80:sm_89", "80:sm_90", "80:sm_100", "80:sm_120", "75:compute_75",
        "80:compute_80",
    ]  # fmt: skip
    assert f"CUDA C++ kernels: by {toolkit}/bin/nvcc for sm_75, sm_80" in said


def test_only_what_torchs_variable_names(checkout: Path, toolkit: Path) -> None:
    """What is older than tensor cores is left out."""
    _, _, asked = build("wheel", checkout, toolkit, TORCH_CUDA_ARCH_LIST="6.1;7.5 9.0a 12.0+PTX")
    assert codes(asked) == ["75:sm_75", "80:sm_90a", "80:sm_120", "120:compute_120"]
    assert "-DDFA_ARCHITECTURES=sm_75+sm_90a+sm_120+compute_120" in asked.split()


def test_a_name_that_is_no_architecture(checkout: Path, toolkit: Path) -> None:
    with pytest.raises(AssertionError, match=r"TORCH_CUDA_ARCH_LIST: got 'Turing', expected numbers as in '7.5 8.6"):
        build("wheel", checkout, toolkit, TORCH_CUDA_ARCH_LIST="Turing")


def test_an_nvcc_that_fails(checkout: Path, toolkit: Path) -> None:
    program(toolkit / "bin" / "nvcc", NVCC.replace("echo a library", "exit 3; echo"))
    with pytest.raises(AssertionError, match=r"nvcc ended with status 3; .* set CUDA_HOME to a folder without nvcc"):
        build("wheel", checkout, toolkit)


@pytest.mark.parametrize("gpus", [["7.5", "8.6", "7.5"], ["6.1"], []])
def test_an_editable_install_builds_for_the_gpus_here(
    checkout: Path, toolkit: Path, tmp_path: Path, gpus: list[str]
) -> None:
    said_by_driver = "exit 9" if not gpus else "\n".join(f"echo {gpu}" for gpu in gpus)
    program(tmp_path / "driver" / "nvidia-smi", f"#!/bin/sh\n{said_by_driver}\n")
    path = f"{tmp_path / 'driver'}{os.pathsep}{os.environ['PATH']}"
    _, said, asked = build("editable", checkout, toolkit, path)
    if "7.5" in gpus:
        assert codes(asked) == ["75:sm_75", "80:sm_86"]
        assert (checkout / LIBRARY).exists()
    else:
        assert "left out: an editable install builds for this machine's GPUs, and none was found" in said
        assert not (checkout / LIBRARY).exists()


def test_a_source_distribution_has_the_sources(checkout: Path, tmp_path: Path) -> None:
    made, _, _ = build("sdist", checkout, tmp_path)
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert "setup.py" in names
