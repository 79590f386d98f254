"""The roofline: machine code is read as a person reads it, and what follows from it is what a person computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from triton_versions import OWN_VENV, ROOT, THOROUGH

from bench import roofline, sass, time_model
from bench.cards import CARDS, KIB, Card
from bench.time_model import Kernel, Phase, Tiles, Work

RESULT = ROOT / "bench" / "results" / "predicted" / "roofline.json"
A100, RTX3090, RTX4090, H100, H200, RTX5090 = CARDS

# A loop over 0x20 … 0xb0, left by the branch at 0x90; what 0x60 jumps over is not run in every turn.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P2 EXIT ;
.L_x_3:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64], P1 ;
        /*0030*/                   LDGSTS.E [R9+0x400], [R4.64], P1 ;
        /*0040*/                   LDG.E.U16 R8, [R6.64] ;
        /*0050*/                   LDSM.16.MT88.4 R12, [R10] ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   FADD R20, R20, R21 ;
        /*0080*/                   STS [R22], R20 ;
.L_x_1:
        /*0090*/               @P3 CALL.REL.NOINC `(.L_x_2) ;
        /*00a0*/                   HMMA.16816.F32.BF16 R24, R12, R16, R24 ;
        /*00b0*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00c0*/                   STG.E.128 [R2.64], R24 ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   BRA `(.L_x_4);
"""


def test_instructions_and_loops() -> None:
    code = sass.instructions(LISTING)
    assert len(code) == 15
    assert code[1] == sass.Instruction(0x10, "EXIT", "", guarded=True)
    assert [(line.address, line.target) for line in code if line.target is not None] == [
        (0x60, 0x90), (0x90, 0xC0), (0xB0, 0x20), (0xE0, 0xE0),
    ]  # fmt: skip
    (body,) = sass.loops(code)
    assert (body[0].address, body[-1].address) == (0x20, 0xB0)
    assert sass.product_loops(code) == [body]


def test_shortest_and_longest_path() -> None:
    code = sass.instructions(LISTING)
    fewest = [line.address for line in sass.path(code, 0x20, {0xB0})]
    assert fewest == [0x20, 0x30, 0x40, 0x50, 0x60, 0x90, 0xA0, 0xB0]
    assert len(sass.path(code, 0x20, {0xB0}, longest=True)) == len(fewest) + 2
    assert [line.address for line in sass.path(code, 0, {0x10, 0xD0})] == [0, 0x10]
    with pytest.raises(ValueError, match="0xc0"):
        sass.path(code, 0xC0, {0x20})


def test_loads_by_width() -> None:
    """Asynchronous copies of 16 and 4 bytes, a load of 2; newer forms name descriptors and TMA."""
    assert sass.loads(sass.instructions(LISTING)) == {"cp.async 16 B": 1, "cp.async 4 B": 1, "LDG 2 B": 1}
    newer = """
        /*0000*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0010*/                   LDG.E.128 R4, desc[UR14][R2.64] ;
        /*0020*/                   LDG.E.64.CONSTANT R4, desc[UR14][R2.64] ;
        /*0030*/                   LDG.E.S8 R4, desc[UR14][R2.64] ;
        /*0040*/                   LDG.E.STRONG.GPU R4, desc[UR14][R2.64] ;
        /*0050*/                   LDS.128 R4, [R2] ;
    """
    assert sass.loads(sass.instructions(newer)) == {"TMA": 1, "LDG 16 B": 1, "LDG 8 B": 1, "LDG 1 B": 1}


@pytest.mark.parametrize(
    ("opcode", "operands", "operations", "shared"),
    [
        ("HMMA.16816.F32.BF16", "R24, R12, R16, R24", 2 * 16 * 8 * 16, 0),
        ("HMMA.1688.F32.TF32", "R24, R12, R16, R24", 2 * 16 * 8 * 8, 0),
        # Of four warps together: an eighth of 64 × 256 × 16 multiply-adds; 64 + 256 rows of 32 bytes are read.
        ("HGMMA.64x256x16.F32.BF16", "R24, gdesc[UR16], R24", 2 * 64 * 256 * 16 / 4, 320 * 32 / 4),
        ("HGMMA.64x32x8.F32.TF32", "R56, R72, gdesc[UR8], RZ, !UPT, gsb0", 2 * 64 * 32 * 8 / 4, 32 * 32 / 4),
        ("FFMA", "R1, R2, R3, R1", 64, 0),
        ("LDSM.16.MT88.4", "R12, [R10]", 0, 512),
        ("LDSM.16.M88", "R12, [R10]", 0, 128),
        ("LDS.64", "R12, [R10]", 0, 256),
        ("STG.E.U16", "[R2.64], R4", 0, 64),
        ("IADD3", "R1, R2, R3, RZ", 0, 0),
    ],
)  # fmt: skip
def test_what_an_instruction_does(opcode: str, operands: str, operations: float, shared: float) -> None:
    line = sass.Instruction(0, opcode, operands)
    assert (sass.operations(line), sass.shared_bytes(line)) == (operations, shared)


