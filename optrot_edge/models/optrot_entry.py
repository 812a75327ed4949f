"""What optrot-edge wrote into a package's config.json, under "optrot". Imports neither torch nor a runtime."""

from __future__ import annotations

from pathlib import Path

from optrot_edge.errors import InputError

FORMAT_VERSION = 1


def read_entry(folder: Path, config: dict) -> dict:
    """The entry in the config.json of `folder`, empty where there is none; InputError for a newer optrot-edge's."""
    ours = config.get("optrot", {})
    if not isinstance(ours, dict):
        raise InputError(f"{folder}/config.json: `optrot` is not an object; export the package again")
    version = ours.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{folder}/config.json: format_version {version!r}; export the package again")
    if version > FORMAT_VERSION:
        raise InputError(f"{folder} was written by a newer optrot-edge (format {version}; this one reads up to "
                         f"{FORMAT_VERSION}); upgrade: pip install --upgrade optrot-edge")
    return ours
