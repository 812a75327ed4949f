"""Options of a recipe: each does something to what is made, and none is forgotten here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.rotation import Rotation
from tests.crashes import contents
from tests.road import save_model
from tests.rotations.test_optrot_plus import make_uneven

WINDOWS = {"nsamples": 16, "seqlen": 32}
QUANTIZING = {"act_order": False, "refits": 0, "asymmetric": "inputs", "damp": 0.5, "seed": 1, "nsamples": 12,
              "seqlen": 24, "quantizer": "rtn", "guidance": "tokens", "distill": 1, "type": "q4_1",
              "embedding_type": "f16", "head_type": "q4_0", "tensor_type": ["ffn_down=q8_0"], "rotation": "hadamard"}
LEARNING = [
    ("optrot", {"optrot_steps": 6, "optrot_rows": 64}, {"optrot_solver": "cayley", "optrot_steps": 9, "optrot_rows": 32,
                                                       "optrot_objective": "top-50", "rotate": "r1", "seed": 1}),
    ("optrot", {"optrot_steps": 40, "optrot_rows": 0}, {"optrot_tolerance": 0.9, "optrot_target": 1e9}),
    ("optrot+", {"plus_steps": 3, "rotate": "r2"}, {"damp": 0.5, "plus_objective": "plain", "plus_start": "hadamard",
                                                   "plus_steps": 4, "scales": False, "type": "q5_1"}),
    ("spinquant", {"e2e_steps": 2, "e2e_tokens": 64}, {"e2e_steps": 3, "e2e_tokens": 128, "e2e_loss": "cross-entropy",
                                                      "e2e_lr": 1.0, "e2e_activations": 4}),
    ("ostquant", {"e2e_steps": 2, "e2e_tokens": 64}, {"scales": False}),
]
ELSEWHERE = {"calibration", "r4_block", "device", "max_memory", "target_bpw", "target_size",  # test_budget, test_memory
             "format", "bits", "group_size", "symmetric", "dtype"}  # the exporters' tests
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Folder of a tiny model with uneven channels; do not write into it."""
    return make_uneven(save_model(tmp_path_factory.mktemp("recipe") / "model", "llama"))


@pytest.fixture(scope="module")
def plain(uneven, text, tmp_path_factory):
    """A checkpoint by the default recipe, not rotated."""
    return pipeline.quantize(uneven, tmp_path_factory.mktemp("plain") / "c", rotation="none", calibration=text,
                             **WINDOWS)


def weights(path) -> dict[str, bytes]:
    return {name: data for name, data in contents(path).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("option", QUANTIZING)
def test_what_quantising_takes_changes_the_weights(option, uneven, plain, text, tmp_path):
    fields = {"rotation": "none", "calibration": text, **WINDOWS} | {option: QUANTIZING[option]}
    path = pipeline.quantize(uneven, tmp_path / "c", **fields)
    assert weights(path) != weights(plain)
    assert QuantizedCheckpoint(path).manifest["recipe"][option] == QUANTIZING[option]


@pytest.mark.parametrize(("method", "base", "option", "value"), [
    (method, base, option, value) for method, base, changes in LEARNING for option, value in changes.items()])
def test_what_learning_takes_changes_the_rotation(method, base, option, value, uneven, text, tmp_path):
    made = []
    for name, fields in (("base", base), ("changed", base | {option: value})):
        path = tmp_path / f"{name}.safetensors"
        pipeline.rotate(uneven, path, rotation=method, calibration=text, **WINDOWS, **fields)
        made.append(Rotation.load(path))
    if method in ("spinquant", "ostquant"):  # a start that is kept is the same by all of them
        assert made[0].recipe["loss_curve"] != made[1].recipe["loss_curve"]
        recorded = {"e2e_loss": "objective"}.get(option, option.removeprefix("e2e_"))
        assert option == "scales" or made[1].recipe[recorded] == value
    elif option == "scales":
        assert made[0].scales and not made[1].scales
    elif option == "optrot_objective":  # this model has no 50 matrices
        assert [one.recipe["objective"] for one in made] == ["all", "top-50"]
    else:
        assert any(one is not None and (other is None or not torch.equal(one, other))
                   for one, other in ((made[0].r1, made[1].r1), (made[0].r2, made[1].r2)))
    if option in ("optrot_tolerance", "optrot_target"):
        assert made[1].recipe["steps_taken"] < made[0].recipe["steps_taken"] == 40
    if option == "optrot_solver":
        assert made[1].recipe["solver"] == "cayley"


def test_every_option_is_here():
    found = set(QUANTIZING) | ELSEWHERE | {option for _, base, changes in LEARNING for option in base | changes}
    assert {field.name for field in dataclasses.fields(Recipe)} == found
