"""Finds, in Triton's intermediate code for a GPU, what is overwritten while an asynchronous product still reads it.

Tensor cores of sm_90 and sm_100 read tiles from shared memory while the program goes on, and the compiler has to see to
it that no copy for a later turn of the loop lands in a tile that is still read. The interpreter can never show such a
fault, and a card shows it as numbers that are wrong now and then. Here the code runs on paper: slots of shared memory,
which products read which, what waits for them, and every copy between.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# More than any ring has slots, so that every slot is used again, and a multiple of no ring's, so that loops around such
# a loop do not always meet its first slot.
TURNS = 13
PRODUCTS = re.compile(r"ttng\.(warp_group_dot|tc_gen5_mma) ")
SAME_MEMORY = ("memdesc_trans", "memdesc_reinterpret", "memdesc_reshape", "memdesc_subslice")
COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le, "sgt": operator.gt,
    "sge": operator.ge,
}  # fmt: skip
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "xori": operator.xor, "andi": operator.and_,
    "ori": operator.or_,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A slot of a ring of tiles in shared memory; all of the ring without a number."""

    ring: str
    slot: int | None = None

    def shares(self, other: Place) -> bool:
        return self.ring == other.ring and (None in (self.slot, other.slot) or self.slot == other.slot)


@dataclass
class Product:
    """One that is under way: what it reads, and the barrier that tells when it has; wgmma has none."""

    reads: list[Place]
    barrier: Place | None = None


