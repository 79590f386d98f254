"""Which backend a device gets, and why."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import dfa_kernels as dfa
from dfa_kernels import backends

CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """Lets torch say of every GPU that it has this compute capability."""

    def pretend(major: int, minor: int, hip: str | None = None, triton: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(backends, "HAS_TRITON", triton)

    monkeypatch.setattr(backends, "_announced", set())
    return pretend


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_gpus_with_tensor_cores_for_triton(gpu, capability):
    gpu(*capability)
    backend, reason = backends.automatic_choice(GPU)
    assert backend == backends.resolve("auto", GPU) == "triton"
    assert "sm_{}{}".format(*capability) in reason


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)], ids=str)
@pytest.mark.parametrize("code", ["for them", "for others", "none"])
@pytest.mark.parametrize("triton", [True, False], ids=["with Triton", "without"])
def test_older_gpus(gpu, monkeypatch, capability, code, triton):
    """CUDA C++ for those that have tensor cores, if there is a library that has code for them."""
    gpu(*capability, triton=triton)
    missing = {"for them": "", "for others": "none of which runs on", "none": "no library was built"}[code]
    monkeypatch.setattr(backends.cuda_backend, "why_not", lambda capability: missing)
    backend, reason = backends.automatic_choice(GPU)
    expected = "cuda" if capability[0] == 7 and not missing else "torch"
    assert backend == backends.resolve("auto", GPU) == expected
    assert "sm_{}{}: Triton uses tensor cores from sm_80 on".format(*capability) in reason
    assert capability[0] == 6 or missing in reason


def test_without_triton(gpu):
    gpu(9, 0, triton=False)
    assert backends.automatic_choice(GPU) == ("torch", "the package triton is not installed")
    with pytest.raises(ValueError, match=r"backend: got 'triton', but the package triton is not installed; use 'auto'"):
        backends.check_backend("triton")


def test_gpus_of_another_maker(gpu):
    gpu(9, 4, hip="6.2")
    assert backends.automatic_choice(GPU) == ("torch", "the kernels are for NVIDIA GPUs")


@pytest.mark.parametrize("kind", ["cpu", "meta", "mps", "xpu"])
def test_other_devices(gpu, monkeypatch, kind):
    gpu(9, 0)
    monkeypatch.setattr(backends.cpu_backend, "why_not", lambda: "no library was built")
    assert backends.automatic_choice(torch.device(kind))[0] == "torch"
    assert backends.resolve("auto", torch.device(kind)) == "torch"


def test_a_cpu_with_its_library(monkeypatch):
    monkeypatch.setattr(backends.cpu_backend, "why_not", lambda: "")
    assert backends.automatic_choice(CPU)[0] == backends.resolve("auto", CPU) == "cpu"
    assert backends.resolve("auto", torch.device("meta")) == "torch"


def test_the_log_says_once_for_each_device_what_was_picked(gpu, monkeypatch, caplog):
    gpu(6, 1)
    monkeypatch.setattr(backends.cpu_backend, "why_not", lambda: "")
    with caplog.at_level(logging.INFO, logger="dfa_kernels"):
        for device in (GPU, CPU, GPU, OTHER_GPU, CPU):
            backends.resolve("auto", device)
        backends.resolve("torch", torch.device("meta"))
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "cuda:0: backend torch",
        "cpu: backend cpu",
        "cuda:1: backend torch",
    ]
    assert "sm_61" in caplog.records[0].getMessage()


def test_torch_runs_anywhere():
    assert backends.resolve("torch", GPU) == backends.resolve("torch", CPU) == "torch"


def test_triton_on_a_gpu():
    assert backends.resolve("triton", GPU) == "triton"


def test_triton_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends.triton_backend.launch, "INTERPRETED", False)
    model = dfa.DFA(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), backend="triton")
    for device in (CPU, torch.device("meta")):
        with pytest.raises(ValueError, match=rf"backend: 'triton' got tensors on {device}, expected cuda.*'auto'"):
            model.to(device)(torch.zeros(2, 3, device=device))


def test_triton_on_another_device_than_the_interpreters():
    with pytest.raises(ValueError, match=r"backend: 'triton' got tensors on meta"):
        backends.resolve("triton", torch.device("meta"))


PROGRAM = """
import torch
import dfa_kernels as dfa

net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
try:
    dfa.DFA(net, backend="triton")(torch.zeros(2, 3))
except ValueError as error:
    print(error)
"""


def test_real_kernels_refuse_a_cpu():
    """In a process of its own, where nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    assert "backend: 'triton' got tensors on cpu, expected cuda" in ran.stdout
    assert "TRITON_INTERPRET=1" in ran.stdout
