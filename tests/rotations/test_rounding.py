"""The network that rotations are learned through is the rotated model rounded, and its gradients are right."""

import pytest
import torch

from optrot_edge.models import forward, open_model
from optrot_edge.models.activations import fake_quantize_tokens
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.min_max import block_scales, weight_error
from optrot_edge.quantize.sequential import LINEARS
from optrot_edge.rotations import rounding as module
from optrot_edge.rotations.end_to_end import QuantizedNetwork
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.rotation import Rotation, scale_widths
from optrot_edge.rotations.rounding import LayerBasis, Rounding
from tests.tiny_models import random_tokens

CASES = ["smollm2", "llama_bias", "qwen2_untied", "qwen3"]


def rotation_of(config, scaled: bool, which=("r1", "r2"), r4_block=None) -> Rotation:
    """Random Hadamards, and random channel scales if `scaled`."""
    generator = torch.Generator().manual_seed(0)
    rotation = initial_rotation(config, set(which), generator, r4_block=r4_block)
    if scaled:
        for name, width in scale_widths(config).items():
            if name != "up" or not r4_block:
                drawn = torch.randn(config.num_hidden_layers, width, generator=generator, dtype=torch.float64)
                rotation.scales[name] = (0.3 * drawn).exp()
    return rotation


class Rounded:
    """A rotated model with its weights rounded as `weight_error` rounds."""

    def __init__(self, model, grid):
        self.model, self.grid, self.config, self.r4_block = model, grid, model.config, model.r4_block

    def __getattr__(self, name):
        return getattr(self.model, name)

    def layer(self, index, dtype):
        layer = self.model.layer(index, dtype)
        for name in LINEARS if self.grid else ():
            weight = layer[f"{name}.weight"]
            layer[f"{name}.weight"] = weight + weight_error(weight, self.grid)
        return layer


@pytest.mark.parametrize(("bits", "grid"), [(8, None), (16, "q4_0"), (4, "q4_1"), (16, "int4-g32-zero")])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_rotated_model_rounded(tiny, case, scaled, bits, grid):
    source, tokens = open_model(tiny(case)), random_tokens(1, 16)
    rotation = rotation_of(source.config, scaled, r4_block=32 if case == "qwen3" else None)
    grid = None if grid is None else Grid(grid)
    rotated = Rounded(RotatedModel(source, rotation), grid)
    want = forward.final_hidden(rotated, tokens, dtype=torch.float64, activations=bits)
    want = want @ rotated.lm_head(torch.float64).T
    widths = {shape[1] for shape in source.family.layer_shapes(source.config).values() if len(shape) == 2}
    network = QuantizedNetwork(source, Rounding(bits, grid and dict.fromkeys(widths, grid)), "cross-entropy", tokens,
                               16, dtype=torch.float64)
    stream = network.stream(torch.tensor([0]), rotation)
    got = forward.head_input(stream, network.norm, network.mix, source.config.rms_norm_eps) @ network.head.T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    plain = forward.logits(source, tokens, dtype=torch.float64)
    assert float((want - plain).abs().max()) > 1e-4  # rounding did something


def test_without_rounding_nothing_changes(tiny):
    source, tokens = open_model(tiny("smollm2")), random_tokens(1, 16)
    network = QuantizedNetwork(source, Rounding(), "cross-entropy", tokens, 16, dtype=torch.float64)
    stream = network.stream(torch.tensor([0]), rotation_of(source.config, True))
    got = forward.head_input(stream, network.norm, None, source.config.rms_norm_eps) @ network.head.T
    torch.testing.assert_close(got, forward.logits(source, tokens, dtype=torch.float64), rtol=0, atol=1e-10)


def skew_direction(r, seed):
    """A tangent R Ω, and R moved along it by `t`, exactly on the group."""
    omega = torch.randn(r.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    omega = omega - omega.mT
    omega = omega / omega.norm()
    return r @ omega, lambda t: r @ torch.linalg.matrix_exp(t * omega)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("loss", "bits", "weights"), [
    ("cross-entropy", 8, True), ("kl-top", 8, True), ("kl-top", 16, True), ("kl-top", 8, False)])
