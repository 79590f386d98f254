"""The network, the data and the loop by hand that runs of trainers are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import dfa_kernels as dfa

BATCH = 8
EPOCHS = 2
# Small enough that every step is clipped.
MAX_NORM = 0.05


def model(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    return dfa.DFA(net, dfa.Feedback("rademacher", seed=seed))


def examples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4 * BATCH, 5, generator=generator), torch.randint(3, (4 * BATCH,), generator=generator)


def train_by_hand(own, optimizer, epochs=EPOCHS):
    x, y = examples()
    for _ in range(epochs):
        for rows, classes in zip(x.split(BATCH), y.split(BATCH), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(own(rows), classes).backward()
            assert nn.utils.clip_grad_norm_(own.parameters(), MAX_NORM) > MAX_NORM
            optimizer.step()
    return own


def assert_same(found, expected):
    """The same weights and the same feedback."""
    state = expected.state_dict()
    for key, value in found.state_dict().items():
        assert torch.equal(value, state.pop(key)), key
    assert not state
