"""The kernels' machine code for GPUs that are not here, from every version of Triton that is promised to work.

`compile_ahead.py` compiles, in processes of their own; here is what its results have to be like. With COMPILE_AHEAD=all
in the environment (`make test-ahead`) it compiles twice as much, for whoever changes kernels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from compile_ahead import ASYNCHRONOUS, EXTENTS, KINDS_OF_CORE, is_compiled, is_first_only
from triton_versions import INSTALLED, OWN_VENV, THOROUGH, every_version, output_under

from bench.predict.ahead import PRODUCER
from bench.predict.limits import KIB, MULTIPROCESSORS, RESERVED_SHARED, Multiprocessor
from dfa_kernels.backends.triton.configs import KINDS, table

Result = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What machine code for an architecture has to fit into and to use. Tensor memory in columns."""

    instruction: str
    limits: Multiprocessor
    tensor_memory: int = 512
    tma: bool = False


CARDS = {
    80: Expected("mma.sync", MULTIPROCESSORS[80]),
    86: Expected("mma.sync", MULTIPROCESSORS[86]),
    89: Expected("mma.sync", MULTIPROCESSORS[89]),
    90: Expected("wgmma", MULTIPROCESSORS[90], tma=True),
    100: Expected("tcgen05", MULTIPROCESSORS[100], tma=True),
    120: Expected("mma.sync", MULTIPROCESSORS[120]),
}


def complaints(result: Result, card: Expected) -> Iterator[str]:
    """What is wrong with a kernel's machine code, a phrase each."""
    if "error" in result:
        yield result["error"]
        return
    yield from result["overwritten"]
    yield from _resource_complaints(result, card)
    yield from _instruction_complaints(result, card)


def _resource_complaints(result: Result, card: Expected) -> Iterator[str]:
    for name in ("stack", "local"):
        if result[name] != 0:
            yield f"{name.upper()} {result[name]}, expected 0"
    if result["shared"] > card.limits.shared_of_program:
        yield f"{result['shared']} B of shared memory, expected at most {card.limits.shared_of_program}"
    programs = result["programs"]
    for name, used, limit in (
        ("B of shared memory", result["shared"] + RESERVED_SHARED, card.limits.shared),
        ("registers", result["reg"] * result["warps"] * 32, card.limits.registers),
        ("warps", result["warps"], card.limits.warps),
        ("columns of tensor memory", result["tensor_memory"], card.tensor_memory),
    ):
        if used * programs > limit:
            yield f"{programs} programs of {used} {name}, expected at most {limit} together"


BY_TMA = ("two_phase", "grouped_gemm", PRODUCER)
HALF = ("fp16", "bf16")


def _access_complaints(result: Result) -> Iterator[str]:
    """Of tensors whose rows are multiples of 16 bytes."""
    if result["network"] != "aligned":
        return
    # `deltas` reads as many units at once as in float32.
    least = 8 if result["kernel"] == "deltas" and not result["multiplies"] and result["dtype"] in HALF else 16
    # Tensor cores of sm_90 and sm_100 read float32 along the batch alone: tiles are turned as they are copied.
    turned = result["kernel"] == "grouped_gemm" and result["dtype"] == "fp32"
    for way in ("loads", "stores"):
        if max(result[way], default=0) < least and not (way == "loads" and (result["tma"] or turned)):
            yield f"{way} of {result[way]} bytes, expected {least}"


def _instruction_complaints(result: Result, card: Expected) -> Iterator[str]:
    found = result["instructions"]
    yield from _access_complaints(result)
    if result.get("ahead") and not result["reads_ahead"]:
        yield "no tile of the parameter is read while the one before is multiplied"
    if not result["multiplies"]:
        return
    if card.instruction not in found:
        yield f"no {card.instruction} in {found}"
    if result["plain_dots"]:
        yield f"{result['plain_dots']} products without tensor cores, expected 0"
    half = result["dtype"] in HALF
    rows_of_16_bytes = result["network"] not in ("even", "odd")
    copies = "tma" if card.tma and half and rows_of_16_bytes and result["kernel"] in BY_TMA else "cp.async"
    if (copies == "tma") != result["tma"]:
        yield f"planned with TMA: {result['tma']}, expected {copies == 'tma'}"
    if result["kernel"] == PRODUCER and "mbarrier" not in found:
        yield f"no mbarrier in {found}: the warp that loads is not told which tiles were read"
    if result["kernel"] == "strip" and result["stages"] == 1:
        return
    # An asynchronous copy moves 4 bytes at least, and each by itself where rows are odd.
    if copies not in found and not (half and result["network"] == "odd"):
        yield f"no {copies} in {found}: tiles are not loaded ahead"


EVERYTHING = os.environ.get("COMPILE_AHEAD") == "all"


def extent_of(version: str, arch: int) -> str:
    if version == THOROUGH:
        return "all" if EVERYTHING else "rare" if arch == 90 else "usual"
    if EVERYTHING or (arch == 90 and version != INSTALLED):
        return "usual"
    return "brief"


