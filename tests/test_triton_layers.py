"""`layer_grads` and `layer_update_` as Triton kernels, against the formulas; without a GPU they are interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_oracle
from triton_cases import Call, forced, make_call, networks, watched

from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend

KERNELS = ["one_phase", "two_phase"]
both_kernels = pytest.mark.parametrize("kernel", KERNELS)


def check_grads(call: Call, found: list[torch.Tensor]) -> None:
    same = torch_backend.layer_grads(*call.arguments(), torch.float32)
    for (name, ref, scale), out, torchs in zip(call.wanted_gradients(), found, same, strict=True):
        assert out.dtype == torch.float32
        assert_close_to_oracle(out.cpu(), ref, torchs.cpu(), scale, name)


@both_kernels
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_layer_grads_equal_the_formulas(kernel: str, data: st.DataObject) -> None:
    network = data.draw(networks(kernel))
    call = make_call(network)
    with forced(kernel, network["config"]), watched() as seen:
        found = triton_backend.layer_grads(*call.arguments(), torch.float32)
    assert seen.kernels == [kernel]
    assert len(seen.plans) == 1
    check_grads(call, found)
