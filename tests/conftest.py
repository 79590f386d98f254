"""One thread: small products gain nothing from more, and waiting threads are slow on a busy machine."""

import os

import pytest
import torch

torch.set_num_threads(1)

# Triton looks at this when kernels are defined, so it has to be said before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