def targets() -> list[Any]:
    """(version of Triton, architecture): beside the pinned versions the installed one where products are asynchronous.

    Their rings of tiles depend on the version.
    """
    found = []
    for version in every_version():
        beside_others = OWN_VENV and version == INSTALLED
        name, marks = (version, ()) if isinstance(version, str) else (version.values[0], version.marks)
        archs = [arch for arch in CARDS if arch in ASYNCHRONOUS or not beside_others]
        found += [pytest.param(name, arch, marks=marks) for arch in archs]
    return found


def compiled(version: str, arch: int, known: Path) -> list[Result]:
    """Everything for this GPU; what is in `known` is not compiled again."""
    arguments = ["--known", str(known), "--extent", extent_of(version, arch)]
    printed = output_under(version, "compile_ahead.py", f"sm_{arch}", *arguments)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def compilations(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, int], Future[list[Result]]]]:
    """Results to be, of the tests that were selected: a process on every core compiles."""
    known = Path(request.config.cache.mkdir("compile_ahead"))
    tests = [item for item in request.session.items if "compilations" in getattr(item, "fixturenames", ())]
    wanted = [(item.callspec.params["version"], item.callspec.params["arch"]) for item in tests]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The longest first.
        wanted.sort(key=lambda target: EXTENTS.index(extent_of(*target)), reverse=True)
        yield {(version, arch): pool.submit(compiled, version, arch, known) for version, arch in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("version", "arch"), targets())
def test_machine_code(version: str, arch: int, compilations: dict[tuple[str, int], Future[list[Result]]]) -> None:
    """Tensor cores, nothing on the stack, tiles loaded ahead, as many programs on a multiprocessor as planned.

    And rows of a multiple of 16 bytes are read and written so many at a time.
    """
    results = compilations[version, arch].result()
    wrong = [
        f"{result['name']} on sm_{arch} with Triton {result['triton']}: {complaint}"
        for result in results
        for complaint in complaints(result, CARDS[arch])
    ]
    assert not wrong, "\n".join(wrong)
    assert version in (INSTALLED, *{result["triton"] for result in results})
    found = {(result["kernel"], result["config"], result["dtype"]) for result in results}
    extent = extent_of(version, arch)
    assert every_config(arch, extent) <= found
    if extent != "brief" and arch in KINDS_OF_CORE:
        assert {result.get("index") for result in results} >= {32, 64}


def every_config(arch: int, extent: str) -> set[tuple[str, int, str]]:
    """Kernel, number of the config and dtype of all in the table that are to be compiled."""
    dtypes = {"half": ("fp16", "bf16"), "tf32": ("fp32",), "ieee": ("ieee",)}
    return {
        (kernel, config, dtype)
        for arithmetic, configs in table()[arch].items()
        for kernel in KINDS
        for config in range(len(getattr(configs, kernel)))
        for dtype in dtypes[arithmetic]
        if is_compiled(kernel, dtype, arch, extent) and (config == 0 or not is_first_only(dtype, extent))
    }


def test_every_architecture_with_configs_is_compiled_for() -> None:
    assert set(table()) == set(CARDS)


FINE: Result = {
    "kernel": "two_phase", "dtype": "bf16", "network": "aligned", "multiplies": True, "tma": True, "warps": 8,
    "programs": 1, "reg": 255, "stack": 0, "local": 0, "shared": 227 * KIB, "tensor_memory": 512,
    "instructions": ["tcgen05", "tma"], "loads": [2, 16], "stores": [4, 16], "plain_dots": 0, "overwritten": [],
    "reads_ahead": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"stack": 48}, ["STACK 48, expected 0"]),
        ({"local": 8}, ["LOCAL 8, expected 0"]),
        (
            {"shared": 227 * KIB + 1},
            [
                "232449 B of shared memory, expected at most 232448",
                "1 programs of 233473 B of shared memory, expected at most 233472 together",
            ],
        ),
        (
            {"programs": 2, "shared": 0, "tensor_memory": 256},
            ["2 programs of 65280 registers, expected at most 65536 together"],
        ),
        (
            {"programs": 2, "shared": 0, "reg": 128},
            ["2 programs of 512 columns of tensor memory, expected at most 512 together"],
        ),
        ({"tensor_memory": 800}, ["1 programs of 800 columns of tensor memory, expected at most 512 together"]),
        ({"instructions": ["mma.sync", "tma"]}, ["no tcgen05 in ['mma.sync', 'tma']"]),
        ({"overwritten": ["%x, slot 1, is overwritten"]}, ["%x, slot 1, is overwritten"]),
        ({"stores": [4, 8]}, ["stores of [4, 8] bytes, expected 16"]),
        (
            {"kernel": PRODUCER},
            ["no mbarrier in ['tcgen05', 'tma']: the warp that loads is not told which tiles were read"],
        ),
        ({"ahead": True, "reads_ahead": True}, []),
        ({"ahead": True}, ["no tile of the parameter is read while the one before is multiplied"]),
        ({"plain_dots": 1}, ["1 products without tensor cores, expected 0"]),
        ({"tma": False}, ["planned with TMA: False, expected True"]),
        ({"instructions": ["tcgen05", "cp.async"]}, ["no tma in ['tcgen05', 'cp.async']: tiles are not loaded ahead"]),
        ({"error": "PTXASError: no"}, ["PTXASError: no"]),
    ],
)
def test_what_is_wrong_is_said(change: Result, expected: list[str]) -> None:
    assert list(complaints(FINE | change, CARDS[100])) == expected
