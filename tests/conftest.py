"""One thread: small products gain nothing from more, and waiting threads are slow on a busy machine."""

import os
from collections.abc import Callable
from typing import Any

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


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    return function(**arguments)


# Python maps frames 16 KiB at a time and unmaps them as soon as the first one there returns: a call on the border, made
# over and over by Triton's interpreter, spends more time so than in itself. One large frame gets a larger piece.
_call.__code__ = _call.__code__.replace(co_stacksize=2**14 + 1)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    test = pyfuncitem.obj
    pyfuncitem.obj = lambda **arguments: _call(test, arguments)
