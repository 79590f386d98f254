"""The GPU script's own pieces, as far as they run without one: steps, checks, verdicts, and the times' code path."""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import needs_a_compiler, on_host
from torch import Tensor

from bench.gpu import __main__ as script
from bench.gpu import (
    case_timing,
    cuda_library,
    device_facts,
    kernel_counts,
    kernel_times,
    processes,
    sanitizer,
    sanitizer_checks,
    sharded_tests,
    summary,
    timing,
)
from bench.gpu.cases import CASES, LARGE, QUICK, SMALL, Case, make_problem
from bench.gpu.clock import Clock, in_turn
from bench.gpu.precision import TruncatedProducts, tf32, truncated
from bench.gpu.processes import Step, finish, run_step, shorten
from bench.gpu.reference import Reference, deviation_of, make_reference
from bench.gpu.regions import BACKWARD, BP, EVERYWHERE, OURS, STEP, UPDATE, ByHand, Region, Regions, gradients_of
from dfa_kernels.backends.triton.launch import INTERPRETED

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    for module in (processes, timing, sharded_tests):
        monkeypatch.setattr(module, "TICK", 0.05)


@pytest.fixture(scope="module")
def problem():
    return make_problem(QUICK[0], CPU, "torch")


@pytest.fixture(scope="module")
def references(problem):
    return case_timing.make_references(problem)


def python_step(tmp_path: Path, code: str, limit: float = 20.0, **how: Any) -> Any:
    return run_step("s", [sys.executable, "-c", code], tmp_path / "s.log", limit, **how)


def test_a_step_tells_how_it_ended_and_logs_what_it_says(tmp_path):
    outcome = python_step(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (outcome.status, outcome.exit_code) == ("failed", 3)
    assert (tmp_path / "s.log").read_text().split() == ["out", "err"]
    assert python_step(tmp_path, "print('fine')").status == "ok"


def test_a_step_is_ended_at_its_limit_with_all_that_it_started(tmp_path):
    sign = tmp_path / "sign"
    child = f"import time, pathlib; time.sleep(1.2); pathlib.Path({str(sign)!r}).write_text('alive')"
    parent = f"import subprocess, sys; print('began'); subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    outcome = python_step(tmp_path, parent, limit=0.5)
    assert outcome.status == "ended at its limit"
    assert time.monotonic() - began < 1.2
    assert (tmp_path / "s.log").read_text() == "began\n"
    time.sleep(1.2)
    assert not sign.exists()


def test_processes_are_ended_at_the_deadline():
    codes = ["import time; time.sleep(60)", "import sys; sys.exit(3)", "import time; time.sleep(60)"]
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert finish(processes, time.monotonic() + 2) == [None, 3, None]
    assert all(process.returncode is not None for process in processes)


def test_a_steps_results_are_looked_at_while_it_runs(tmp_path):
    looks: list[float] = []
    python_step(tmp_path, "import time; time.sleep(0.3)", on_tick=lambda: looks.append(time.monotonic()))
    assert len(looks) >= 2


def test_a_long_log_keeps_both_ends(tmp_path):
    log = tmp_path / "log"
    log.write_text("a" * 1000 + "b" * 5000 + "c" * 1000)
    shorten(log, 2000)
    text = log.read_text()
    assert text.startswith("a" * 1000 + "\n")
    assert text.endswith("\n" + "c" * 1000)
    assert "5000 bytes left out" in text


def test_results_are_json_whatever_they_hold(tmp_path):
    path = tmp_path / "r.json"
    processes.write(path, {1: [math.inf, -math.inf, math.nan, (1.5, None)]})
    assert processes.read(path) == {"1": ["inf", "-inf", "nan", [1.5, None]]}
    assert processes.read(tmp_path / "none.json") is None


TESTS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(5))
def test_many(i): assert i != 3
@pytest.mark.gpu
def test_skipped(): pytest.skip("no reason")
def test_not_chosen(): assert False
@pytest.mark.gpu
def test_that_ends_everything():
    import os
    if {fatal}: os._exit(7)
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(2))
def test_behind_it(i): assert i == 1
"""

HANGING = """
import pytest, time
@pytest.mark.gpu
@pytest.mark.parametrize("i", range(4))
def test_one(i):
    if i == 1: time.sleep(60)
