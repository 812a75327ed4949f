"""llama.cpp's own programs and converter for tests, where they have been built or unpacked."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")  # the user's, not that of the tests


def _folder() -> Path:
    """Where `benchmarks/llama_tools.py` keeps what belongs to the installed llama-cpp-python."""
    return CACHE / "optrot-edge" / f"llama.cpp-{importlib.metadata.version('llama-cpp-python')}"


def llama_tool(name: str) -> Path:
    """The program; skips the test where it has not been built."""
    path = _folder() / "bin" / name
    if not path.is_file():
        pytest.skip(f"{name} is not built here; python benchmarks/llama_tools.py builds it")
    return path


def llama_converter() -> Path:
    """Folder with llama.cpp's converter; skips the test where it has not been fetched."""
    folder = _folder() / "converter"
    if not folder.is_dir():
        pytest.skip("llama.cpp's converter is not here; python benchmarks/llama_tools.py --converter fetches it")
    return folder
