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
    assert lines[cpu].endswith("backend torch (the fastest on this kind of device)")
    assert lines[cpu + 1] == "  for example 3072-800-800-800-10, batch 128, SGD:"
    assert lines[cpu + 2] == "  backend torch on cpu"
    assert lines[cpu + 3].startswith("  linear layers 3072→800, 800→800, 800→800, 800→10, sgd update included: ")
    assert ("no CUDA device is visible to torch" in lines) == (not torch.cuda.is_available())


def test_it_names_the_library_of_kernels(capsys, monkeypatch):
    """Or says why there is none."""
    monkeypatch.setattr(report, "describe_library", lambda: "there/libdfa_kernels.so, sm_75, compute_75")
    report.main()
    assert "CUDA C++: there/libdfa_kernels.so, sm_75, compute_75" in capsys.readouterr().out.splitlines()


def test_it_says_what_is_missing(capsys, monkeypatch):
    def missing(package: str) -> str:
        raise report.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(report.importlib.metadata, "version", missing)
    report.main()
    assert "triton: not installed" in capsys.readouterr().out