"""


@pytest.mark.parametrize("fatal", [False, True])
def test_tests_run_in_parts(tmp_path, fatal):
    (tmp_path / "test_some.py").write_text(TESTS.format(fatal=fatal))
    out = tmp_path / "tests.json"
    code = sharded_tests.main(
        ["--json", str(out), "--limit", "60", "--processes", "2", "--tests", str(tmp_path / "test_some.py")]
    )
    found = processes.read(out)
    assert code == 1
    assert found["passed"] == (5 if fatal else 6)
    assert {name.split("::")[1] for name in found["failed"]} == {"test_many[3]", "test_behind_it[0]"}
    assert all("assert" in why for why in found["failed"].values())
    assert [why for why in found["skipped"].values()] == ["Skipped: no reason"]
    assert [name.split("::")[1] for name in found["unfinished"]] == ["test_that_ends_everything"] * fatal


def test_a_test_that_hangs_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_tests, "TEST_LIMIT", 1.0)
    path, out = tmp_path / "test_some.py", tmp_path / "tests.json"
    path.write_text(HANGING)
    assert sharded_tests.main(["--json", str(out), "--limit", "30", "--processes", "1", "--tests", str(path)]) == 1
    found = processes.read(out)
    assert found["passed"] == 3
    assert [name.split("::")[1] for name in found["unfinished"]] == ["test_one[1]"]


def test_tf32_switches_torch_and_back():
    before = torch.get_float32_matmul_precision()
    with tf32(True):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        with tf32(False):
            assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert torch.get_float32_matmul_precision() == before


def test_truncation_leaves_ten_bits_of_mantissa():
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, -(1 + 2**-10 + 2**-11), 0.0])
    assert truncated(x).tolist() == [1 + 2**-10, 1.0, -(1 + 2**-10), 0.0]
    a, b = torch.randn(7, 5), torch.randn(5, 3)
    with TruncatedProducts():
        found = [a @ b, torch.addmm(torch.ones(3), a, b)]
    expected = truncated(a) @ truncated(b)
    assert torch.equal(found[0], expected)
    torch.testing.assert_close(found[1], expected + 1)


def test_how_much_faster_dfa_can_be():
    """Without an input layer to speak of: twice in the backward pass, one and a half times in a step."""
    limits = LARGE.limits()
    assert limits["backward"] == pytest.approx(2, rel=0.02)
    assert limits["step"] == pytest.approx(1.5, rel=0.02)
    assert SMALL.weight_flops == 2 * 128 * (3072 * 800 + 2 * 800 * 800 + 8000)
    assert SMALL.chain_flops == 2 * 128 * (2 * 800 * 800 + 8000)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_every_variant_computes_the_same(name, case):
    own = make_problem(case, CPU, "torch")
    references = case_timing.make_references(own)
    rows = case_timing.check_variant(own, name, EVERYWHERE[name], references, time.monotonic() + 60)
    assert STEP in rows
    # The same each time: both runs begin from the same weights.
    assert all(row["correct"] and row["repeats"] for row in rows.values()), rows


def changed_region(variant: str, region: str, change: Callable[[Region], None]) -> Callable[..., Regions]:
    def made(problem: Any, lr: float) -> Regions:
        regions = EVERYWHERE[variant](problem, lr)
        own, run = regions[region], regions[region].run

        def wrong() -> None:
            run()
            change(own)

        own.run = wrong
        return regions

    return made


@torch.no_grad()
def off_by_a_thousandth(region: Region) -> None:
    next(region.net.parameters()).mul_(1.001)


def halved_gradient(region: Region) -> None:
    list(region.net.parameters())[2].grad.mul_(0.999)


def not_a_number(region: Region) -> None:
    list(region.net.parameters())[2].grad[0] = math.nan


def missing(region: Region) -> None:
    list(region.net.parameters())[-1].grad = None


WRONG = [
    (STEP, off_by_a_thousandth),
    (UPDATE, off_by_a_thousandth),
    (BACKWARD, halved_gradient),
    (BACKWARD, not_a_number),
    (BACKWARD, missing),
]


@pytest.mark.parametrize(("region", "change"), WRONG)
def test_a_wrong_variant_is_told_and_not_timed(problem, references, region, change):
    named = {BP: EVERYWHERE[BP], OURS: changed_region(OURS, region, change)}
    regions, rows = case_timing.check_all(problem, named, references, time.monotonic() + 60)
    assert not rows[region][OURS]["correct"]
    assert region not in regions[OURS]
    case_timing.time_region(Clock(CPU), region, regions, rows, 0.05, 2)
    assert rows[region][BP]["seconds"] > 0
    assert "seconds" not in rows[region][OURS]
    assert "off by" in timing.cell(rows[region][OURS]) or "results are there" in timing.cell(rows[region][OURS])


TILED = Case("tiles", 300, 260, 2, 10, 8, "float32")
"""weight 0 is 3 × 3 tiles of 128, as weight 1 is; the output layer's is 1 × 3."""


@pytest.fixture(scope="module")
def tiled():
    """The reference's gradients for a network of several tiles."""
    return make_reference(make_problem(TILED, CPU, "torch"), "DFA", given_error=True)


def computed(reference: Reference, *changes: Callable[[list[Tensor]], object]) -> Callable[[], list[Tensor]]:
    """Plain torch's gradients, changed by one after the other each time they are computed, and by the last again."""
    left = list(changes)

    def compute() -> list[Tensor]:
        found = [tensor.clone() for tensor in reference.plain[0]]
        (left.pop(0) if len(left) > 1 else left[0])(found)
        return found

    return compute


