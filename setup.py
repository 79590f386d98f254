"""Everything is declared in pyproject.toml; this is for tools that call it, and where csrc would be built."""

from setuptools import setup

setup()
