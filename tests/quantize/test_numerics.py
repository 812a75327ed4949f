"""Numerical trouble on the whole road: each kind is handled and reported, or refused with its tensor named."""

from __future__ import annotations

import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.inspect import inspect_path
from optrot_edge.quantize import matrices, sequential
from optrot_edge.quantize.asymmetric import Moments, corrected
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.numerics import NamedError, naming, warnings_of
from tests.cli_runner import run_ok
from tests.road import save_model

QKV = "layers.0.q_proj, layers.0.k_proj, layers.0.v_proj"
ATTN_NORM, MLP_NORM = "layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"
O_PROJ, V_PROJ, K_PROJ = (f"layers.{{}}.self_attn.{name}_proj" for name in "ovk")
UP, DOWN = "layers.{}.mlp.up_proj", "layers.{}.mlp.down_proj"


@pytest.fixture
def model(tmp_path):
    """`model(name, layer, change, dtype)`: a tiny Llama, one of its tensors as `change` makes it."""
    def make(name=None, layer=0, change=None, dtype=torch.float32):
        folder = save_model(tmp_path / "model", "llama", dtype=dtype)
        path, full = folder / "model.safetensors", name and f"model.{name.format(layer)}.weight"
        if name:
            tensors = load_file(path)
            tensors[full] = change(tensors[full].float()).to(dtype)
            save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return make


def quantize(folder, text, **fields):
    """The checkpoint, its report by tensor, and what was warned of."""
    recipe = {"rotation": "none", "nsamples": 4, "seqlen": 32, "calibration": text} | fields
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = pipeline.quantize(folder, folder.parent / "checkpoint", **recipe)
    checkpoint = QuantizedCheckpoint(path)
    said = [str(one.message) for one in caught]
    assert said == checkpoint.manifest["warnings"] == inspect_path(path)["warnings"]
    assert all(np.isfinite(checkpoint.weights(name)).all() for name in checkpoint.names)
    return checkpoint, checkpoint.manifest["errors"], said


def refused(folder, text, says, **fields):
    with pytest.raises(InputError, match=says):
        quantize(folder, text, **fields)
    assert [path.name for path in folder.parent.iterdir() if path.name != "same.txt"] == ["model"]


@pytest.fixture
def repeated(tmp_path):
    """A text of one token."""
    path = tmp_path / "same.txt"
    path.write_text(" the" * 2000)
    return str(path)


def channel(place, factor):
    def change(tensor):
        tensor[place] *= factor
        return tensor
    return change


@pytest.mark.parametrize("asymmetric", ["none", "residual"])
def test_every_matrix_is_compared_with_rounding(model, text, asymmetric):
    """The same grid, H and target; on an ordinary model GPTQ wins everywhere and nothing is warned of."""
    _, reports, said = quantize(model(), text, asymmetric=asymmetric)
    matrices = [report for name, report in reports.items() if name != "embed_tokens"]
    assert len(matrices) == 15 and said == []
    for report in matrices:
        assert report["output_error"] < 0.8 * report["rtn_output_error"] and not report["worse_than_rtn"]
        assert report["damp"] == 0.1 and report["damp_escalations"] == report["dead_columns"] == 0


def test_rounding_error_is_that_of_the_quantizer_rtn(model, text):
    """The first stage reads the same inputs under both: its report is what `--quantizer rtn` leaves there."""
    folder = model()
    _, gptq, _ = quantize(folder, text, asymmetric="none", refits=0)
    _, rtn, _ = quantize(folder, text, quantizer="rtn", overwrite=True)
    for name in ("layers.0.q_proj", "layers.0.v_proj"):
        assert gptq[name]["rtn_output_error"] == pytest.approx(rtn[name]["output_error"], rel=1e-6)
        assert "rtn_output_error" not in rtn[name]