def right(found: list[Tensor]) -> None:
    pass


def one_tile(found: list[Tensor]) -> None:
    found[2][128:256, :128] += 1


def the_last_column(found: list[Tensor]) -> None:
    found[0][:, -1] += 1


def every_number(found: list[Tensor]) -> None:
    found[4] *= 1.001


def one_infinity(found: list[Tensor]) -> None:
    found[0] += 1
    found[3][200] = math.inf


def a_last_bit(found: list[Tensor]) -> None:
    found[1][0] = torch.nextafter(found[1][0], torch.tensor(9.0))


CHANGES = [
    ([one_tile], "weight 1 [260, 260]", 1, 9, True),
    ([the_last_column], "weight 0 [260, 300]", 3, 9, True),
    ([every_number], "weight 2 [10, 260]", 3, 3, True),
    ([one_infinity], "bias 1 [260]", 1, 3, True),
    ([one_tile, one_infinity], "bias 1 [260]", 1, 3, False),
    ([one_infinity, right], "bias 1 [260]", 1, 3, False),
    ([right, one_tile], "weight 1 [260, 260]", 1, 9, False),
]


@pytest.mark.parametrize(("changes", "tensor", "wrong", "tiles", "repeats"), CHANGES)
def test_a_wrong_result_says_where_it_is_wrong_and_whether_it_repeats(
    tiled, tmp_path, changes, tensor, wrong, tiles, repeats
):
    processes.write(tmp_path / "row.json", tiled.check(computed(tiled, *changes), updated=False).row())
    row = processes.read(tmp_path / "row.json")
    assert not row["correct"]
    assert (row["tensor"], row["wrong_tiles"], row["tiles"], row["repeats"]) == (tensor, wrong, tiles, repeats)
    how = "the same each time" if repeats else "differently each time"
    error, allowed = float(row["error"]), row["allowed"]
    assert math.isfinite(error) is (tensor != "bias 1 [260]")
    expected = f"wrong: {tensor}, off by {error:.1e}, allowed {allowed:.1e}, in {wrong} of {tiles} tiles, {how}"
    assert timing.cell(row).strip() == expected


def test_a_number_that_is_none_repeats(tiled):
    def nowhere(found: list[Tensor]) -> None:
        found[5][3] = math.nan

    row = tiled.check(computed(tiled, nowhere), updated=False).row()
    assert math.isnan(row["error"])
    assert (row["tensor"], row["wrong_tiles"], row["tiles"], row["repeats"]) == ("bias 2 [10]", 1, 1, True)


def test_infinity_is_wrong_where_plain_torch_is_infinitely_far_off():
    found = deviation_of("weight 0 [1, 200]", torch.full((1, 200), math.inf), torch.zeros(1, 200), math.inf)
    assert not found.correct
    assert (found.wrong_tiles, found.tiles, found.badness) == (2, 2, math.inf)


def test_a_right_result_that_does_not_repeat_is_right(tiled):
    row = tiled.check(computed(tiled, right, a_last_bit), updated=False).row()
    assert row["correct"]
    assert not row["repeats"]
    assert row.keys() == {"correct", "error", "allowed", "repeats"}
    assert "differs from run to run" in timing.cell({**row, "seconds": 1e-6})
    row = tiled.check(computed(tiled, right), updated=False).row()
    assert row["correct"]
    assert row["repeats"]
    assert timing.cell({**row, "seconds": 1e-6}).strip() == "1.0 µs"


def test_updated_weights_are_named_as_their_gradients_are(tiled):
    def compute() -> list[Tensor]:
        rate = tiled.learning_rate
        found = [w - rate * g for w, g in zip(tiled.weights, tiled.plain[0], strict=True)]
        found[3][0] += 1
        return found

    row = tiled.check(compute, updated=True).row()
    assert (row["tensor"], row["wrong_tiles"], row["tiles"]) == ("bias 1 [260]", 1, 3)


def test_rows_of_older_results_still_print():
    row = {"correct": False, "error": 0.00011, "allowed": 2.3e-05}
    assert timing.cell(row).strip() == "wrong result: off by 1.1e-04, allowed 2.3e-05"
    assert timing.cell({"correct": True, "error": 0.0, "allowed": 1.0, "seconds": 2e-6}).strip() == "2.0 µs"


def test_what_is_right_and_could_not_be_timed_is_not_called_wrong():
    row = {"correct": True, "error": 0.0, "allowed": 1.0, "repeats": True}
    assert timing.cell(row).strip() == "not timed"
    assert timing.cell({**row, "reason": "why"}).strip() == "why"