@dataclass
class Run:
    """The state of shared memory as far as it is known, and what was found wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    """Numbers and places by name. What is not known is absent."""
    under_way: list[Product] = field(default_factory=list)
    found: dict[str, None] = field(default_factory=dict)

    def block(self, lines: Sequence[str]) -> list[str]:
        """Runs a block to its end; the operands of its last yield."""
        yielded: list[str] = []
        i = 0
        while i < len(lines):
            line = lines[i]
            if " scf.for " in line:
                end = _closing(lines, i)
                self.loop(line, lines[i + 1 : end])
                i = end
            elif "scf.while " in line:
                # Its condition and its body, twice: what one turn leaves under way meets the copies of the next.
                end = _closing(lines, _closing(lines, i))
                for _ in range(2):
                    self.block(lines[i + 1 : end])
                i = end
            elif line.lstrip().startswith("scf.yield") and _indent(line) == _indent(lines[0]):
                yielded = _names(line.split(" : ")[0])
            else:
                self.step(line)
            i += 1
        return yielded

    def loop(self, head: str, body: Sequence[str]) -> None:
        """Its turns, where it has products that are asynchronous: TURNS of them where their number is not known."""
        variable, *bounds = re.findall(r"%[\w$.#-]+", head.partition("scf.for ")[2])[:4]
        carried = re.findall(r"(%[\w$.-]+) = (%[\w$.#-]+)", head.partition("iter_args(")[2])
        inputs = [self.values.get(value) for _, value in carried]
        numbers = [self.values.get(bound) for bound in bounds]
        turns: Iterable[int | None] = range(*numbers) if None not in numbers else [None] * TURNS
        if not any(PRODUCTS.search(line) for line in body):
            turns = [None]
        for turn in turns:
            for name, value in zip([variable, *(name for name, _ in carried)], [turn, *inputs], strict=True):
                self.set(name, value)
            inputs = [self.values.get(name) for name in self.block(body)]
        self.results(head, inputs)

    def step(self, line: str) -> None:
        match = re.match(r"\s*(?:(%[\w$.-]+)(?::\d+)? = )?(\w+)\.(\w+) ?(.*)", line)
        if match is None:
            return
        name, dialect, kind, rest = match.groups()
        if kind == "warp_specialize":
            raise ValueError("warp_specialize: products in several partitions cannot be followed")
        if dialect == "arith":
            self.set(name, self.number(kind, rest))
        elif dialect in ("ttg", "ttng"):
            self.memory(name, kind, rest)

    def number(self, kind: str, rest: str) -> Any:
        """The value of integer arithmetic; None where an operand is not known."""
        if kind == "constant":
            literal = re.fullmatch(r"(?:(true|false)|(-?\d+) : (?:i\d+|index))", rest)
            return literal and (int(literal[1] == "true") if literal[1] else int(literal[2]))
        operands = [self.values.get(name) for name in _names(rest)]
        if kind == "select":
            condition, *choice = operands
            return None if condition is None else choice[0 if condition else 1]
        if None in operands or not all(isinstance(value, int) for value in operands):
            return None
        if kind == "cmpi":
            compare = COMPARISONS.get(rest.split(",")[0].split()[0])
            return None if compare is None else int(compare(*operands))
        if kind in ("extui", "extsi", "trunci", "index_cast"):
            return operands[0]
        return ARITHMETIC[kind](*operands) if kind in ARITHMETIC else None

    def memory(self, name: str, kind: str, rest: str) -> None:
        operands = _names(rest.split(" : ")[0])
        if kind == "local_alloc":
            self.set(name, Place(name))
            if operands:
                self.write(Place(name))
        elif kind == "memdesc_index":
            self.set(name, self.slot(*operands))
        elif kind in SAME_MEMORY:
            self.set(name, self.values.get(operands[0]))
        elif kind in ("async_copy_global_to_local", "local_store"):
            self.write(self.values[operands[1]])
        elif kind.startswith("async_tma_") and "global_to_local" in kind:
            self.write(self.values[_names(rest.partition("] ")[2])[0]])
        elif kind in ("warp_group_dot", "tc_gen5_mma"):
            self.multiply(kind, operands, rest)
        elif kind == "warp_group_dot_wait":
            self.wait_for_groups(int(re.search(r"pendings = (\d+)", rest)[1]))  # type: ignore[index]
            self.results(f"{name} = ", [self.values.get(operand) for operand in operands])
        elif kind == "wait_barrier":
            self.wait_for_barrier(rest)

    def slot(self, ring: str, index: str) -> Place:
        number = self.values.get(index)
        if not isinstance(number, int):
            raise ValueError(f"{index}: expected a number that is known, the slot of {ring}")
        return Place(self.values[ring].ring, number)

    def factor(self, name: str, kind: str) -> list[Place]:
        """Where a product reads this operand, of this type: nowhere, if it lies in registers or tensor memory."""
        place = self.values.get(name)
        if place is None and "#smem" in kind:
            raise ValueError(f"{name}: expected memory that is known, of {kind}")
        return [place] if isinstance(place, Place) else []

    def multiply(self, kind: str, operands: Sequence[str], rest: str) -> None:
        types = re.split(r" \* |, (?=!ttg)", rest.rpartition("} : ")[2])
        reads = [place for name, type_ in zip(operands[:2], types, strict=False) for place in self.factor(name, type_)]
        if kind == "tc_gen5_mma":
            # Without the tokens in brackets: two factors, the sum, whether to add to it, whether to multiply at all.
            *_, condition, barrier = _names(re.sub(r"\[.*?\]", "", rest.split(" {")[0]))
            if self.values.get(condition) != 0:
                self.under_way.append(Product(reads, self.values[barrier]))
        elif "isAsync = true" in rest:
            self.under_way.append(Product(reads))

    def wait_for_barrier(self, rest: str) -> None:
        """Behind a barrier and its phase there may be a condition."""
        barrier, _, *condition = _names(re.split(r" deps | : ", rest)[0])
        if condition and self.values.get(condition[0]) == 0:
            return
        place = self.values[barrier]
        self.under_way = [p for p in self.under_way if p.barrier is None or not p.barrier.shares(place)]

    def wait_for_groups(self, pendings: int) -> None:
        """Until at most so many of Hopper's products are under way."""
        groups = [p for p in self.under_way if p.barrier is None]
        done = groups[: len(groups) - pendings]
        self.under_way = [p for p in self.under_way if not any(p is d for d in done)]

    def write(self, place: Place) -> None:
        for product in self.under_way:
            for read in product.reads:
                if read.shares(place):
                    slot = "" if place.slot is None else f", slot {place.slot},"
                    self.found[f"{place.ring}{slot} is overwritten while a product reads it"] = None

    def set(self, name: str, value: Any) -> None:
        if value is None:
            self.values.pop(name, None)
        else:
            self.values[name] = value

    def results(self, head: str, values: Sequence[Any]) -> None:
        """Names what an operation returns: %a, or %a#0, %a#1, ... of several."""
        match = re.match(r"\s*(%[\w$.-]+)(:\d+)? = ", head)
        if match is None:
            return
        for i, value in enumerate(values):
            self.set(f"{match[1]}#{i}", value)
        if len(values) == 1:
            self.set(match[1], values[0])


def overwritten(ttgir: str, arguments: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """A phrase for every tile of shared memory that is written while an asynchronous product may still read it.

    ttgir: of one kernel, called with these arguments as far as they are known, by name: with the number of rows, loops
    over them end where they do, and with them the products that are only begun for a later turn. ValueError where the
    code is of a kind that cannot be followed.
    """
    run = Run({f"%{name}": value for name, value in arguments.items() if isinstance(value, int)})
    run.block(list(_code(ttgir)))
    return list(run.found)


def _code(ttgir: str) -> Iterator[str]:
    for line in ttgir.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield re.sub(r" loc\(.*\)$", "", line)


def _closing(lines: Sequence[str], opening: int) -> int:
    """The line with the brace that closes what this one opens."""
    brace = " " * _indent(lines[opening]) + "}"
    return next(i for i in range(opening + 1, len(lines)) if lines[i].startswith(brace))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _names(text: str) -> list[str]:
    return re.findall(r"%[\w$.#-]+", text)
