"""What `import optrot_edge` costs, and that the pins agree with the package's metadata."""

import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import optrot_edge

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("module", ["optrot_edge", "optrot_edge.exporters", "optrot_edge.runtime",
                                    "optrot_edge.checkpoint", "optrot_edge.models.config"])
def test_imports_without_the_extras(module):
    """A device that only runs and checks has none of these installed."""
    heavy = ["torch", "triton", "transformers", "datasets", "llama_cpp"]
    program = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_lazy_names():
    assert optrot_edge.QuantizedCheckpoint.__module__ == "optrot_edge.checkpoint"
    assert set(optrot_edge.__all__) <= set(dir(optrot_edge))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = optrot_edge.nonsense


def test_every_lazy_name_resolves():
    for name in optrot_edge.__all__:
        assert getattr(optrot_edge, name)


def test_every_package_folder_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for top in ("optrot_edge", "exporters", "runtime")
               for path in (ROOT / top).rglob("__init__.py")}
    declared = {project["package-dir"].get(name, name.replace(".", "/")) for name in project["packages"]}
    assert declared == folders


def test_constraints_satisfy_the_bounds():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
                if line and not line.startswith("#"))
    for text in requires("optrot-edge"):
        requirement = Requirement(text)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), text
    for name in ("numpy", "gguf", "safetensors", "torch", "transformers", "triton", "llama-cpp-python"):
        assert name in pins


def test_version():
    assert optrot_edge.__version__ == version("optrot-edge") == "0.1.0"