def test_a_step_that_changes_nothing_is_wrong(problem, references):
    def idle(own: Any, lr: float) -> Regions:
        made = EVERYWHERE[BP](own, lr)
        made[STEP].run = lambda: None
        return made

    assert not case_timing.check_variant(problem, BP, idle, references, time.monotonic() + 60)[STEP]["correct"]


def test_gradients_left_from_the_run_before_are_wrong(problem, references):
    hand = ByHand(problem, 0.0)
    runs = [hand.backward]
    region = Region(lambda: runs.pop()() if runs else None, hand.net, gradients_of(hand.net), hand.forward)
    row = case_timing.check_region(problem, region, references["DFA", True], BACKWARD)
    assert not row["correct"]
    assert not row["repeats"]


def test_a_variant_that_cannot_be_made_is_told(problem, references):
    def failing(own: Any, lr: float) -> Regions:
        raise RuntimeError("out of something\nand more")

    rows = case_timing.check_variant(problem, OURS, failing, references, time.monotonic() + 60)
    assert rows == {STEP: {"correct": False, "reason": "RuntimeError: out of something"}}


def test_the_compiled_variant_has_a_limit(monkeypatch):
    monkeypatch.setattr(case_timing, "COMPILE_SECONDS", 0.3)
    name, now = case_timing.BP_COMPILED, time.monotonic()
    with pytest.raises(TimeoutError, match="within"), case_timing.guarded(name, now + 9):
        time.sleep(5)
    with pytest.raises(TimeoutError, match="left"), case_timing.guarded(name, now):
        pass


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU here, see test_gpu.py")
def test_ways_of_wide_networks_are_compared(monkeypatch):
    """Each gives the right gradients by its own launches."""
    monkeypatch.setattr(kernel_times, "SMALLEST_WIDE", 0)
    own = make_problem(QUICK[0], CPU, "triton")
    operator = kernel_times.make_operator(own)
    ways = dict(kernel_times._ways(own, operator))
    assert list(ways) == ["layer_grads", "strip", "two_phase", "grouped_gemm", "products"]
    for name, expected in (("grouped_gemm", {"deltas": 1, "grouped_gemm": 1}), ("products", {"deltas": 1})):
        with ways[name], sanitizer_checks.launches() as launched:
            found = operator.grads()
        assert launched == expected
        assert make_reference(own, "DFA", given_error=True).deviation(found, updated=False).correct


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU here, see test_gpu.py")
def test_the_kernels_are_compared():
    own = make_problem(QUICK[0], CPU, "triton")
    reference = make_reference(own, "DFA", given_error=True)
    rows = kernel_times.compare_kernels(own, reference, Clock(CPU), 0.0)
    assert list(rows) == ["layer_grads", "strip", "two_phase", kernel_times.LIBRARY]
    assert all(row["correct"] and row["seconds"] > 0 for row in rows.values())
    assert all(rows[name]["repeats"] for name in ("layer_grads", "strip", "two_phase"))
    assert "strip" in rows["layer_grads"]["plan"]
    for gradients in (reference.exact, *reference.plain):
        gradients[0] *= 1.01
    rows = kernel_times.compare_kernels(own, reference, Clock(CPU), 0.0)
    assert not rows["two_phase"]["correct"]
    assert rows["two_phase"]["tensor"] == "weight 0 [16, 24]"
    assert "seconds" not in rows["two_phase"]


def test_measures_take_turns():
    order: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        return lambda: float(len(order.append(name) or order))

    found = in_turn({name: measure(name) for name in "abc"}, seconds=0.0, least=2, warm_up=1)
    assert "".join(order) == "abcbcacab"
    assert found == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_host_time_is_of_the_call_alone():
    clock = Clock(CPU)
    seconds = kernel_times.mean_host_seconds(clock, lambda: time.sleep(0.002), 5, prepare=lambda: time.sleep(0.01))
    assert 0.002 <= seconds < 0.01


def quick_times(tmp_path: Path, *arguments: str) -> tuple[int, Any]:
    path = tmp_path / "time.json"
    code = timing.main(["--json", str(path), "--quick", "--device", "cpu", *arguments])
    return code, processes.read(path)


def test_times_on_a_cpu(tmp_path):
    name = QUICK[0].name
    code, found = quick_times(tmp_path, "--limit", "60", "--items", timing.CEILINGS, timing.HOST, name)
    assert code == 0
    assert found["unfinished"] == {}
    assert found["items"][timing.CEILINGS]["bytes"] > 0
    assert found["items"][timing.HOST]["layer_grads"] > 0
    rows = found["items"][name]["regions"]
    assert set(rows[STEP]) == set(EVERYWHERE)
    assert all(row["seconds"] > 0 for region in rows.values() for row in region.values())
    assert re.search(r"dfa\.DFA +[0-9.]+ µs", timing.report(found))


