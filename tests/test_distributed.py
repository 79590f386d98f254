"""Two processes that share a batch: DistributedDataParallel and FSDP2, with gradients as of one process."""

from __future__ import annotations

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dfa_kernels as dfa

PROCESSES = 2
# Of what waits for the other process; a test takes seconds.
PATIENCE = timedelta(seconds=60)
# What the same sums in another order may differ by, in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def model(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    return dfa.DFA(net.double(), dfa.Feedback.from_matrix(torch.randn(9, 3).double()))


def other_model():
    """Of other weights and feedback, for what is saved to be loaded into."""
    net = model(seed=1).net
    return dfa.DFA(net, dfa.Feedback(seed=5))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=generator).double(), torch.randint(3, (8,), generator=generator)


def share(rank, *tensors):
    return [part.chunk(PROCESSES)[rank] for part in tensors]


def train(module, optimizer, rank=None):
    """Three steps, with the gradients of each."""
    seen = []
    for seed in range(3):
        x, y = batch(seed) if rank is None else share(rank, *batch(seed))
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        seen.append([whole(p.grad).clone() for p in module.parameters()])
        optimizer.step()
    return seen


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)


def assert_close(found, expected):
    torch.testing.assert_close([whole(t) for t in found], [whole(t) for t in expected], **CLOSE)


def assert_close_steps(found, expected):
    for step, reference in zip(found, expected, strict=True):
        assert_close(step, reference)


def assert_loads(state, expected):
    loaded = other_model()
    assert loaded.load_state_dict(state, strict=True) == ([], [])
    assert_close(loaded.net.parameters(), expected.net.parameters())
    assert torch.equal(loaded.feedback.matrix(8, 3), expected.feedback.matrix(8, 3))


def start(rank, check, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES, timeout=PATIENCE
    )
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


def in_two_processes(check, folder):
    multiprocessing.spawn(start, (check, folder), nprocs=PROCESSES)


def check_data_parallel(rank):
    expected, own = model(), model()
    parallel = nn.parallel.DistributedDataParallel(own)
    assert_close_steps(train(parallel, sgd(parallel), rank), train(expected, sgd(expected)))
    assert_close(own.parameters(), expected.parameters())
    state = parallel.state_dict()
    assert all(key.startswith("module.") for key in state)
    again = nn.parallel.DistributedDataParallel(other_model())
    again.load_state_dict(state)
    assert_loads(again.module.state_dict(), expected)


def shard(module):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in module.net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def check_fully_sharded(rank):
    expected = model()
    sharded = shard(model())
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert_close_steps(train(sharded, sgd(sharded), rank), train(expected, sgd(expected)))
    assert_close(sharded.parameters(), expected.parameters())
    assert sharded.taps == expected.taps
    full = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded, options=full)
    assert_loads(state, expected)
    again = shard(other_model())
    set_model_state_dict(again, copy.deepcopy(state), options=full)
    assert_loads(get_model_state_dict(again, options=full), expected)
    again.load_state_dict(shard(other_model()).state_dict())
    again.load_state_dict(sharded.state_dict())
    assert_close_steps(train(again, sgd(again), rank), train(expected, sgd(expected)))


@pytest.mark.parametrize("check", [check_data_parallel, check_fully_sharded])
def test_two_processes_learn_what_one_does(check, tmp_path):
    in_two_processes(check, tmp_path)
