"""The search for tile configs: what it picks, what it refuses, and what it leaves alone in the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import tune
from bench.gpu.clock import Clock
from bench.gpu.tuning_workloads import DTYPES, QUICK_SHAPE, Workload, make_workload
from dfa_kernels.backends.triton.configs import ARITHMETICS, KINDS, StripConfig, TwoPhaseConfig, table
from dfa_kernels.backends.triton.launch import INTERPRETED, target_of

CPU = torch.device("cpu")
LARGE, MIDDLE, SMALL = (StripConfig(side, side, 128, 256, 4, 2) for side in (128, 64, 32))


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    path = tmp_path / "configs.json"
    path.write_text(tune.CONFIGS.read_text())
    return path


def search(seconds: dict[Any, list[float]], tiles: dict[Any, list[int]]) -> tune.Search:
    return tune.Search(["a", "b"][: len(next(iter(tiles.values())))], seconds, tiles, multiprocessors=100)


TILES = {LARGE: [50, 200], MIDDLE: [150, 800], SMALL: [600, 3200]}


def test_the_table_is_written_in_its_own_format():
    text = tune.CONFIGS.read_text()
    assert tune.as_text(json.loads(text)) == text


def test_each_workload_gets_its_fastest_config_where_the_rule_allows_it():
    made = search({LARGE: [9.0, 1.0], MIDDLE: [2.0, 3.0], SMALL: [5.0, 5.0]}, TILES)
    best = made.best_list()
    assert best == [LARGE, MIDDLE]
    assert [made.chosen(best, i) for i in range(2)] == [MIDDLE, LARGE]
    assert made.loss(best) == 0


def test_the_list_is_chosen_by_what_launches_would_take_from_it():
    """The large tiles are fastest for both, but a list with smaller ones behind them would not run them for "a"."""
    made = search({LARGE: [1.0, 1.0], MIDDLE: [2.0, 2.0], SMALL: [3.0, 3.0]}, TILES)
    assert made.chosen([LARGE, MIDDLE], 0) == MIDDLE
    assert made.best_list() == [LARGE]


def test_what_does_not_run_is_not_on_the_list():
    made = search({LARGE: [math.inf, 1.0], MIDDLE: [2.0, math.inf], SMALL: [3.0, 3.0]}, TILES)
    assert made.best_list() == [LARGE, MIDDLE]
    made = search({LARGE: [math.inf, 1.0], MIDDLE: [math.inf, 2.0], SMALL: [3.0, 3.0]}, TILES)
    assert made.chosen(made.best_list(), 0) == SMALL
    assert search({LARGE: [math.inf, math.inf]}, TILES).best_list() == []


def test_lists_go_from_large_tiles_to_small():
    made = search({SMALL: [1.0, 9.0], MIDDLE: [2.0, 5.0], LARGE: [9.0, 1.0]}, TILES)
    areas = [tune.area(config) for config in made.best_list()]
    assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("kernel", KINDS)
def test_candidates_are_different_and_of_their_kind(kernel, arithmetic):
    found = list(tune.candidates(kernel, arithmetic))
    assert len(set(found)) == len(found) > 50
    assert all(type(config) is KINDS[kernel] for config in found)
    for config in found:
        sides = [n for name, n in vars(config).items() if name.startswith("block_")]
        assert all(n & (n - 1) == 0 for n in sides)


class FakeClock(Clock):
    """Runs the call; seconds are made up."""

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__(CPU)
        self.seconds = seconds

    def once(self, run: Any, prepare: Any = None, waits_for_host: bool = True) -> float:
        run()
        return self.seconds


def workload(result: torch.Tensor, is_right: bool = True) -> Workload:
    return Workload("w", lambda: [result], lambda found: is_right, lambda config: 1)


def test_a_wrong_candidate_is_not_timed(capsys):
    assert tune.attempt(SMALL, workload(torch.ones(3)), FakeClock(0.5)) == 0.5
    assert tune.attempt(SMALL, workload(torch.ones(3), is_right=False), FakeClock()) == math.inf
    assert "is wrong" in capsys.readouterr().out


def test_a_candidate_that_does_not_compile_is_left_out(capsys):
    def fail() -> list[torch.Tensor]:
        raise RuntimeError("out of resource: shared memory")

    assert tune.attempt(SMALL, Workload("w", fail, lambda found: True, lambda config: 1), FakeClock()) == math.inf
    assert "out of resource: shared memory" in capsys.readouterr().out


def test_a_checked_result_is_overwritten():
    """A candidate that writes nothing must not pass by what the one before it left in the same memory."""
    result = torch.ones(3)
    tune.attempt(SMALL, workload(result), FakeClock())
    assert result.isnan().all()


@pytest.mark.skipif(not INTERPRETED, reason="needs interpreted kernels")
@pytest.mark.parametrize("kernel", KINDS)
def test_the_check_tells_right_from_wrong(kernel):
    made = make_workload(kernel, "ieee", QUICK_SHAPE, CPU)
    config = table()[80]["ieee"]
    with tune.with_config(getattr(config, kernel)[-1]):
        found = made.run()
    assert made.is_right(found)
    assert made.tiles(getattr(config, kernel)[-1]) >= 1
    found[0] = found[0] * 1.001
    assert not made.is_right(found)
    found[0] = torch.full_like(found[0], torch.nan)
    assert not made.is_right(found)
    assert set(DTYPES) == set(ARITHMETICS)


def run(configs: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The whole program with made-up seconds: the smaller the tile, the faster."""
    monkeypatch.setattr(tune, "attempt", lambda config, workload, clock: float(tune.area(config)))
    fixed = ["--device", "cpu", "--quick", "--budget", "0.5", "--configs", str(configs)]
    return tune.main([*fixed, *arguments], clock=FakeClock())


