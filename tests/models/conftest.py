"""Tiny models shared by the tests of the readers."""

import pytest

from tests.tiny_models import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(case, shards=False)`: folder of a saved tiny model, made once; do not write into it."""
    folders = {}

    def folder(case: str, shards: bool = False):
        key = (case, shards)
        if key not in folders:
            folders[key] = save_tiny(tmp_path_factory.mktemp(case) / "model", case, shards=shards)
        return folders[key]

    return folder
