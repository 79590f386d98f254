"""The paper's network on CIFAR-10 by every kind and storage of feedback: accuracy and alignment over the same seeds.

    python -m bench.learn.kinds --data-dir data [--seeds 0,1,2] [--jobs 2] [--out bench/results/cpu]

Every run is one of train.py with the published settings, in a folder of --runs named KIND-STORAGE-SEED. Runs that are
finished there are read, unfinished ones go on, missing ones are made (each takes some 10 minutes of one core). Writes
kinds.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import environment
from bench.learn import train
from dfa_kernels.feedback.spec import KINDS, STORAGES

PAPER: dict[str, Any] = {
    "test": (0.4646, 0.0035),
    "train": (0.8662, 0.0031),
    "alignment": ((0.79, 0.08), (0.87, 0.10), (0.64, 0.07)),
}


@dataclass(frozen=True)
class Job:
    """One training run."""

    kind: str
    storage: str
    seed: int

    def folder(self, runs: Path) -> Path:
        return runs / f"{self.kind}-{self.storage}-{self.seed}"

    def argv(self, runs: Path, data_dir: Path) -> list[str]:
        folder = self.folder(runs)
        if (folder / "checkpoint.pt").exists():
            return ["--resume", str(folder / "checkpoint.pt"), "--data-dir", str(data_dir)]
        chosen = {"feedback": self.kind, "storage": self.storage, "seed": self.seed, "threads": 1, "timed-steps": 0}
        options = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
        where = ["--data-dir", str(data_dir), "--out", str(folder)]
        return ["--published", "--rule", "dfa", "--device", "cpu", *options, *where]


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    seeds = {"dense": options.seeds, "procedural": options.procedural_seeds}
    jobs = [Job(kind, storage, seed) for storage in STORAGES for kind in KINDS for seed in seeds[storage]]
    work = [(job, options.runs, options.data_dir) for job in jobs if finished(job, options.runs) is None]
    with get_context("spawn").Pool(options.jobs) as pool:
        failed = [job for job, status in zip(work, pool.starmap(run, work, chunksize=1), strict=True) if status]
    for job, _, _ in failed:
        print(f"did not finish: {job}", file=sys.stderr)
    if failed:
        return 1
    rows = [row(kind, storage, seeds[storage], options.runs) for kind in KINDS for storage in STORAGES]
    result = {"environment": environment.describe(), "paper": PAPER, "rows": rows}
    print(markdown(result))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kinds.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run(job: Job, runs: Path, data_dir: Path) -> int:
    """Trains, in this process; train.py's exit status."""
    return train.main(job.argv(runs, data_dir))


def finished(job: Job, runs: Path) -> dict[str, Any] | None:
    """What run.json holds, None unless it is there and whole. ValueError if it is of other settings."""
    path = job.folder(runs) / "run.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if result["interrupted"] or result["failure"]:
        return None
    options = result["options"]
    found = Job(options["feedback"], options["storage"], options["seed"])
    if found != job or not options["published"] or options["epochs"] != 50:
        raise ValueError(f"{path}: holds {found} of {options['epochs']} epochs, expected {job} as published")
    return result


def row(kind: str, storage: str, seeds: list[int], runs: Path) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of a kind and storage."""
    results = [_result(Job(kind, storage, seed), runs) for seed in seeds]
    dense = [_result(Job(kind, "dense", seed), runs) for seed in seeds]
    summaries = [result["results"]["dfa"] for result in results]
    return {
        "kind": kind,
        "storage": storage,
        "seeds": seeds,
        "same_as_dense": all(a["history"] == b["history"] for a, b in zip(results, dense, strict=True)),
        "feedback_bytes": results[0]["feedback_bytes"]["in_use"],
        "test": _mean_std([summary["test_accuracy"]["final"] for summary in summaries]),
        "best_test": _mean_std([summary["test_accuracy"]["best"] for summary in summaries]),
        "train": _mean_std([summary["train_accuracy"]["final"] for summary in summaries]),
        "alignment": [_mean_std([s["alignment"][tap]["mean"] for s in summaries]) for tap in summaries[0]["alignment"]],
        "commits": sorted({result["environment"]["commit"] for result in results}),
    }


def _result(job: Job, runs: Path) -> dict[str, Any]:
    result = finished(job, runs)
    if result is None:
        raise ValueError(f"{job.folder(runs)}: expected a finished run")
    return result


def _mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(result: dict[str, Any]) -> str:
    """The table of kinds.json: a line for each kind, and what the storage changes; mean (std) over the seeds."""
    lines = ["| feedback | test, % | train, % | alignment 1 | 2 | 3 | procedural |", "|---|---|---|---|---|---|---|"]
    alignment = " | ".join(_short(*pair) for pair in PAPER["alignment"])
    lines.append(f"| paper | {_percent(*PAPER['test'])} | {_percent(*PAPER['train'])} | {alignment} | |")
    by_form = {(row["kind"], row["storage"]): row for row in result["rows"]}
    for kind in KINDS:
        dense, procedural = by_form[kind, "dense"], by_form[kind, "procedural"]
        alignment = " | ".join(_short(*pair) for pair in dense["alignment"])
        same = "the same, bit for bit" if procedural["same_as_dense"] else f"test {_percent(*procedural['test'])}"
        same += f" (seeds {', '.join(map(str, procedural['seeds']))})"
        lines.append(f"| {kind} | {_percent(*dense['test'])} | {_percent(*dense['train'])} | {alignment} | {same} |")
    return "\n".join(lines)


def _percent(mean: float, std: float) -> str:
    return f"{mean * 100:.2f} ({std * 100:.2f})"


def _short(mean: float, std: float) -> str:
    return f"{mean:.3f} ({std:.3f})"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learn.kinds", description="The paper's network by every kind and storage of feedback."
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is or goes")
    parser.add_argument("--runs", type=Path, default=Path("runs/kinds"), help="folder of the runs, default %(default)s")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="comma-separated, default 0,1,2")
    parser.add_argument("--procedural-seeds", type=_seeds, help="of --seeds; default all of them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each; default 1")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of kinds.json, default %(default)s")
    options = parser.parse_args(argv)
    options.procedural_seeds = options.procedural_seeds or options.seeds
    if not set(options.procedural_seeds) <= set(options.seeds):
        parser.error(f"--procedural-seeds: got {options.procedural_seeds}, expected some of {options.seeds}")
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, expected at least 1")
    return options


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected different integers like 0,1,2")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
