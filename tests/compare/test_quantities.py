"""Quantities per layer and matrix against their definitions, and the bound on rounding to nearest."""

from __future__ import annotations

import math

import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.compare.quantities import arm_quantities, quantization_errors, rtn_bound
from optrot_edge.models import open_model
from optrot_edge.quantize.statistics import incoherence
from optrot_edge.rotations.covariance import INPUTS, collect
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.report import measure
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from tests.rotations.test_covariance import TOKENS, covariances_of_inputs
from tests.rotations.test_fuse import rotation_for

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """(source, rotation, checkpoint, quantities, errors) of a rotated model, rounded to nearest in 3 bits."""
    source = open_model(tiny("llama"))
    rotation = rotation_for(source.config, r3_block=16, r4_block=32)
    path = pipeline.quantize(tiny("llama"), tmp_path_factory.mktemp("c") / "c", rotation=rotation, type="int3-g32-zero",
                             quantizer="rtn", calibration="none")
    checkpoint = QuantizedCheckpoint(path)
    with collect(source, TOKENS) as covariances:
        quantities = arm_quantities(source, rotation, covariances, damp=0.1)
        errors = quantization_errors(source, rotation, DecodedCheckpoint(checkpoint), covariances, quantities, 3)
        rows = measure(source, rotation, covariances)
    assert [row["after"] for row in rows] == [
        {name: value for name, value in row.items() if name not in ("layer", "matrix")} for row in quantities]
    return source, rotation, checkpoint, quantities, errors


def test_errors_are_what_they_are_defined_as(measured):
    source, rotation, checkpoint, quantities, errors = measured
    model = RotatedModel(source, rotation)
    inputs, layer = covariances_of_inputs(model, 1), model.layer(1, torch.float64)
    kinds = {name: kind for kind, names in INPUTS.items() for name in names}
    assert len(errors) == len(quantities) == 14
    for row, known in zip(errors[7:], quantities[7:], strict=True):
        name = row["matrix"]
        h, w = inputs[kinds[name]], layer[f"{name}.weight"]
        delta = w - torch.from_numpy(checkpoint.weights(f"layers.1.{name}.weight")).double()
        assert row["signal"] == pytest.approx(float((w @ h @ w.T).trace()), rel=1e-4)
        assert row["error"] == pytest.approx(float((delta @ h @ delta.T).trace()), rel=1e-4)
        assert row["snr_db"] == pytest.approx(10 * math.log10(row["signal"] / row["error"]))
        assert known["lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-4)
        mu = float(w.abs().max()) * math.sqrt(w.numel()) / float(w.norm())
        bound = mu**2 * known["lambda_max"] * float(w.norm()) ** 2 / 7**2
        assert row["rtn_bound"] == pytest.approx(bound, rel=1e-4)
        assert row["bound_db"] == pytest.approx(10 * math.log10(row["signal"] / row["rtn_bound"]))


def test_the_bound_holds_on_every_layer_of_every_arm(made):
    _, found = made
    checked = 0
    for name, rows in found["errors"].items():
        if "-rtn" in name:
            for row in rows:
                assert 0 < row["error"] <= row["rtn_bound"], (name, row)
                assert row["bound_db"] <= row["snr_db"]
                checked += 1
    assert checked == 10 * 14


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bound_can_be_reached(bits):
    """Weights half-way between levels, white inputs: all of them err by half a step."""
    top, size = 2**bits - 1, 4096
    w = torch.full((1, size), 1.0, dtype=torch.float64)
    w[0, 1] = -1
    w[0, 2:] = 1 / top * (1 - 1e-6) * torch.sign(torch.arange(size - 2) % 2 - 0.5)
    w[0, 2:] -= torch.remainder(w[0, 2:] + 1, 2 / top) - (1 - 1e-6) / top
    step = 2 / top
    rounded = ((w + 1) / step).round() * step - 1
    error = float((w - rounded).square().sum())
    bound = rtn_bound({"mu_w": incoherence(w), "lambda_max": 1.0, "frobenius": float(w.norm())}, bits)
    assert 0.999 < error / bound <= 1


def test_without_eigenvectors_there_is_no_bound():
    assert rtn_bound({"mu_w": 3.0, "lambda_max": None, "frobenius": 1.0}, 4) is None
