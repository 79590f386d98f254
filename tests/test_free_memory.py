"""What a device could still give, from what the system says of itself."""

import pytest
import torch

import dfa_kernels as dfa
from dfa_kernels import feedback
from dfa_kernels.feedback import free_memory

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 8 GiB available, in a container of 3 GiB, 2 of them used, half a GiB of that by idle files."""
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:  0\n")
    limit(tmp_path, 3 * 2**30, 2 * 2**30, 2**29)
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(free_memory, "_OWN_GROUP", tmp_path / "cgroup")
    return tmp_path


def limit(group, most, used, idle):
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {idle}\n")


def test_the_smaller_of_host_and_container_counts(system):
    assert free_memory.free_bytes(CPU) == 3 * 2**29
    (system / "memory.max").write_text("max\n")
    assert free_memory.free_bytes(CPU) == 8 * 2**30
    (system / "meminfo").unlink()
    assert free_memory.free_bytes(CPU) is None


@pytest.mark.parametrize(
    ("inner", "outer", "free"), [(10**6, 10**7, 10**6), (10**7, 10**6, 10**6), (10**12, 10**12, 3 * 2**29)]
)
def test_every_group_around_the_process_counts(system, inner, outer, free):
    """As under a batch system: a limit for the job and one for its step."""
    (system / "cgroup").write_text("1:cpu:/other\n0::/jobs/7/step\n")
    limit(system / "jobs" / "7" / "step", inner, 0, 0)
    limit(system / "jobs" / "7", outer, 0, 0)
    assert free_memory.free_bytes(CPU) == free


def test_without_groups_the_host_counts(system):
    (system / "cgroup").unlink()
    (system / "memory.max").unlink()
    assert free_memory.free_bytes(CPU) == 8 * 2**30


def test_nobody_says_it_of_other_devices():
    assert free_memory.free_bytes(torch.device("meta")) is None


def test_feedback_that_cannot_fit_says_what_would(monkeypatch):
    """Before anything is allocated: the matrix asked for is larger than any machine's memory."""
    monkeypatch.setattr(feedback, "free_bytes", lambda device: 10**12)
    asked = dfa.Feedback()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        asked.stored(10**10, 1000, "cpu")
    message = str(caught.value)
    assert "10000000000 x 1000 of 'gaussian' need 40000.00 GB on cpu, where 1000.00 GB are free" in message
    assert "storage='procedural' keeps only the seed, for any kind" in message
    assert message.endswith("these kinds would fit: 'fastfood' (130.00 GB)")
    assert asked.stored(10, 1000, "cpu")[0].shape == (10, 1000)


def test_a_given_matrix_is_there_already(monkeypatch):
    monkeypatch.setattr(feedback, "free_bytes", lambda device: 0)
    given = torch.randn(5, 3)
    for device in (None, "cpu", "cpu:0"):
        assert torch.equal(dfa.Feedback.from_matrix(given, device=device).stored(5, 3, "cpu")[0], given)
    with pytest.raises(torch.OutOfMemoryError, match=r"5 x 3 of 'gaussian' need 60 bytes on cpu"):
        dfa.Feedback().stored(5, 3, "cpu")
    assert dfa.Feedback(storage="procedural").stored(5, 3, "cpu") == []


def test_a_given_matrix_cannot_be_procedural(monkeypatch):
    monkeypatch.setattr(feedback, "free_bytes", lambda device: 10)
    with pytest.raises(torch.OutOfMemoryError, match=r"5 x 3 of 'matrix' need 60 bytes on meta.*another device$"):
        dfa.Feedback.from_matrix(torch.randn(5, 3)).stored(5, 3, "meta")


def test_growing_counts_what_it_gives_back_and_loses_nothing_if_it_fails(monkeypatch):
    """100 rows of 3 take 1200 bytes, 60 of them those of the first five."""
    growing = dfa.Feedback()
    small = growing.stored(5, 3, "cpu")
    monkeypatch.setattr(feedback, "free_bytes", lambda device: 1139)
    with pytest.raises(torch.OutOfMemoryError, match=r"need 1200 bytes on cpu, where 1199 bytes are free"):
        growing.stored(100, 3, "cpu")
    assert growing.stored(5, 3, "cpu") is small
    monkeypatch.setattr(feedback, "free_bytes", lambda device: 1140)
    assert growing.stored(100, 3, "cpu")[0].shape == (100, 3)
