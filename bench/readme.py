"""Tables that a program keeps in the README, each between a pair of marks."""

from __future__ import annotations

from pathlib import Path


def put_table(readme: Path, name: str, table: str) -> None:
    """Writes the table between <!-- name --> and <!-- /name -->; ValueError if those are not there once and in
    order."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = readme.read_text()
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end or begin in rest or end in after:
        raise ValueError(f"{readme}: expected {begin} and then {end}, once each")
    readme.write_text(f"{before}{begin}\n{table}\n{end}{after}")