@pytest.mark.skipif(not INTERPRETED, reason="needs interpreted kernels")
def test_only_what_was_searched_is_rewritten(configs, monkeypatch, capsys):
    before = json.loads(configs.read_text())
    assert run(configs, monkeypatch, "--arithmetic", "ieee", "--kernel", "project_taps", "strip") == 0
    text = configs.read_text()
    after = json.loads(text)
    arch = f"sm_{target_of(CPU).capability}"
    for kernel in ("project_taps", "strip"):
        (row,) = after[arch]["ieee"].pop(kernel)
        assert row != before[arch]["ieee"].pop(kernel)[0]
        assert KINDS[kernel](**row) in tune.candidates(kernel, "ieee")
    assert after == before
    assert tune.as_text(json.loads(text)) == text
    said = capsys.readouterr().out
    assert "before" in said
    assert "after" in said
    assert f"{arch} rewritten" in said


def test_tiles_that_need_tma_are_not_the_only_ones():
    def tile(side: int, needs_tma: bool) -> TwoPhaseConfig:
        return TwoPhaseConfig(64, 64, 32, side, side, 32, 8, 1, 8, 3, needs_tma)

    committed = [tile(128, True), tile(64, False)]
    found = tune.usable_everywhere([tile(256, False), tile(128, False)], committed)
    assert found == [tile(256, True), tile(128, True), tile(64, False)]
    found = tune.usable_everywhere([tile(128, False), tile(32, False)], committed)
    assert found == [tile(128, True), tile(32, False)]
    assert tune.usable_everywhere([MIDDLE], [LARGE, SMALL]) == [MIDDLE]


def test_every_list_of_the_table_has_tiles_that_need_no_tma():
    for arch, arithmetic in ((arch, arithmetic) for arch in table() for arithmetic in ARITHMETICS):
        configs = table()[arch][arithmetic]
        for rows in (configs.two_phase, configs.grouped_gemm):
            assert not all(config.needs_tma for config in rows)


@pytest.mark.skipif(not INTERPRETED, reason="needs interpreted kernels")
def test_a_dry_run_leaves_the_table(configs, monkeypatch, capsys):
    before = configs.read_text()
    assert run(configs, monkeypatch, "--dry-run", "--arithmetic", "ieee", "--kernel", "project_taps") == 0
    assert configs.read_text() == before
    assert "left as it is" in capsys.readouterr().out


@pytest.mark.skipif(not INTERPRETED, reason="needs interpreted kernels")
def test_a_new_architecture_begins_with_its_predecessors_rows(configs, monkeypatch):
    rows = json.loads(configs.read_text())
    known = rows.pop("sm_80")
    rows["sm_75"] = known
    configs.write_text(tune.as_text(rows))
    assert run(configs, monkeypatch, "--arithmetic", "ieee", "--kernel", "project_taps") == 0
    after = json.loads(configs.read_text())
    assert after["sm_80"]["half"] == known["half"]
    assert after["sm_80"]["ieee"]["project_taps"] != known["ieee"]["project_taps"]
    assert after["sm_75"] == known


def test_without_a_gpu_nothing_is_tuned(configs, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = configs.read_text()
    assert tune.main(["--configs", str(configs)]) == 1
    assert configs.read_text() == before
    assert "no CUDA device" in capsys.readouterr().out
