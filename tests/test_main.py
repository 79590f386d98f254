"""`python -m dfa_kernels`: what a bug report needs."""

import platform

import torch

from dfa_kernels import __main__ as report
from dfa_kernels import __version__


def test_it_says_what_is_installed_and_what_each_device_runs(capsys):
    report.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"dfa_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    cpu = next(i for i, line in enumerate(lines) if line.startswith("cpu, "))
    backend, reason = report.automatic_choice(torch.device("cpu"))
    assert lines[cpu].endswith(f"backend {backend} ({reason})")
    assert lines[cpu + 1] == "  for example 3072-800-800-800-10, batch 128, SGD:"
    assert lines[cpu + 2] == f"  backend {backend} on cpu"
    assert lines[cpu + 3].startswith("  linear layers 3072→800, 800→800, 800→800, 800→10, sgd update included: ")
    assert ("no CUDA device is visible to torch" in lines) == (not torch.cuda.is_available())


def test_it_names_the_library_of_kernels(capsys, monkeypatch):
    """Or says why there is none."""
    monkeypatch.setattr(report, "describe_cuda_library", lambda: "there/libdfa_kernels.so, sm_75, compute_75")
    monkeypatch.setattr(report, "describe_cpu_library", lambda: "no library was built")
    report.main()
    said = capsys.readouterr().out.splitlines()
    assert "CUDA C++: there/libdfa_kernels.so, sm_75, compute_75" in said
    assert "C++ for CPUs: no library was built" in said


def test_it_says_what_is_missing(capsys, monkeypatch):
    def missing(package: str) -> str:
        raise report.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(report.importlib.metadata, "version", missing)
    report.main()
    assert "triton: not installed" in capsys.readouterr().out
