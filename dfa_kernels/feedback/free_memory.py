"""How much memory a device could still give, as far as that can be told without asking for it."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on ``device``, what torch's allocator holds unused included; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    known = [_available_on_host(), *(_left_in_group(group) for group in _own_groups())]
    return min((found for found in known if found is not None), default=None)


def _available_on_host() -> int | None:
    """Linux's own estimate, caches that it would give up included."""
    try:
        return _numbers(_MEMINFO)["MemAvailable:"] * 1024
    except (OSError, KeyError, ValueError):
        return None


def _own_groups() -> list[Path]:
    """The control group of this process and those around it; a container, a job and its step may each be limited."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    return [_GROUPS / own, *(_GROUPS / parent for parent in Path(own).parents)] if own else [_GROUPS]


def _left_in_group(group: Path) -> int | None:
    """What the limit of a group leaves; files in its cache that nobody reads do not count as used."""
    try:
        used = int((group / "memory.current").read_text()) - _numbers(group / "memory.stat")["inactive_file"]
        return int((group / "memory.max").read_text()) - used
    except (OSError, KeyError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """The first number of every line, by its name."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
