"""The benchmarks are scripts beside each other, not an installed package."""

import sys
from pathlib import Path

import pytest

from tests.llama_tools import CACHE

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def users_cache(monkeypatch):
    """Where llama.cpp's tools are, which the scripts would build otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
