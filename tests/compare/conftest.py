"""A tiny comparison, made once."""

from __future__ import annotations

import pydoc_data.topics

import pytest

from optrot_edge.compare.arms import ACTIVATIONS
from optrot_edge.compare.comparison import compare
from tests.road import save_model
from tests.rotations.test_optrot_plus import make_uneven

FIELDS = {"nsamples": 4, "seqlen": 32, "optrot_steps": 3, "optrot_rows": 64, "plus_steps": 2, "r4_block": 32,
          "damp": 0.01}
SHAPE = {"group_size": 32, "windows": 3, "window": 32}
ALL = ["none", "hadamard", "optrot", "optrot-top50", "optrot+"]


def options(text: str, **changes) -> dict:
    """What `compare` is called with; `text` is calibrated on."""
    fields = {**FIELDS, "calibration": text, **changes.pop("fields", {})}
    return {"rotations": ["none", "hadamard"], **SHAPE, "fields": fields, **changes}


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Folder of a tiny model with uneven channels; do not write into it."""
    return make_uneven(save_model(tmp_path_factory.mktemp("uneven") / "tiny", "llama"))


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Path of a text to evaluate on."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[5:9]))
    return str(path)


@pytest.fixture(scope="session")
def made(uneven, text, words, tmp_path_factory):
    """(folder, results) of every arm that needs no end-to-end learning, without online rotations."""
    out = tmp_path_factory.mktemp("compared") / "out"
    found = compare(uneven, out, text=words, **options(
        text, rotations=ALL, bits=[4, 3], quantizers=["gptq", "rtn"],
        activations=list(ACTIVATIONS[:2])))
    return out, found
