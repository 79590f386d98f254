"""The CUDA library is found, checked and refused with a reason; then the next backend is used."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_host import compiled, host_library, needs_a_compiler, on_host
from torch import nn

import dfa_kernels as dfa
from dfa_kernels import backends
from dfa_kernels.backends.csrc.arguments import ABI_VERSION
from dfa_kernels.backends.csrc.opened import LibraryError
from dfa_kernels.backends.cuda import library, operators
from dfa_kernels.backends.cuda.library import load

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EXPORT = 'extern "C" __attribute__((visibility("default")))'


def made(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "made.cpp"
    path.write_text(source)
    return compiled(path)


def refused(path: Path, *words: str) -> str:
    with pytest.raises(LibraryError, match="(?s)" + ".*".join(map(re.escape, (str(path), *words)))) as caught:
        load(path)
    return str(caught.value)


def test_none_was_built(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"no library was built: .*nothing.so is not there; install where nvcc is"):
        load(tmp_path / "nothing.so")


@needs_a_compiler
def test_another_version(tmp_path: Path) -> None:
    path = made(tmp_path, f"{EXPORT} int dfa_abi_version() {{ return {ABI_VERSION + 1}; }}\n")
    refused(path, f"has ABI version {ABI_VERSION + 1}, expected {ABI_VERSION}; build it again: `pip install .`")


@needs_a_compiler
def test_arguments_of_another_size(tmp_path: Path) -> None:
    """A header that was changed without a new version."""
    size = f"{EXPORT} long long dfa_arguments_bytes() {{ return 8; }}\n"
    path = made(tmp_path, f"{EXPORT} int dfa_abi_version() {{ return {ABI_VERSION}; }}\n{size}")
    refused(path, "takes 8 bytes of arguments, expected", "build it again")


@needs_a_compiler
def test_a_library_of_something_else(tmp_path: Path) -> None:
    refused(made(tmp_path, "int unrelated;"), "cannot be used:", "undefined symbol: dfa_abi_version", "build it again")


@needs_a_compiler
@pytest.mark.parametrize("kept", [0, 4, 100, 4096, 50_000, -1])
def test_a_truncated_library(tmp_path: Path, kept: int) -> None:
    """Of which the system's loader may make the end of the process."""
    path = tmp_path / "truncated.so"
    path.write_bytes(host_library()[0].path.read_bytes()[:kept])
    refused(path, "is not whole", "build it again")


@pytest.mark.parametrize(
    ("names", "runs_on"),
    [
        ("sm_75", {75}),
        ("sm_80", {80, 86, 89}),
        ("sm_86", {86, 89}),
        ("sm_75+compute_75", {75, 80, 86, 89, 90, 120}),
        ("sm_70+sm_90+compute_90", {70, 75, 90, 120}),
        ("compute_80", {80, 86, 89, 90, 120}),
        ("host", {70, 75, 80, 86, 89, 90, 120}),
    ],
)
def test_which_gpus_code_runs_on(names: str, runs_on: set[int]) -> None:
    found = library.Library(Path("there"), tuple(names.split("+")), *[None] * 4)
    assert {capability for capability in (70, 75, 80, 86, 89, 90, 120) if found.has_code_for(capability)} == runs_on


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch says of every GPU that it is one; the library is what is given."""

    def pretend(found: library.Library | LibraryError) -> None:
        monkeypatch.setattr(library, "installed", lambda: found)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(operators, "target_of", lambda device: operators.EMULATED._replace(capability=70))
    return pretend


def test_without_a_library_the_next_backend_is_used(v100: Any) -> None:
    v100(LibraryError("no library was built: it is not there"))
    chosen, reason = backends.automatic_choice(GPU)
    assert chosen == "torch"
    assert reason == "sm_70: Triton uses tensor cores from sm_80 on; no library was built: it is not there"
    with pytest.raises(ValueError, match=r"backend: 'cuda' is not available: no library was built.*'auto' or 'torch'"):
        backends.resolve("cuda", GPU)


def test_without_code_for_a_gpu_the_next_backend_is_used(v100: Any) -> None:
    v100(library.Library(Path("lib.so"), ("sm_75", "compute_75"), *[None] * 4))
    chosen, reason = backends.automatic_choice(GPU)
    assert chosen == "torch"
    assert "lib.so has code for sm_75, compute_75, none of which runs on sm_70; build it by an nvcc that" in reason
    with pytest.raises(ValueError, match=r"backend: 'cuda' cannot run on cuda:0: lib.so has code for sm_75.*'auto'"):
        backends.resolve("cuda", GPU)


def test_with_code_for_a_gpu_it_is_used(v100: Any) -> None:
    v100(library.Library(Path("lib.so"), ("sm_70", "compute_70"), *[None] * 4))
    chosen, reason = backends.automatic_choice(GPU)
    assert chosen == backends.resolve("cuda", GPU) == "cuda"
    assert reason == "sm_70: Triton uses tensor cores from sm_80 on, CUDA C++ here as well"
    assert library.describe_library() == "lib.so, sm_70, compute_70"


def test_tensors_on_a_cpu(v100: Any) -> None:
    v100(library.Library(Path("lib.so"), ("sm_70",), *[None] * 4))
    model = dfa.DFA(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), backend="cuda")
    with pytest.raises(ValueError, match=r"backend: 'cuda' got tensors on cpu, expected cuda; on a CPU use 'auto'"):
        model(torch.zeros(2, 3))


@needs_a_compiler
def test_what_the_library_says_becomes_an_exception() -> None:
    """A status is no result: nothing may go on with what a failed launch left."""
    found, _ = host_library()
    arguments = library.Arguments(task=77)
    with pytest.raises(RuntimeError, match="dfa_kernels' CUDA library: task: got 77"):
        found.run(arguments, 0, 0)
    with pytest.raises(RuntimeError, match="CUDA library: layers: got 29"):
        found.run(library.Arguments(layers=29), 0, 0)


@needs_a_compiler
def test_a_failed_launch_fails_the_call() -> None:
    with on_host("strip"):
        broken = replace(library.installed(), _run=lambda *_: 2, _message=lambda: b"dfa_strip: out of luck")
        with mock.patch.object(library, "installed", lambda: broken):
            model = dfa.DFA(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), backend="cuda")
            with pytest.raises(RuntimeError, match="CUDA library: dfa_strip: out of luck"):
                model(torch.ones(2, 3)).sum().backward()
