"""The row weights against what noise in the weights really does to the logits."""

import pytest
import torch
import torch.nn.functional as F

from optrot_edge.models import forward, open_model
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations.covariance import INPUTS, collect
from optrot_edge.rotations.sensitivity import output_sensitivity
from tests.tiny_models import save_tiny


class Changed:
    """A model with one weight replaced."""

    def __init__(self, source, index, name, weight):
        self.source, self.index, self.name, self.weight = source, index, name, weight

    def __getattr__(self, name):
        return getattr(self.source, name)

    def layer(self, index, dtype=torch.float32):
        layer = self.source.layer(index, dtype)
        if index == self.index:
            layer[f"{self.name}.weight"] = self.weight.to(dtype)
        return layer


@pytest.mark.parametrize(("kind", "name"), [("attn", "v_proj"), ("o", "o_proj"), ("mlp", "up_proj"),
                                            ("down", "down_proj"), ("attn", "q_proj")])
def test_predicts_the_divergence_that_gptq_causes(tmp_path, kind, name):
    source = open_model(save_tiny(tmp_path / "m", "llama3_rope"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (56, 48), generator=generator)
    covariances = collect(source, tokens, folder=tmp_path)
    row_weights = output_sensitivity(source, tokens, covariances, "q5_1", generator)[0][1][name]
    layer = source.layer(1, torch.float64)
    h = covariances.layer(1)[kind]
    if kind in ("attn", "mlp"):
        gain = layer[f"{kind}_norm.weight"]
        h = gain[:, None] * h * gain
    weight, grid = layer[f"{name}.weight"], Grid("q5_1")
    params = grid.fit(weight, h.diagonal())
    decoded = grid.decode(gptq(weight, prepare_hessian(h, damp=0.1), grid, params), params).double()
    want = forward.logits(source, tokens, dtype=torch.float64).log_softmax(-1)
    got = forward.logits(Changed(source, 1, name, decoded), tokens, dtype=torch.float64).log_softmax(-1)
    measured = float(F.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean())
    error = decoded - weight
    assert name in INPUTS[kind]
    predicted = 0.5 * float(((error @ h) * error).sum(1) @ row_weights)
    assert predicted == pytest.approx(measured, rel=0.25)