def test_an_item_that_loses_its_process_costs_only_itself(tmp_path, monkeypatch):
    def command(options: Any, part: str, path: Path, limit: float, items: list[str]) -> list[str]:
        made = {"items": {items[0]: {"reason": "made up"}}, "current": items[1] if len(items) > 1 else None}
        write = f"import pathlib, os; pathlib.Path({str(path)!r}).write_text({json.dumps(made)!r}); "
        return [sys.executable, "-c", write + f"os._exit({len(items) > 1})"]

    monkeypatch.setattr(timing, "_command", command)
    code, found = quick_times(tmp_path, "--limit", "30", "--items", "a", "b", "c", "d", "e")
    assert code == 1
    assert list(found["items"]) == ["a", "c", "e"]
    assert found["unfinished"] == dict.fromkeys("bd", "the process was lost with exit code 1")


def test_an_item_that_hangs_is_left_out(tmp_path, monkeypatch):
    def command(options: Any, part: str, path: Path, limit: float, items: list[str]) -> list[str]:
        write = f"import pathlib, time; pathlib.Path({str(path)!r}).write_text("
        return [sys.executable, "-c", write + f"{json.dumps({'items': {}, 'current': items[0]})!r}); time.sleep(30)"]

    monkeypatch.setattr(timing, "_command", command)
    monkeypatch.setattr(timing, "ITEM_LIMIT", 0.3)
    code, found = quick_times(tmp_path, "--limit", "30", "--items", "a", "b")
    assert code == 1
    assert list(found["unfinished"]) == ["a", "b"]
    assert all(re.match(r"it did not come to an end within \d+ s", why) for why in found["unfinished"].values())


def test_there_is_nothing_to_time_without_a_gpu(tmp_path, capsys):
    path = str(tmp_path / "none.json")
    assert timing.main(["--json", path, "--device", "cpu"]) == 1
    assert "no CUDA device" in capsys.readouterr().out


def test_device_activities_are_those_of_the_device():
    events = [
        {"cat": "kernel", "name": "second", "ts": 7},
        {"cat": "gpu_user_annotation", "name": "a label", "ts": 1},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 1},
        {"cat": "gpu_memset", "name": "Memset", "ts": 3},
        {"name": "without a category"},
    ]
    assert kernel_counts.names_in_trace({"traceEvents": events}) == ["Memset", "second"]
    assert kernel_counts.Counted(("strip",)).are_ours
    assert kernel_counts.Counted(("deltas", "grouped_gemm")).are_ours
    assert not kernel_counts.Counted(("strip", "sgemm")).are_ours
    assert not kernel_counts.Counted(()).are_ours


CLEAN = "========= ERROR SUMMARY: 0 errors"
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
RAN = {"a": {"launched": {"strip": 1}}, "b": {"launched": {"strip": 1, "two_phase": 2}}}


@pytest.mark.parametrize(
    ("code", "text", "rows", "clean"),
    [
        (0, CLEAN, RAN, True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", RAN, True),
        (0, RACES, RAN, False),
        (99, "========= ERROR SUMMARY: 10 errors", RAN, False),
        (99, CLEAN, RAN, False),
        (0, "nothing was said", RAN, False),
        (None, CLEAN, RAN, False),
        (0, CLEAN, {}, False),
        (0, CLEAN, {"a": RAN["a"]}, False),
    ],
)
def test_what_the_memory_checker_says(code, text, rows, clean):
    found = sanitizer.verdict(sanitizer.Ended(code, text, rows), ["a", "b"])
    assert found["clean"] is clean
    assert found["launched"] == ({"strip": 2, "two_phase": 2} if len(rows) == 2 else {"strip": 1} if rows else {})


CHECKER = """#!{python}
import subprocess, sys, time
options = sys.argv[1 : sys.argv.index({python!r})]
if options[:2] == ["--tool", {hangs!r}]: time.sleep(60)
assert options[-2:] == ["--kernel-name-exclude", "kns=_ZN2at"]
code = subprocess.run(sys.argv[len(options) + 1 :]).returncode if {runs} else 0
print({says!r})
sys.exit(code)
"""


def fake_checker(tmp_path: Path, says: str, runs: bool = True, hangs: str = "") -> str:
    tool = tmp_path / "checker"
    tool.write_text(CHECKER.format(python=sys.executable, says=says, runs=runs, hangs=hangs))
    tool.chmod(0o755)
    return str(tool)


PROGRAM = """
import json, sys, time
path, *checks = sys.argv[1:]
rows = {}
for check in checks:
    kernel, state = check.split()
    if state == "hangs": time.sleep(60)
    if state == "fails": sys.exit(3)
    rows[check] = dict(launched={kernel: 1}, correct=state == "right", off=0.5, allowed=0.1)
    open(path, "w").write(json.dumps(rows))
"""


def sanitized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, checks: list[str], limit: float = 60) -> Any:
    """The step's exit status and results, with checks of a made-up program."""
    program = [sys.executable, "-c", PROGRAM]
    monkeypatch.setattr(sanitizer, "_program", lambda made, checks: [*program, str(made), *checks])
    monkeypatch.setattr(sanitizer, "CHECKS", [argparse.Namespace(name=name) for name in checks])
    path = tmp_path / "s.json"
    return sanitizer.main(["--json", str(path), "--limit", str(limit), "--tool", tool]), processes.read(path)


