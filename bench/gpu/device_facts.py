"""The environment report: what GPU this is, and with what software."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
from typing import Any

import torch

from bench import environment
from bench.gpu.processes import step_parser, write
from dfa_kernels.backends import automatic_choice

QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def main(argv: list[str] | None = None) -> int:
    options = step_parser(__doc__ or "").parse_args(argv)
    facts = describe()
    write(options.json, facts)
    for name, value in facts.items():
        print(f"{name}: {value}")
    return 0


def describe() -> dict[str, Any]:
    """All that a result depends on and that is not in the commit."""
    machine = environment.describe()
    commit = machine["commit"]
    facts = {
        **machine,
        "commit": None if commit is None else commit.removesuffix("-dirty"),
        "dirty": None if commit is None else commit.endswith("-dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cuda": torch.version.cuda,
        "driver": None,
        "gpu": None,
    }
    if torch.cuda.is_available():
        facts |= gpu_facts()
    return facts


def gpu_facts() -> dict[str, Any]:
    """Of the first GPU."""
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    state = nvidia_smi()
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"sm_{major}{minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cudnn": torch.backends.cudnn.version(),
        "driver": state.get("driver_version"),
        "nvidia_smi": state,
        "backend": automatic_choice(torch.device("cuda", 0)),
    }


def nvidia_smi() -> dict[str, str]:
    """What the driver's own tool says of the first GPU; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY.split(","), (field.strip() for field in run.stdout.strip().split(",")), strict=False))


if __name__ == "__main__":
    sys.exit(main())
