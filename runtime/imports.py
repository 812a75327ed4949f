"""Optional runtimes, imported when they are used."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from optrot_edge.errors import InputError


def installed(module: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # an import hook that refuses it, or a half-initialised module
        return False


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise InputError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a broken shared library raises the last two
        package = module.partition(".")[0]
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise InputError(f'{purpose} needs {package}, which {why}; '
                         f'run: pip install "optrot-edge[{extra}]"') from error