@pytest.mark.parametrize(("says", "runs", "expected"), [(CLEAN, True, 0), (RACES, True, 1), (CLEAN, False, 1)])
def test_the_memory_checker_runs_with_every_tool(tmp_path, monkeypatch, says, runs, expected):
    tool = fake_checker(tmp_path, says, runs)
    code, found = sanitized(tmp_path, monkeypatch, tool, ["k right", "l right"])
    assert code == expected
    assert sanitizer.TOOLS == ("memcheck", "racecheck", "synccheck")
    for name in sanitizer.TOOLS:
        assert found[name]["clean"] is not bool(expected)
        assert found[name]["launched"] == ({"k": 1, "l": 1} if runs else {})


def test_a_check_that_fails_or_hangs_by_itself_is_no_finding(tmp_path, monkeypatch):
    """What is only wrong may be so because of what a tool finds, and stays."""
    monkeypatch.setattr(sanitizer, "PLAIN_SHARE", 0.1)
    checks = ["k right", "l fails", "m hangs", "n wrong"]
    code, found = sanitized(tmp_path, monkeypatch, fake_checker(tmp_path, CLEAN), checks, limit=30)
    assert code == 1
    assert [row["exit_code"] for row in found["checks"].values()] == [0, 3, None, 0]
    for name in sanitizer.TOOLS:
        assert found[name] == {
            "clean": True, "exit_code": 0, "summary": "0 errors", "launched": {"k": 1, "n": 1},
        }  # fmt: skip
    lines = summary._sanitizer(found).splitlines()
    assert lines[:3] == [
        "- l fails: fails without a tool, with exit code 3; launched {}",
        "- m hangs: did not end in time without a tool",
        "- n wrong: wrong without a tool: off by 5.0e-01, allowed 1.0e-01",
    ]
    assert lines[3] == "- memcheck: 0 errors (clean: True; launched: k 1, n 1)"


def test_a_tool_that_hangs_costs_only_itself(tmp_path, monkeypatch):
    tool = fake_checker(tmp_path, CLEAN, hangs="racecheck")
    code, found = sanitized(tmp_path, monkeypatch, tool, ["k right"], limit=sanitizer.SPARE + 5)
    assert code == 1
    assert [found[name]["clean"] for name in sanitizer.TOOLS] == [True, False, True]
    assert found["racecheck"]["exit_code"] is None


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU here, under the tool itself")
def test_the_memory_checker_sees_the_kernels(tmp_path, monkeypatch):
    (check,) = [check for check in sanitizer_checks.CHECKS if check.call is sanitizer_checks.hadamard]
    monkeypatch.setattr(sanitizer, "CHECKS", [check])
    monkeypatch.setattr(sanitizer, "TOOLS", ["synccheck"])
    path = tmp_path / "s.json"
    tool = fake_checker(tmp_path, CLEAN)
    assert sanitizer.main(["--json", str(path), "--limit", "100", "--tool", tool]) == 0
    assert processes.read(path)["synccheck"]["launched"] == {"hadamard_kernel": 1}


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU here, under the tool itself")
def test_every_kernel_has_a_check_that_launches_it(tmp_path):
    path = tmp_path / "s.json"
    assert sanitizer_checks.main(["--json", str(path)]) == 0
    found = processes.read(path)
    assert list(found) == [check.name for check in sanitizer_checks.CHECKS]
    # Interpreted products are in float32; what strips round to tf32 before them is rounded here as well.
    rounded = "strip grads tf32"
    assert all(row["correct"] and row["off"] < (1e-3 if name == rounded else 1e-5) for name, row in found.items())
    launched = [found[check.name]["launched"] for check in sanitizer_checks.CHECKS]
    first = {"grouped_gemm": {"deltas": 1}}
    assert launched == [first.get(check.kernel, {}) | {check.kernel: 1} for check in sanitizer_checks.CHECKS]


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU here, under the tool itself")
def test_a_check_without_its_kernel_fails_and_a_wrong_one_is_told(tmp_path, monkeypatch):
    check = sanitizer_checks.Check("strip", sanitizer_checks.hadamard, "float32", sanitizer_checks.EVEN, 10)
    monkeypatch.setattr(sanitizer_checks, "CHECKS", (check,))
    monkeypatch.setattr(sanitizer_checks.torch_backend, "hadamard", lambda x, scale: torch.full_like(x, math.nan))
    path = tmp_path / "s.json"
    assert sanitizer_checks.main(["--json", str(path)]) == 1
    row = processes.read(path)[check.name]
    assert row == {"launched": {"hadamard_kernel": 1}, "correct": False, "off": "nan", "allowed": 1e-2}


