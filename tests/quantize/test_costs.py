"""Costs of types against the KL that those types really cause, one matrix at a time."""

from __future__ import annotations

import pytest
import torch

from optrot_edge.inputs import CalibrationInputs
from optrot_edge.models import forward, open_model
from optrot_edge.quantize.costs import _draw, measure_costs
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.recipe import Recipe
from tests.road import save_model, write_text

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


class Changed:
    """The model with one matrix replaced."""

    def __init__(self, source, name, weight):
        self.source, self.name, self.weight, self.config = source, name, weight, source.config

    def layer(self, index, dtype=torch.float32):
        layer = self.source.layer(index, dtype)
        prefix = f"layers.{index}."
        if self.name.startswith(prefix):
            layer[self.name.removeprefix(prefix)] = self.weight.to(dtype)
        return layer

    def embedding(self, dtype=torch.float32):
        return self.weight.to(dtype) if self.name == "embed_tokens.weight" else self.source.embedding(dtype)

    def lm_head(self, dtype=torch.float32):
        return self.weight.to(dtype) if self.name == "lm_head.weight" else self.source.lm_head(dtype)

    def final_norm(self, dtype=torch.float32):
        return self.source.final_norm(dtype)


def divergence(source, changed, tokens) -> float:
    """KL in nats per token, in float64."""
    p, q = (forward.logits(model, tokens, dtype=torch.float64).log_softmax(-1) for model in (source, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    source = open_model(save_model(folder / "model", "tinyllama"))
    recipe = Recipe(rotation="none", target_bpw=6, nsamples=64, seqlen=32, calibration=write_text(folder / "t.txt", 8))
    with CalibrationInputs(source, recipe, "cpu", folder) as inputs:
        return source, inputs.tokens, [inputs.covariances.layer(i) for i in range(3)], measure_costs(source, inputs)


def rounded(weight: torch.Tensor, kind: str, hessian=None) -> torch.Tensor:
    grid = Grid(kind)
    params = grid.fit(weight, None if hessian is None else hessian.diagonal())
    codes = grid.round(weight, params) if hessian is None else gptq(weight, prepare_hessian(hessian, damp=0.1), grid,
                                                                    params)
    return grid.decode(codes, params)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0"])
def test_embedding_and_head(kind, measured):
    source, tokens, _, costs = measured
    embedding, head = source.embedding(), source.lm_head()
    found = divergence(source, Changed(source, "embed_tokens.weight", rounded(embedding, kind)), tokens[:32])
    assert 0.6 < found / costs["embed_tokens.weight"][kind] < 1.6
    hidden = forward.final_hidden(source, tokens).flatten(0, 1).double()
    head = rounded(head, kind, hidden.T @ hidden / len(hidden))
    found = divergence(source, Changed(source, "lm_head.weight", head), tokens[:32])
    assert 0.75 < found / costs["lm_head.weight"][kind] < 1.33


@pytest.mark.parametrize("kind", ["q4_0", "q5_1"])
def test_linears(kind, measured):
    """After GPTQ, of which the costs know nothing but D: each within a factor of two, all together within a quarter."""
    source, tokens, covariances, costs = measured
    found = expected = 0.0
    stages = [("mlp", ["gate_proj", "up_proj"]), ("o", ["o_proj"]), ("down", ["down_proj"])]
    for index, (reads, names) in enumerate(stages):
        layer, h = source.layer(index), covariances[index][reads]
        if reads == "mlp":
            gain = layer["mlp_norm.weight"].double()
            h = gain[:, None] * h * gain
        for name in names:
            full = f"layers.{index}.{name}.weight"
            kl = divergence(source, Changed(source, full, rounded(layer[f"{name}.weight"], kind, h)), tokens)
            assert 0.5 < kl / costs[full][kind] < 2, full
            found, expected = found + kl, expected + costs[full][kind]
    assert 0.75 < found / expected < 1.33


def test_every_type_costs_less_with_more_bits(measured):
    for name, costs in measured[3].items():
        order = ["q4_0", "q5_0", "q8_0"]
        assert [costs[kind] for kind in order] == sorted((costs[kind] for kind in order), reverse=True), name
        assert set(costs) >= {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"} and min(costs.values()) > 0


def test_draw_follows_the_weights():
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0])
    counts = _draw(weights, 800, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert counts.tolist() == pytest.approx([0, 100, 200, 500], abs=1)
    assert _draw(torch.zeros(3), 8, torch.Generator()).tolist() == [0, 1, 2]
