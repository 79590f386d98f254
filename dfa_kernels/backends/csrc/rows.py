"""An update's numbers as the libraries read them: a row for each set of options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

from ...updates import RULES, UpdateRule


@lru_cache(maxsize=16)
def numbers_and_sets(name: str, hyper: tuple[float, ...], parameters: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Rows of numbers that a rule's kernel reads, and where among them each parameter's begins; () if there is one."""
    rule, each = RULES[name], len(hyper) // parameters
    if hyper == hyper[:each] * parameters:
        return _row(rule, hyper[:each]), ()
    firsts: dict[tuple[float, ...], int] = {}
    sets = []
    for first in range(0, len(hyper), each):
        row = _row(rule, hyper[first : first + each])
        sets.append(firsts.setdefault(row, len(firsts) * len(row)))
    return tuple(chain.from_iterable(firsts)), tuple(sets)


def _row(rule: UpdateRule, hyper: Sequence[float]) -> tuple[float, ...]:
    return (*rule.row(*hyper[:-1]), hyper[-1]) if rule.counts else rule.row(*hyper)