def test_dead_columns(model, text):
    """Channels that the norm silences: their weights are free, everything else goes on."""
    _, reports, said = quantize(model(ATTN_NORM, 0, channel([3, 40], 0.0)), text)
    assert [reports[f"layers.0.{name}_proj"]["dead_columns"] for name in "qkvo"] == [2, 2, 2, 0]
    assert reports["layers.0.q_proj"]["snr_db"] > 20 and said == []


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "iq4_nl", "mxfp4", "int4-g32-zero", "int2-g32-min"])
def test_weights_of_zeros_and_inputs_of_zeros(model, text, kind):
    """v_proj of zeros gives zeros back, and o_proj, which then reads nothing else, is rounded."""
    checkpoint, reports, _ = quantize(model(V_PROJ, 0, torch.zeros_like), text, type=kind)
    assert not checkpoint.weights("layers.0.v_proj.weight").any()
    report = reports["layers.0.o_proj"]
    assert report["dead_columns"] == 96 and report["tr_d_over_tr_h"] == 1.0 and report["snr_db"] is None
    assert not report["worse_than_rtn"] and reports["layers.0.v_proj"]["relative_mse"] == 0.0


def test_one_token_repeated(model, text, repeated):
    """A Hessian of rank one nearly everywhere: damping carries it."""
    _, reports, said = quantize(model(), repeated)
    assert said == [] and max(report["relative_mse"] for report in reports.values()) < 0.1
    assert all(report.get("damp_escalations", 0) == 0 for report in reports.values())


def test_fewer_tokens_than_channels(model, text):
    _, reports, said = quantize(model(), text, nsamples=2, seqlen=16)
    assert said == [] and reports["layers.0.down_proj"]["tr_d_over_tr_h"] < 0.5


def test_damping_that_is_too_small_grows(model, text, repeated):
    checkpoint, reports, said = quantize(model(), repeated, damp=1e-20)
    report = reports["layers.0.q_proj"]
    assert report["damp_escalations"] > 10 and 1e-9 < report["damp"] <= 1
    assert math.log10(report["damp"]) == pytest.approx(report["damp_escalations"] - 20)
    assert len(said) == 1 and said[0].startswith("damping had to grow tenfold") and "layers.0.q_proj (to" in said[0]
    assert " and " in said[0] and " more;" in said[0]
    about = inspect_path(checkpoint.path)
    assert about["damping_escalations"] > 100
    assert about["layers_snr_db"][0]["damping_grew"][:2] == ["q_proj", "k_proj"]


def test_an_outlier_of_ten_thousand_is_flagged(model, text, capfd):
    """Damping by the mean diagonal is then that of one channel: GPTQ may lose to rounding, and that is said."""
    checkpoint, reports, said = quantize(model(ATTN_NORM, 0, channel(5, 1e4)), text)
    worse = [name for name, report in reports.items() if report.get("worse_than_rtn")]
    assert "layers.0.k_proj" in worse and not any(name.startswith("layers.1") for name in worse)
    ratio = reports["layers.0.k_proj"]["output_error"] / reports["layers.0.k_proj"]["rtn_output_error"]
    assert f"layers.0.k_proj ({ratio:.2f} times)" in said[0] and "round-to-nearest" in said[0]
    assert reports["layers.0.k_proj"]["snr_db"] > 10 and reports["layers.1.q_proj"]["snr_db"] > 10
    assert inspect_path(checkpoint.path)["worse_than_rtn"] == worse
    run_ok("inspect", checkpoint.path)
    shown = " ".join(capfd.readouterr().out.split())
    assert "worse than rounding" in shown and said[0] in shown
    run_ok("inspect", checkpoint.path, "--json")
    layer = json.loads(capfd.readouterr().out)["layers_snr_db"][0]
    assert "k_proj" in layer["worse_than_rtn"] and layer["damping_grew"] == []


def test_the_command_warns(model, text, capfd):
    folder = model(ATTN_NORM, 0, channel(5, 1e4))
    run_ok("quantize", folder, "--out", folder.parent / "c", "--calibration", text, "--nsamples", 4, "--seqlen", 32,
           "--rotation", "none")
    assert re.search(r"warning: GPTQ left a larger output error .*layers\.0\.k_proj \(1", capfd.readouterr().err)


def test_activations_beyond_float16(model, text):
    """They are no trouble for calibration, but for a runtime in float16."""
    _, reports, said = quantize(model(UP, 1, lambda weight: weight * 1e5), text, type="int4-g32-sym")
    assert reports["layers.1.down_proj"]["input_peak"] > 65504 > reports["layers.0.down_proj"]["input_peak"]
    assert len(said) == 1 and "float16" in said[0] and "layers.1.down_proj (" in said[0] and "layers.0" not in said[0]


def put_nan(tensor):
    tensor[3, 4] = math.nan
    return tensor


