"""optrot-edge: learned rotations for low-bit weights, and what edge runtimes need to run them.

The names in `__all__` load on first use, so that `import optrot_edge` costs no torch.
`quantize_model` is `optrot_edge.pipeline.quantize`: `optrot_edge.quantize` is the subpackage.
"""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

# On a machine that does other things too, OpenMP threads that spin at a barrier cost an order of
# magnitude; sleeping ones cost nothing measurable. Read when torch is loaded; the user's setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_LAZY = {
    "QuantizedCheckpoint": ("optrot_edge.checkpoint", "QuantizedCheckpoint"),
    "open_model": ("optrot_edge.models", "open_model"),
    "export": ("optrot_edge.pipeline", "export"),
    "rotate": ("optrot_edge.pipeline", "rotate"),
    "quantize_model": ("optrot_edge.pipeline", "quantize"),
    "evaluate": ("optrot_edge.pipeline", "evaluate"),
}

try:
    __version__ = version("optrot-edge")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
