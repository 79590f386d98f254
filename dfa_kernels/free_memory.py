"""How much memory a device could still give, as far as that can be told without asking for it."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on ``device``, what torch's allocator holds unused included; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [found for found in (_available_on_host(), _left_in_group()) if found is not None]
    return min(known, default=None)


def _available_on_host() -> int | None:
    """Linux's own estimate, caches that it would give up included."""
    try:
        return _numbers(_MEMINFO)["MemAvailable:"] * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_in_group() -> int | None:
    """What the limit of a container leaves; files in its cache that nobody reads do not count as used."""
    try:
        used = int((_GROUP / "memory.current").read_text()) - _numbers(_GROUP / "memory.stat")["inactive_file"]
        return int((_GROUP / "memory.max").read_text()) - used
    except (OSError, KeyError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """The first number of every line, by its name."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