def test_without_a_memory_checker_the_step_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    path = tmp_path / "s.json"
    assert sanitizer.main(["--json", str(path)]) == 0
    assert "was not found" in capsys.readouterr().out
    assert processes.read(path) == {"tool": None}


GOOD: dict[str, dict[str, float]] = {
    STEP: {
        BP: 300, OURS: 140, summary.OURS_TORCH_SGD: 200, summary.BP_GRAPHED: 210, summary.OURS_GRAPHED: 100,
        summary.BP_GRAPHED_STEP: 60, summary.OURS_GRAPHED_STEP: 28,
    },
    BACKWARD: {summary.BP_GRAPHED: 80, summary.BY_HAND_GRAPHED: 25, summary.OURS_GRAPHED: 10},
    UPDATE: {summary.BP_GRAPHED: 60, summary.OURS_GRAPHED: 11},
    "kernels": {summary.CHOSEN: 10, "strip": 9.8, summary.CUDA: 12, summary.LIBRARY: 9},
    timing.HOST: {summary.CHOSEN: 20},
    "profile": {"count": 1},
}  # fmt: skip
"""Microseconds of every case, and kernels, with which everything is reached."""


def made_up(change: tuple[str, str, float] | None = None) -> dict[str, Any]:
    """Results in which everything is reached, but for one number of `GOOD`."""
    good = copy.deepcopy(GOOD)
    if change is not None:
        good[change[0]][change[1]] = change[2]
    count = int(good["profile"]["count"])
    counted = {
        "backward is by our kernels": count > 0,
        "backward and SGD are by our kernels": count > 0,
        OURS: dict.fromkeys((BACKWARD, UPDATE, STEP), ["strip"] * count),
    }
    rows = {
        part: {name: {"correct": True, "seconds": microseconds * 1e-6} for name, microseconds in good[part].items()}
        for part in (STEP, BACKWARD, UPDATE, "kernels")
    }
    item = {"kernels": rows.pop("kernels"), "regions": rows}
    items: dict[str, Any] = {case.name: copy.deepcopy(item) for case in summary.CASES}
    items[timing.HOST] = {"correct": True, summary.CHOSEN: good[timing.HOST][summary.CHOSEN] * 1e-6}
    profiles = {case.name: copy.deepcopy(counted) for case in summary.PROFILED}
    return {"profile": profiles, "time": {"items": items, "unfinished": {}}}


def unmet(found: dict[str, Any]) -> list[str]:
    return [verdict.name for verdict in summary.verdicts(found) if not verdict.met]


def test_everything_reached_is_met():
    found = summary.verdicts(made_up())
    assert len(found) == 40
    assert all(verdict.met and verdict.measured is not None for verdict in found)


@pytest.mark.parametrize(
    ("change", "count", "word"),
    [
        ((STEP, OURS, 151), 1, "both eager"),
        ((STEP, summary.OURS_TORCH_SGD, 251), 1, "torch's SGD"),
        ((STEP, summary.BP_GRAPHED, 199), 2, "step over BP, both graphed"),
        ((STEP, summary.BP_GRAPHED, 144), 3, "step over BP, both graphed"),
        ((STEP, summary.BP_GRAPHED_STEP, 55), 2, "GraphedStep over BP's"),
        ((STEP, BP, 279), 2, "eager"),
        ((BACKWARD, summary.BP_GRAPHED, 69), 1, "backward over BP's"),
        ((BACKWARD, summary.BP_GRAPHED, 16), 4, "backward over BP's"),
        ((BACKWARD, summary.BY_HAND_GRAPHED, 20), 1, "by hand"),
        ((UPDATE, summary.BP_GRAPHED, 54), 1, "backward and SGD over BP's"),
        ((UPDATE, summary.BP_GRAPHED, 20), 4, "backward and SGD over BP's"),
        (("kernels", "strip", 9.5), 11, "the best of its ways"),
        (("kernels", summary.CUDA, 13.1), 2, "CUDA C++"),
        ((timing.HOST, summary.CHOSEN, 26), 1, "host"),
        (("profile", "count", 2), 2, "kernels"),
        (("profile", "count", 3), 6, "kernels"),
        (("profile", "count", 0), 6, "kernels"),
    ],
)
def test_what_is_not_reached_is_not_met(change, count, word):
    names = unmet(made_up(change))
    assert len(names) == count
    assert all(word in name for name in names)