NOTHING = Work.of([])
EMPTY = Phase(NOTHING)


def kernel(registers: int = 64, shared: int = 0, warps: int = 4, stack: int = 0, phase: Phase = EMPTY) -> Kernel:
    return Kernel(registers, stack, 0, shared, warps, 3, phase)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs", "share"),
    [
        # 8 warps of 128 × 32 registers are 32768 of 65536.
        (80, 128, 0, 8, 2, 16 / 64),
        # 100 × 32 = 3200 registers of a warp are handed out as 3328, so 4 programs of 4 warps fit and not 5.
        (80, 100, 0, 4, 4, 16 / 64),
        # 81 KiB and the driver's own one: twice into 164 KiB, once into 100.
        (80, 32, 81 * KIB, 4, 2, 8 / 64),
        (86, 32, 81 * KIB, 4, 1, 4 / 48),
        (86, 32, 0, 4, 12, 1.0),
        (86, 16, 0, 1, 16, 16 / 48),
        (86, 32, 100 * KIB, 4, 0, 0.0),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, warps: int, programs: int, share: float) -> None:
    it = kernel(registers, shared, warps)
    assert time_model.programs_at_once(it, arch) == programs
    assert time_model.occupancy(it, arch) == pytest.approx(share)


@pytest.mark.parametrize(
    ("name", "card", "microseconds"),
    [
        # U of 3,211,264 × 1000, two times 32 × 3,211,264 and the error, 4 bytes each, at 3352 GB/s.
        ("tf32, matrix", H100, 4 * (3_211_264_000 + 2 * 32 * 3_211_264 + 32_000) / 3352e3),
        # 2 × 32 × 1000 × 3,211,264 operations at 35.6 TFLOP/s.
        ("tf32, gaussian", RTX3090, 64_000 * 3_211_264 / 35.6e6),
        # 13 bytes for each of 3136 blocks of 1024 units, the rest as above, at 2039 GB/s.
        ("tf32, fastfood", A100, (13 * 3_211_264 + 4 * (2 * 32 * 3_211_264 + 32_000)) / 2039e3),
        ("hadamard n=64 ", RTX4090, 8 * 2**26 / 1008e3),
    ],
)
def test_floor_of_a_workload(name: str, card: Card, microseconds: float) -> None:
    workload = next(each for each in roofline.workloads() if name in each.name)
    assert workload.floor(card) * 1e6 == pytest.approx(microseconds, rel=1e-9)


def test_time_of_a_launch() -> None:
    """By hand, on 108 multiprocessors of 1.41 GHz."""
    products = [sass.Instruction(0, "HMMA.16816.F32.BF16", "")] * 64
    turn = Work.of([*products, *[sass.Instruction(0, "LDS.128", "")] * 8, *[sass.Instruction(0, "IADD3", "")] * 28])
    rest = Work.of([sass.Instruction(0, "FADD", "")] * 400)
    it = kernel(255, 0, 8, 0, Phase(rest, turn, 64 * 4096, {"cp.async 16 B": 2}))
    needed = time_model.clocks(turn, 8, A100, l2_bytes=6400)
    # 8 warps: 100 instructions each by 4 schedulers; 28 of them on 64 lanes; 8 × 512 bytes by 128; 64 × 4096 operations
    # at 312e12 / 108 / 1.41e9 a clock; 6400 bytes, of which the L2 cache gives 5120 a clock to all 108.
    assert needed["issue"] == 200
    assert needed["integer and logic"] == 112
    assert needed["shared memory"] == 256
    assert needed["L2 cache"] == 135
    assert needed["tensor cores"] == pytest.approx(8 * 64 * 4096 * 108 * 1.41e9 / 312e12)
    assert needed["float32"] == 0
    # 217 tiles are 3 on the busiest multiprocessor, one at a time; 5 steps of which a turn makes one; 1023.6 clocks of
    # a turn on tensor cores take longer than the wait for what comes two stages ahead; 400 × 8 / 4 around the loop by
    # the schedulers, twice as many on the 64 lanes.
    tiles = Tiles(217, steps=5, step_operations=8 * 64 * 4096)
    seconds = 3 * (time_model.LATENCY + (1600 + 5 * needed["tensor cores"]) / 1.41e9)
    found = time_model.predict(it, tiles, 0.0, A100)
    assert found.seconds == pytest.approx(time_model.LAUNCH + seconds)
    assert found.limit == "tensor cores"
    # Where the loop loads into registers every turn waits.
    late = replace(it.phase, loads={"LDG 16 B": 1})
    assert time_model.waiting(late, 3) == 2 * time_model.waiting(it.phase, 3) == time_model.LATENCY
    # Memory decides where there is much of it: 1 GB at 2039 GB/s.
    slow = time_model.predict(it, tiles, 1e9, A100)
    assert (slow.seconds, slow.limit) == (pytest.approx(time_model.LAUNCH + 1e9 / 2039e9), "memory")


