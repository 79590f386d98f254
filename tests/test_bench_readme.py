"""Tables that programs keep in the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.readme import put_table

BEGIN, END = "<!-- speed -->", "<!-- /speed -->"


def test_the_table_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n<!-- memory -->\nother\n<!-- /memory -->\n")
    for _ in range(2):
        put_table(readme, "speed", "| new |")
        expected = f"before\n{BEGIN}\n| new |\n{END}\nafter\n<!-- memory -->\nother\n<!-- /memory -->\n"
        assert readme.read_text() == expected


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}" * 2])
def test_readme_without_its_marks(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"expected <!-- speed --> and then <!-- /speed -->"):
        put_table(readme, "speed", "table")
    assert readme.read_text() == text
