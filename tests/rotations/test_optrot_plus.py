"""OptRot+: the function stays, the loss falls, and what it predicts is what GPTQ then loses."""

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations.covariance import INPUTS, collect, rotate_covariances
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.layer_loss import rotated_weights
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.optrot_plus import OptRotPlusOptions, learn_plus, native_start
from optrot_edge.rotations.rotation import ORTHOGONALITY, Rotation, orthogonality_error
from optrot_edge.rotations.sensitivity import output_sensitivity
from tests.tiny_models import random_tokens, save_tiny


def make_uneven(folder):
    """Let the channels of a saved tiny model differ in scale, as trained ones' do: something to gain."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith(("layernorm.weight",)):
            tensors[name] = tensor * torch.randn(tensor.shape, generator=generator).mul(0.5).exp()
        elif name.endswith("down_proj.weight"):
            tensors[name] = tensor * torch.randn(tensor.shape[1], generator=generator).mul(0.5).exp()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model, its tokens, covariances and sensitivities."""
    folder = tmp_path_factory.mktemp("plus")
    source = open_model(make_uneven(save_tiny(folder / "m", "llama3_rope")))
    tokens = torch.randint(0, 512, (48, 64), generator=torch.Generator().manual_seed(1))
    covariances = collect(source, tokens, folder=folder)
    sensitivity, _ = output_sensitivity(source, tokens[:8], covariances, "q4_0", torch.Generator().manual_seed(0))
    return source, tokens, covariances, sensitivity


def learn(setting, start=None, grid="q4_0", seed=0, **options):
    source, _, covariances, sensitivity = setting
    start = native_start(source.config, {"r1", "r2"}) if start is None else start
    return learn_plus(source, start, grid, covariances, sensitivity, OptRotPlusOptions(**{"steps": 15} | options),
                      torch.Generator().manual_seed(seed))


def gptq_loss(setting, rotation, grid):
    """What GPTQ loses, weighted as the learner weights it, on covariances and weights of the rotated model."""
    source, _, covariances, sensitivity = setting
    model, total, grid = RotatedModel(source, rotation), 0.0, Grid(grid)
    for index in range(source.config.num_hidden_layers):
        layer = model.layer(index, torch.float64)
        stored = rotate_covariances(covariances.layer(index), rotation, index, layer, source.config)
        for kind, names in INPUTS.items():
            weight = torch.cat([layer[f"{name}.weight"] for name in names])
            h = stored[kind].double()
            prepared, params = prepare_hessian(h, damp=0.1), grid.fit(weight, h.diagonal())
            error = grid.decode(gptq(weight, prepared, grid, params), params).double() - weight
            rows = ((error @ h) * error).sum(1)
            for name, part in zip(names, rows.split([len(layer[f"{n}.weight"]) for n in names]), strict=True):
                weights = sensitivity[index][name].double()
                if name in ("o_proj", "down_proj"):
                    weights = rotated_weights(weights, rotation.r1)
                if name == "v_proj" and rotation.r2 is not None:
                    weights = rotated_weights(weights.view(rotation.r2.shape[1:3]), rotation.r2[index]).flatten()
                if "up" in rotation.scales and name == "up_proj":
                    weights = weights / rotation.scales["up"][index].square()
                if "value" in rotation.scales and name == "v_proj":
                    weights = weights / rotation.scales["value"][index].square()
                total += float(part @ weights)
    return total


@pytest.mark.parametrize("objective", ["grid", "plain"])
@pytest.mark.parametrize("which", [("r1", "r2"), ("r2",), ("r1",), ()])
def test_function_is_unchanged_and_loss_falls(setting, which, objective):
    source = setting[0]
    rotation = learn(setting, native_start(source.config, set(which)), objective=objective)
    assert rotation.recipe["loss"] < 0.98 * rotation.recipe["loss_start"]
    assert set(rotation.applied) == set(which)
    for matrix in (rotation.r1, rotation.r2):
        assert matrix is None or orthogonality_error(matrix) <= ORTHOGONALITY
    tokens = random_tokens()
    want = forward.logits(source, tokens, dtype=torch.float64)
    got = forward.logits(RotatedModel(source, rotation), tokens, dtype=torch.float64)
    assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max())


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "int4-g32-zero"])
def test_gptq_loses_less_after_it(setting, grid):
    plain = gptq_loss(setting, Rotation("none"), grid)
    assert gptq_loss(setting, learn(setting, grid=grid, steps=40), grid) < 0.95 * plain


def test_native_point_is_the_model_as_it_is(setting):
    """Zero-length steps from the native start give back the weights themselves."""
    source = setting[0]
    rotation = learn(setting, r1_step=1e-12, r2_step=1e-12, scale_step=1e-12, steps=1)
    model = RotatedModel(source, rotation)
    for name, tensor in source.layer(1, torch.float64).items():
        torch.testing.assert_close(model.layer(1, torch.float64)[name], tensor, rtol=1e-5, atol=1e-6)


def test_starts_from_a_hadamard_too(setting):
    start = initial_rotation(setting[0].config, {"r1", "r2"}, torch.Generator().manual_seed(0))
    rotation = learn(setting, start)
    assert rotation.recipe["loss"] < rotation.recipe["loss_start"]
    assert (rotation.r1 - start.r1).abs().max() > 1e-3


def test_without_scales_there_are_none(setting):
    rotation = learn(setting, scales=False)
    assert rotation.scales == {} and rotation.recipe["loss"] < rotation.recipe["loss_start"]


def test_reproducible_from_a_seed(setting):
    one, same, other = (learn(setting, seed=seed, steps=3, rows=16) for seed in (0, 0, 1))
    assert torch.equal(one.r1, same.r1) and torch.equal(one.scales["up"], same.scales["up"])
    assert not torch.equal(one.r1, other.r1)


def test_saved_and_loaded_with_its_scales(setting, tmp_path):
    rotation = learn(setting, steps=2)
    rotation.save(tmp_path / "r.safetensors")
    again = Rotation.load(tmp_path / "r.safetensors")
    again.validate(setting[0].config)
    assert again.scales.keys() == rotation.scales.keys() == {"attn_norm", "mlp_norm", "value", "up"}
    assert all(torch.equal(again.scales[name], rotation.scales[name]) for name in again.scales)


@pytest.mark.parametrize("broken", [0.0, -1.0, float("nan")])
def test_scales_that_are_not_positive_are_refused(setting, broken):
    rotation = learn(setting, steps=1)
    rotation.scales["up"][0, 0] = broken
    with pytest.raises(InputError, match="positive"):
        rotation.validate(setting[0].config)


def test_scales_of_another_model_are_refused(setting):
    rotation = learn(setting, steps=1)
    rotation.scales["up"] = rotation.scales["up"][:, :-1]
    with pytest.raises(InputError, match="another model"):
        rotation.validate(setting[0].config)


def test_groups_must_divide_the_hidden_size(setting):
    with pytest.raises(InputError, match="do not divide"):
        learn(setting, grid="int4-g96-sym")


@pytest.mark.parametrize("options", [{"objective": "best"}, {"steps": 0}, {"rows": 0}])
def test_bad_options(options):
    with pytest.raises(InputError):
        OptRotPlusOptions(**options)


def test_learning_curve_has_a_loss_per_step(setting):
    """As OptRot's, so that a report can draw either."""
    rotation = learn(setting, steps=5, rows=None)
    losses = rotation.recipe["loss_curve"]
    assert len(losses) == 5
    assert losses[0] == pytest.approx(rotation.recipe["loss_start"], rel=1e-4) and losses[-1] < losses[0]
