"""Types that fit a size: the knapsack against all combinations, what is fixed, what is refused."""

from __future__ import annotations

import itertools
import json
from math import prod

import gguf
import numpy as np
import pytest

from optrot_edge.budget import allot, check_target
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.formats import bits_of, candidates
from optrot_edge.models import open_model
from optrot_edge.recipe import Recipe
from optrot_edge.tensor_types import all_shapes
from tests.cli_runner import refused, run_ok
from tests.exporters.test_gguf import check_logits
from tests.road import save_model, write_text


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(save_model(tmp_path_factory.mktemp("budget") / "model", "smollm2"))


def random_costs(source, seed: int) -> dict[str, dict[str, float]]:
    """Falling with the bits, not along a straight line."""
    rng = np.random.default_rng(seed)
    names = [name for name, shape in all_shapes(source.family, source.config).items() if len(shape) == 2]
    return {name: {kind: float(rng.lognormal(0, 1.5) * 4 ** -bits_of(kind) * rng.uniform(0.8, 1.2))
                   for kind in candidates(96)} for name in [*names, "lm_head.weight"]}


def size_of(source, types) -> float:
    shapes = all_shapes(source.family, source.config)
    return sum(prod(shape) * bits_of(types.get(name, "f32")) / 8 for name, shape in shapes.items())


@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all_combinations(seed, source):
    """Of the three matrices left open, every choice is tried."""
    fixed = [f"{name}=q4_0" for name in (r"layers\.1", "q_proj", "k_proj", "v_proj", "o_proj", "embed")]
    recipe = Recipe(rotation="none", target_bpw=5.3, tensor_type=fixed)
    costs, budget = random_costs(source, seed), check_target(source, source.config, Recipe(target_bpw=5.3))
    types, expected = allot(source.family, source.config, recipe, costs, budget)
    open_names = [f"layers.0.{name}_proj.weight" for name in ("gate", "up", "down")]
    assert {types[name] for name in types if name not in open_names} == {"q4_0"}
    assert size_of(source, types) <= budget

    def cost(choice):
        return sum(costs[name][kind] for name, kind in zip(open_names, choice, strict=True))

    fitting = [choice for choice in itertools.product(candidates(96), repeat=3)
               if size_of(source, types | dict(zip(open_names, choice, strict=True))) <= budget]
    best, found = min(map(cost, fitting)), cost([types[name] for name in open_names])
    rest = expected - found
    assert rest == pytest.approx(sum(costs[n]["q4_0"] for n in types if n not in open_names)
                                 + costs["lm_head.weight"]["q4_0"])
    assert best <= found <= 1.3 * best


def test_more_bytes_never_cost_more(source):
    costs, last = random_costs(source, 7), float("inf")
    for bpw in np.linspace(4.6, 8.6, 25):
        recipe = Recipe(rotation="none", target_bpw=bpw)
        budget = check_target(source, source.config, recipe)
        types, expected = allot(source.family, source.config, recipe, costs, budget)
        assert 0.95 * budget < size_of(source, types) <= budget or set(types.values()) == {"q8_0"}
        assert expected <= last * 1.02
        last = min(last, expected)


def test_costs_of_other_types_are_not_taken_for_none(source):
    """Symmetric grids' where asymmetric ones' are known."""
    recipe = Recipe(rotation="none", target_bpw=5.3, format="onnx", dtype="float32", symmetric=True)
    budget = check_target(source, source.config, recipe)
    with pytest.raises(KeyError, match="int"):
        allot(source.family, source.config, recipe, random_costs(source, 3), budget)


@pytest.mark.parametrize("bpw", [4.7, 5.3, 6.1, 7.4])
def test_no_single_change_is_left_that_fits_and_saves(source, bpw):
    recipe, shapes = Recipe(rotation="none", target_bpw=bpw), all_shapes(source.family, source.config)
    for seed in range(6):
        costs, budget = random_costs(source, seed), check_target(source, source.config, recipe)
        types, _ = allot(source.family, source.config, recipe, costs, budget)
        spare = budget - size_of(source, types)
        for name, kind in types.items():
            uses = [name, "lm_head.weight"] if name == "embed_tokens.weight" else [name]
            for other in candidates(96):
                more = prod(shapes[name]) * (bits_of(other) - bits_of(kind)) / 8
                saved = sum(costs[use][kind] - costs[use][other] for use in uses)
                assert more > spare or saved <= 0, (seed, name, kind, other)


def test_too_small_a_target(source):
    with pytest.raises(InputError, match="the smallest types take"):
        check_target(source, source.config, Recipe(target_size=10_000))


@pytest.mark.parametrize("fields", [
    {"target_bpw": 5, "target_size": 5}, {"target_bpw": 0}, {"target_bpw": 5, "type": "q4_0"}, {"target_size": -1},
    {"target_bpw": 5, "quantizer": "rtn", "calibration": "none"}])
def test_targets_that_make_no_sense(fields):
    with pytest.raises(InputError, match="target"):
        Recipe(rotation="none", **fields)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
@pytest.mark.parametrize("rotation", ["none", "auto"])
def test_a_file_of_the_size_asked_for(rotation, tmp_path, capfd, monkeypatch):
    """Never larger, hardly smaller, read by llama.cpp; the second time from the costs kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, text = save_model(tmp_path / "model", "tinyllama"), write_text(tmp_path / "text.txt")
    options = ["--rotation", rotation, "--rotate", "r2", "--plus-steps", 2, "--nsamples", 16, "--seqlen", 32,
               "--calibration", text]
    run_ok("export", model, "--out", tmp_path / "whole.gguf", *options, "--type", "q5_0", "-q", "--rotation", "none")
    size = (tmp_path / "whole.gguf").stat().st_size
    run_ok("export", model, "--out", tmp_path / "m.gguf", "--dry-run", "--json", "--target-size", size, *options)
    planned = json.loads(capfd.readouterr().out)
    run_ok("export", model, "--out", tmp_path / "m.gguf", "--checkpoint", tmp_path / "c", "--json",
           "--target-size", size, *options)
    capfd.readouterr()
    assert 0.93 * size < (tmp_path / "m.gguf").stat().st_size <= size
    tensors = sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert tensors <= planned["bytes"] < size
    checkpoint = QuantizedCheckpoint(tmp_path / "c")
    assert len({entry.get("grid") for entry in checkpoint.manifest["tensors"].values()}) > 2
    assert checkpoint.manifest["expected_kl"] > 0
    largest, spread = check_logits(checkpoint, tmp_path / "m.gguf")
    assert spread < 0.03 and largest < 0.2
    kept = list((tmp_path / "cache" / "optrot-edge" / "costs").iterdir())
    run_ok("quantize", model, "--out", tmp_path / "d", "-q", "--target-bpw", 6, *options)
    assert [path.name for path in kept] == [path.name for path in (tmp_path / "cache/optrot-edge/costs").iterdir()]
    refused(capfd, "export", model, "--out", tmp_path / "n.gguf", *options, "--target-size", "20kB", says="bytes")