@pytest.mark.parametrize(("name", "change", "dtype", "says"), [
    (UP, put_nan, torch.float32, "layers.1.up_proj.weight holds NaN .* stored as F32: .*damaged; download it again"),
    (DOWN, lambda w: w * 1e6, torch.float16, "layers.1.down_proj.weight holds .*infinite values, stored as F16: a "
                                             "conversion overflowed float16.*in bfloat16 or float32"),
    (K_PROJ, lambda w: w * 1e7, torch.float32, "^layers.1.k_proj: the scales of q4_0 overflow float16"),
    (UP, lambda w: w * 1e30, torch.bfloat16, r"^layers.1.up_proj: weights of up to \S+e\+\d\d are more than float32"),
    (MLP_NORM, lambda w: w * 1e30, torch.bfloat16,
     "^layers.1.gate_proj, layers.1.up_proj: calibration produced non-finite activations.*layers.1.mlp_norm.weight, "
     "stored as BF16.*take the original weights"),
    (MLP_NORM, lambda w: w * 1e15, torch.float32, "^layers.1.down_proj: calibration .* in layers.1.mlp_norm.weight"),
    ("norm", lambda w: w * 1e30, torch.bfloat16, r"^lm_head: calibration .* is 1\.\de\+30, in norm.weight, stored as"),
])
@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_refused_where_it_arises(name, change, dtype, says, quantizer, model, text):
    refused(model(name, 1, change, dtype), text, says, quantizer=quantizer)


def test_a_rotated_model_is_refused_by_name_too(model, text):
    refused(model(MLP_NORM, 1, lambda w: w * 1e30, torch.bfloat16), text, "^layers.1.gate_proj: weights of up to",
            rotation="hadamard")


def test_a_stream_that_grows_too_large(model, text, monkeypatch):
    monkeypatch.setattr(sequential, "STREAM_LIMIT", 3.0)
    refused(model(), text, "^output of layers.0.o_proj: calibration produced non-finite activations")


def test_floats_that_do_not_fit(model, text):
    refused(model(O_PROJ, 1, lambda weight: weight * 1e7), text, "^layers.1.o_proj: weights exceed the range of f16",
            type="f16", quantizer="rtn")


def test_a_hessian_that_nothing_repairs(model, text, monkeypatch):
    indefinite = torch.full((96, 96), 5.0, dtype=torch.float64).fill_diagonal_(1.0)
    monkeypatch.setattr(matrices, "mean_hessian", lambda moments: indefinite)
    refused(model(), text, f"^{QKV}: the Hessian is not positive definite even with damping 1", asymmetric="none")


def test_correction_under_too_little_damping():
    """A singular H̃ is damped more, and that is reported."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(50, 16) * torch.randn(1, 16, generator=generator)
    moments = [Moments(16, "cpu", float_inputs=True) for _ in range(2)]
    for one in moments:
        one.add(x, 1.1 * x)
    weight = torch.randn(4, 16, generator=generator)
    found, factors = corrected({"w": weight}, *moments, 1e-20)
    assert factors["w"]["target_damp_escalations"] > 0 and found["w"].isfinite().all()
    assert "of the corrected target" in warnings_of({"w": factors["w"]})[0]


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "iq4_nl", "mxfp4", "int4-g32-zero"])
def test_scales_do_not_depend_on_the_size_of_the_inputs(name):
    """Importance counts by its proportions, from activations of 1e-9 to 1e9."""
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(4, 256, generator=generator), torch.rand(256, generator=generator) + 0.1
    grid = Grid(name)
    decoded = [grid.decode(grid.round(weight, params), params) for params in (
        grid.fit(weight, importance.double() * 2.0**power) for power in (-60, 0, 60))]
    assert torch.equal(decoded[0], decoded[1]) and torch.equal(decoded[2], decoded[1])
    with pytest.raises(InputError, match="importance of the inputs is not finite"):
        grid.fit(weight, importance * math.inf)


def test_the_innermost_name_is_given():
    with pytest.raises(NamedError, match="^inner: wrong$"), naming("outer"), naming("inner"):
        raise InputError("wrong")


def test_output_error_of_the_head_is_compared(model, text):
    _, reports, _ = quantize(model(), text)
    report = reports["lm_head"]
    assert 0 < report["output_error"] < report["rtn_output_error"] and report["snr_db"] is None
    assert "rtn_output_error" not in reports["embed_tokens"]