def test_gradients_against_finite_differences(tiny, monkeypatch, loss, bits, weights, keeps):
    """Straight through the rounding means: with its errors held fixed, as they are here. R1, R2 and all scales, in
    float64, activations or weights rounded or both, checkpointed and not."""
    source, tokens = open_model(tiny("qwen2_untied")), random_tokens(2, 12)
    drawn = {}

    def fixed(key, like, size):
        if key not in drawn:
            generator = torch.Generator().manual_seed(len(drawn))
            drawn[key] = size * torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return drawn[key]

    monkeypatch.setattr(module, "rounding_error", lambda z, bits, through_range: fixed(("x", z.shape), z, 0.1))
    monkeypatch.setattr(module, "weight_error", lambda w, grid, through_range: fixed(("w", w.shape), w, 0.02))
    rotation = rotation_of(source.config, True)
    widths = {shape[1] for shape in source.family.layer_shapes(source.config).values() if len(shape) == 2}
    grids = dict.fromkeys(widths, Grid("q4_0")) if weights else None
    network = QuantizedNetwork(source, Rounding(bits, grids), loss, tokens, 24, dtype=torch.float64)
    network.keeps_activations = True
    windows = torch.arange(2)

    def at(**changes) -> float:
        scales = {**rotation.scales, **{k: v for k, v in changes.items() if k in rotation.scales}}
        point = Rotation("none", changes.get("r1", rotation.r1), changes.get("r2", rotation.r2), scales=scales)
        with torch.no_grad():
            return network.loss(windows, point)

    leaves = {"r1": rotation.r1, "r2": rotation.r2, **rotation.scales}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    point = Rotation("none", leaves["r1"], leaves["r2"], scales={k: leaves[k] for k in rotation.scales})
    network.keeps_activations = keeps
    assert network.loss(windows, point) == pytest.approx(at(), rel=1e-12)
    for name, leaf in leaves.items():
        if name in ("r1", "r2"):
            tangent, moved = skew_direction(leaf.detach(), 5)
            step = 1e-4
        else:
            drawn_direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
            tangent, step = drawn_direction / drawn_direction.norm(), 1e-4
            moved = lambda t, leaf=leaf, tangent=tangent: leaf.detach() + t * tangent  # noqa: E731
        numeric = (at(**{name: moved(step)}) - at(**{name: moved(-step)})) / (2 * step)
        analytic = float((leaf.grad * tangent).sum())
        assert abs(numeric) > 1e-6 and analytic == pytest.approx(numeric, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "int4-g32-zero", "iq4_nl", "q8_0"])
def test_weights_are_rounded_to_the_grid(name):
    grid = Grid(name)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[0, :32] = 0
    rounded = (weight + weight_error(weight, grid)).view(8, 2, 32)
    scale, offset = block_scales(weight.view(8, 2, 32), grid.spec)
    assert all(len((block * 1e9).round().unique()) <= grid.spec.levels for row in rounded for block in row)
    assert bool((rounded[0, 0] == 0).all())
    if name == "q4_0":  # by hand: the entry of largest magnitude is −8 steps
        block = weight[3, :32]
        step = block[block.abs().argmax()] / -8
        torch.testing.assert_close(rounded[3, 0], (block / step).round().clamp(-8, 7) * step)
    if name == "q4_1":
        block = weight[3, 32:]
        step = (block.max() - block.min()) / 15
        torch.testing.assert_close(rounded[3, 1], ((block - block.min()) / step).round() * step + block.min())
    assert float(weight_error(weight, grid).norm() / weight.norm()) < (0.02 if name == "q8_0" else 0.2)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl"])
def test_weights_gradient_through_the_range(name):
    grid = Grid(name)
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = torch.randn(2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = weight.clone().requires_grad_()
    (weight_error(at, grid, through_range=True) * units).sum().backward()
    fixed = weight_error(weight, grid) / block_scales(weight, grid.spec)[0]
    for place in (int(weight[1].argmax()), int(weight[1].argmin()), 4):
        moved = [weight.clone() for _ in range(2)]
        moved[0][1, place] += 1e-6
        moved[1][1, place] -= 1e-6
        up, down = (float((fixed * block_scales(m, grid.spec)[0] * units).sum()) for m in moved)
        assert float(at.grad[1, place]) == pytest.approx((up - down) / 2e-6, abs=1e-7)


def test_a_basis_is_left_as_it_is_entered(tiny):
    config = open_model(tiny("qwen2_untied")).config
    basis = LayerBasis(rotation_of(config, True), 1, config)
    for kind, width in (("attn", config.hidden_size), ("mlp", config.hidden_size),
                        ("o", config.num_attention_heads * config.head_dim), ("down", config.intermediate_size)):
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(basis.leave(kind, basis.enter(kind, x)), x, rtol=0, atol=1e-12)
        assert not torch.allclose(basis.enter(kind, x), x)
        assert fake_quantize_tokens(basis.enter(kind, x), 8).shape == x.shape