def test_what_is_wrong_or_missing_is_not_met():
    found = made_up()
    rows = found["time"]["items"][LARGE.name]["regions"][STEP]
    rows[summary.OURS_GRAPHED] = {"correct": False, "error": 1.0, "allowed": 0.1}
    found["profile"][SMALL.name][OURS][BACKWARD] = ["sgemm"]
    found["profile"][SMALL.name]["backward is by our kernels"] = False
    found["time"]["items"][timing.HOST]["correct"] = False
    found["time"]["items"][timing.HOST] |= {"error": 1.0, "allowed": 0.1}
    notes = {verdict.name: verdict.note for verdict in summary.verdicts(found) if not verdict.met}
    assert notes == {
        f"{SMALL.name}: backward, kernels": "not our kernels: sgemm",
        f"{LARGE.name}: step over BP, both graphed": "dfa.DFA, graphed: wrong result: off by 1.0e+00, allowed 1.0e-01",
        "host's part of one layer_grads": "wrong result: off by 1.0e+00, allowed 1.0e-01",
    }
    assert len(unmet({})) == 40
    assert len(unmet({"quick": True, **made_up()})) == 1


@needs_a_compiler
@pytest.mark.parametrize("check", sanitizer_checks.CUDA_CHECKS, ids=lambda check: check.name)
def test_the_checks_of_the_cuda_library(check):
    with on_host():
        row = sanitizer_checks.run(check, CPU)
    assert row["launched"] == {check.kernel: 1}
    assert row["correct"]


def test_every_check_of_the_cuda_library_has_to_end_well():
    rows = {check.name: {"correct": True} for check in sanitizer_checks.CUDA_CHECKS}
    assert cuda_library.all_right(rows)
    assert not cuda_library.all_right({})
    assert not cuda_library.all_right(dict(list(rows.items())[1:]))
    assert not cuda_library.all_right(rows | {sanitizer_checks.CUDA_CHECKS[0].name: {"correct": False}})


def test_what_the_cuda_library_is_built_for():
    """sm_75's code as PTX wherever newer machine code runs; a V100 gets its own alone."""
    asked = [cuda_library.architectures(*capability) for capability in ((7, 0), (7, 5), (9, 0), (12, 0))]
    assert asked == ["7.0", "7.5+PTX", "7.5+PTX 9.0", "7.5+PTX 12.0"]


def test_the_report_names_every_verdict():
    found = made_up((timing.HOST, summary.CHOSEN, 30))
    found |= {"steps": [{"name": "env", "status": "ok", "seconds": 1.0}], "environment": {"gpu": "a GPU"}}
    found["requirements"] = [vars(verdict) for verdict in summary.verdicts(found)]
    found["tests"] = {
        "passed": 3,
        "failed": {"test_a": "why"},
        "skipped": {"test_b": "short of memory"},
        "unfinished": [],
    }
    found["sanitizer"] = {"tool": "t", "plain": 0, "memcheck": {"clean": True, "summary": "0 errors"}}
    found["time"]["items"] = {timing.HOST: found["time"]["items"][timing.HOST]}
    text = summary.markdown(found)
    assert "| host's part of one layer_grads | 30 | ≤ 25 µs | **not met** |" in text
    assert f"| {SMALL.name}: backward, kernels | 1 | ≤ 1 | met |" in text
    assert all(word in text for word in ("a GPU", "failed: test_a", "short of memory", "memcheck: 0 errors"))


def test_the_limits_leave_eight_minutes():
    assert sum(step.limit + script.EXTRA for step in script.STEPS) < 480
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_script_goes_on_after_a_step_that_fails(tmp_path, monkeypatch):
    steps = (
        Step("env", "bench.gpu.device_facts", 30),
        Step("tests", "bench.gpu.no_such_module", 10),
        Step("profile", "bench.gpu.no_such_module", 10),
    )
    monkeypatch.setattr(script, "STEPS", steps)
    out = tmp_path / "out"
    assert script.main([str(out), "--commit", "abc", "--dirty"]) == 1
    found = processes.read(out / "results.json")
    assert [step["status"] for step in found["steps"]] == ["ok", "failed", "failed"]
    assert found["environment"]["commit"] == "abc"
    assert found["environment"]["dirty"] is True
    assert found["environment"]["torch"] == torch.__version__
    assert len(found["requirements"]) == 40
    assert "No module named" in (out / "tests.log").read_text()
    names = [path.name for path in out.iterdir()]
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def test_the_script_refuses_unknown_steps(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), "--steps", "env,speed"])
    assert "--steps: got ['speed']" in capsys.readouterr().err


def test_the_facts_tell_the_commit_apart_from_its_changes(monkeypatch):
    machine = dict(device_facts.environment.describe())
    for commit, expected in {"0123": ("0123", False), "0123-dirty": ("0123", True), None: (None, None)}.items():
        monkeypatch.setattr(device_facts.environment, "describe", lambda commit=commit: {**machine, "commit": commit})
        facts = device_facts.describe()
        assert (facts["commit"], facts["dirty"]) == expected
        assert {"gpu", "driver", "cuda", "triton", "torch", "date"} <= facts.keys()