def test_products_of_one_warp_are_slower_on_hopper() -> None:
    old, new = (Work.of([sass.Instruction(0, opcode, "")]) for opcode in ("HMMA.16816.F32", "HGMMA.64x64x16.F32"))
    per_clock = 989.4e12 / 132 / 1.83e9
    assert time_model.clocks(old, 4, H100)["tensor cores"] == pytest.approx(4 * 4096 / per_clock / 0.63)
    assert time_model.clocks(new, 4, H100)["tensor cores"] == pytest.approx(2 * 64 * 64 * 16 / per_clock)


def test_phase_of_machine_code() -> None:
    phase = time_model.phase_of(sass.instructions(LISTING))
    assert phase.turn is not None
    assert (phase.turn.instructions, phase.most, phase.products) == (8, 10, 1)
    # Two instructions before the loop, two behind it.
    assert phase.rest.instructions == 4
    assert phase.operations == 4096


def test_a_config_that_spills_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "read", lambda plan, arch: kernel(255, 0, 8, 48 if arch == 89 else 0))
    assert roofline.main(["--select", "gaussian", "--out", str(tmp_path)]) == 1
    name = "project_taps 1000 → 3,211,264 b=32 tf32, gaussian on RTX 4090"
    assert capsys.readouterr().err == f"on the stack instead of in registers: {name}\n"
    written = json.loads((tmp_path / "roofline.json").read_text())
    assert [row["card"] for row in written["workloads"] if row["spills"]] == ["RTX 4090"]
    assert roofline.NOT_MEASURED in (tmp_path / "roofline.md").read_text()


def test_committed_predictions() -> None:
    """None is below its floor, the H200 took at most about twice what was predicted for it, and the text says so."""
    result = json.loads(RESULT.read_text())
    assert RESULT.with_suffix(".md").read_text() == roofline.markdown(result)
    measured = roofline.measured_us()
    for row in result["workloads"]:
        assert row["card"] != "H200" or 1 < measured[row["workload"]] / row["predicted_us"] < 2.05
    names = [workload.name for workload in roofline.workloads()]
    assert [(row["workload"], row["card"]) for row in result["workloads"]] == [
        (name, card.name) for name in names for card in CARDS
    ]
    assert [row for row in result["workloads"] if not row["predicted_us"] >= row["floor_us"] > 0] == []
    assert result["note"] == roofline.NOT_MEASURED
    assert [row for row in result["configs"] if row["stack_bytes"] + row["spill_bytes"]] == []


def test_committed_predictions_are_of_todays_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel, tiles and their numbers; nothing is compiled for it."""
    monkeypatch.setattr(roofline, "read", lambda plan, arch: kernel())
    monkeypatch.setattr(roofline, "read_hadamard", lambda length, arch: kernel())
    launches = {(w.name, card.name): w.launch(card) for w in roofline.workloads() for card in CARDS}
    for row in json.loads(RESULT.read_text())["workloads"]:
        launch = launches[row["workload"], row["card"]]
        assert (row["launch"], row["tiles"]) == (launch.name, launch.tiles.count), row["workload"]


def test_units_of_a_multiprocessor() -> None:
    """4 warps of 10 multiply-adds, 6 of them of integers, in 64 lanes; a tile's 1,000 bytes from a shared L2 cache."""
    work = replace(NOTHING, instructions=10, units=NOTHING.units | {"integer products": 6, "float32": 4})
    needed = time_model.clocks(work, 4, A100, 1000.0)
    assert needed["multiply-add"] == 10 * 4 * 32 / 64
    assert needed["integer products"] == 6 * 4 * 32 / 64
    assert needed["issue"] == 10
    assert needed["L2 cache"] == pytest.approx(1000 * 108 / 5120)
    assert time_model.clocks(work, 4, RTX4090, 1000.0)["L2 cache"] == pytest.approx(1000 / 64)


def test_prediction_of_a_real_compilation(tmp_path: Path) -> None:
    """A given matrix on an RTX 5090: tensor cores, rows copied 16 bytes at a time, above the floor."""
    program = (
        "import json; from bench import roofline; from bench.cards import CARDS;"
        "work = roofline.projection('matrix'); launch = work.launch(CARDS[-1]); phase = launch.kernel.phase;"
        "steps = roofline.time_model.steps_of_turn(phase, launch.tiles, launch.kernel.warps);"
        "print(json.dumps([roofline.workload_row(work, CARDS[-1]), phase.loads, phase.products, steps]))"
    )
    folders = [ROOT / ".venv" / "triton" / THOROUGH, ROOT] if OWN_VENV else [ROOT]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row, loads, products, steps = json.loads(done.stdout)
    assert (row["workload"], row["card"]) == (roofline.projection("matrix").name, "RTX 5090")
    assert row["predicted_us"] >= row["floor_us"] == pytest.approx(4 * 3_416_816_896 / 1792e3)
    assert not row["spills"]
    assert loads["cp.async 16 B"] >= 1
    assert products > 0
    assert steps == 1
