"""Metadata keys beside those of llama.cpp's own converter, value for value; tokenizers have tests of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from optrot_edge import pipeline
from optrot_edge.exporters.gguf_plan import plan_of_model
from optrot_edge.models import open_model
from optrot_edge.models.model_card import hub_id
from tests.llama_tools import llama_converter
from tests.road import save_model
from tests.tiny_models import CASES

CARD = """---
license: other
license_name: tiny-licence
license_link: https://example.org/LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags: [tiny, test]
base_model: someone/Tiny-7B-v2
datasets:
- someone/text-v1.1
model_creator: Some One
author: A. Writer
version: v3
model_description: A model for tests.
---
# A model card
"""
SAMPLING = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.1}
# What the converter writes for every model of these families (llama.cpp as of llama-cpp-python 0.3.36, conversion/
# base.py, llama.py, qwen.py), without tokenizer.*.
SIZES = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base"}
HEAD_DIM = {"attention.key_length", "attention.value_length"}  # where config.json has head_dim
GENERAL = {"architecture", "type", "name", "size_label", "file_type", "quantization_version"}
OF_ARCH = {"llama": SIZES | HEAD_DIM | {"vocab_size", "rope.dimension_count"}, "qwen2": SIZES,
           "qwen3": SIZES | HEAD_DIM}
# What is written here besides. llama.cpp computes the same from other keys, or does not read it.
MORE = {"vocab_size", "rope.dimension_count"} | HEAD_DIM


def keys(path) -> dict:
    return {key: ([kind.name for kind in field.types], field.contents())
            for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith(("GGUF.", "tokenizer."))}


def float_gguf(model: Path, out: Path) -> Path:
    pipeline.export(model, out, type="f32", embedding_type="f32", quantizer="rtn", calibration="none", rotation="none")
    return out


def converted(model: Path, out: Path) -> Path:
    script = Path(__file__).with_name("convert_keys.py")
    done = subprocess.run([sys.executable, script, llama_converter(), model, out], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return out


def described(model: Path, **config) -> Path:
    """The folder with a model card, sampling advice and changes of config.json."""
    (model / "README.md").write_text(CARD)
    (model / "generation_config.json").write_text(json.dumps(SAMPLING))
    data = json.loads((model / "config.json").read_text()) | config
    (model / "config.json").write_text(json.dumps(data))
    return model


def test_the_same_keys_by_family(tmp_path):
    """The facts above, where there is no converter."""
    for case, more in (("llama", set()), ("smollm2", set()), ("mistral", set()), ("qwen2", set()), ("qwen3", set()),
                       ("llama_linear_rope", {"rope.scaling.type", "rope.scaling.factor"})):
        source = open_model(save_model(tmp_path / case, case))
        source.save_tokenizer(tmp_path / case)
        plan = plan_of_model(source.config, tmp_path / case)
        found = {key for key in plan.entries if not key.startswith("tokenizer.")}
        wanted = {f"{plan.arch}.{key}" for key in OF_ARCH[plan.arch] | more} | {f"general.{key}" for key in GENERAL}
        assert wanted <= found and found - wanted <= {f"{plan.arch}.{key}" for key in MORE}, case


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_converter_writes_the_same(case, tmp_path):
    model = save_model(tmp_path / "Tiny-Model-v0.5-Instruct", case)
    theirs = keys(converted(model, tmp_path / "theirs.gguf"))
    ours = keys(float_gguf(model, tmp_path / "ours.gguf"))
    if case == "mistral_window":  # llama.cpp attends to all of the context: see docs/gguf.md
        context = "llama.context_length"
        assert (theirs.pop(context)[1], ours.pop(context)[1]) == (256, 8)
    assert theirs.items() <= ours.items(), {key: (theirs[key], ours.get(key)) for key in theirs
                                            if theirs[key] != ours.get(key)}
    arch = ours["general.architecture"][1]
    more = {key for key in ours.keys() - theirs.keys() if not key.startswith("optrot.")}
    assert more <= {f"{arch}.{key}" for key in MORE}


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"_name_or_path": "Some-Org/Tiny-Model-1B-v2-Chat"}], ids=["folder", "named"])
def test_the_model_card_as_the_converter_reads_it(config, tmp_path):
    model = described(save_model(tmp_path / "tiny-model-7B", "qwen3"), **config)
    theirs = keys(converted(model, tmp_path / "theirs.gguf"))
    ours = keys(float_gguf(model, tmp_path / "ours.gguf"))
    assert {key: value for key, value in theirs.items() if ours.get(key) != value} == {}
    general = {key for key in ours if key.startswith("general.")}
    assert general == {key for key in theirs if key.startswith("general.")}
    assert ours["general.license"][1] == "other" and ours["general.base_model.0.organization"][1] == "Someone"
    assert ours["general.languages"][1] == ["en", "no"] and ours["general.sampling.temp"][0] == ["FLOAT32"]


def test_the_card_survives_a_second_export(tmp_path):
    model = described(save_model(tmp_path / "tiny-model-7B", "qwen3"))
    first = keys(float_gguf(model, tmp_path / "first.gguf"))
    assert first["general.size_label"][1] and first["general.author"][1] == "A. Writer"
    second = keys(float_gguf(tmp_path / "first.gguf", tmp_path / "second.gguf"))
    general = {key: value for key, value in first.items() if key.startswith("general.")}
    assert {key: value for key, value in second.items() if key.startswith("general.")} | {
        "general.size_label": first["general.size_label"]} == general


def test_a_card_that_cannot_be_read_is_told(tmp_path):
    model = save_model(tmp_path / "tiny", "qwen3")
    (model / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    with pytest.warns(UserWarning, match="model card in .* cannot be read .*Mend the front matter"):
        float_gguf(model, tmp_path / "m.gguf")
    assert "general.license" not in keys(tmp_path / "m.gguf") and keys(tmp_path / "m.gguf")["general.name"][1] == "tiny"


def test_names_of_the_hub_s_cache(tmp_path):
    """Its folders are called after commits."""
    commit = tmp_path / "models--Some-Org--Tiny-Model" / "snapshots" / ("0123456789abcdef" * 3)[:40]
    commit.parent.mkdir(parents=True)
    save_model(commit, "qwen3")
    assert hub_id(commit) == "Some-Org/Tiny-Model" and hub_id(tmp_path) is None
    found = keys(float_gguf(commit, tmp_path / "m.gguf"))
    assert found["general.name"][1] == "Tiny Model" and found["general.organization"][1] == "Some Org"


def test_how_it_was_made(model, text, tmp_path):
    pipeline.export(model("smollm2"), tmp_path / "m.gguf", rotation="hadamard", rotate="r2", type="q4_0",
                    calibration=text, nsamples=4, seqlen=32)
    found = {key.removeprefix("optrot."): value[1] for key, value in keys(tmp_path / "m.gguf").items()
             if key.startswith("optrot.")}
    assert found.pop("version") and len(found.pop("calibration.sha256")) == 64
    assert found == {"rotation": "hadamard", "rotation.applied": "r2", "quantizer": "gptq", "seed": 0,
                     "calibration.windows": 4, "calibration.window_tokens": 32}


def test_long_seeds(model, tmp_path):
    pipeline.export(model("llama"), tmp_path / "m.gguf", rotation="hadamard", quantizer="rtn", calibration="none",
                    seed=2**40)
    assert keys(tmp_path / "m.gguf")["optrot.seed"] == (["UINT64"], 2**40)
