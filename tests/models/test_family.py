"""The declarative families and their look-up."""

import subprocess
import sys

import gguf
import pytest

from optrot_edge.errors import InputError
from optrot_edge.models.family import all_families, get_family, get_gguf_family


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.model_type)
def test_gguf_names_are_those_of_gguf_py(family):
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.gguf_arch]
    names = gguf.get_tensor_name_map(arch, 4)
    assert family.hf_names.keys() == family.gguf_names.keys()
    for stem in family.hf_names:
        layered = "{i}" in family.hf_names[stem]
        canonical = f"layers.3.{stem}.weight" if layered else f"{stem}.weight"
        own = names.get_name(family.hf_name(canonical), try_suffixes=(".weight",))
        assert family.gguf_name(canonical) == own


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.model_type)
def test_the_wiring_is_complete(family):
    read_by_norms = {linear for linears in family.norms.values() for linear in linears}
    assert read_by_norms == set(family.reads_residual)
    assert not set(family.reads_residual) & set(family.writes_residual)


@pytest.mark.parametrize(("model_type", "reason"), [
    ("gemma2", "before the residual add"), ("gemma3_text", "before the residual add"),
    ("olmo2", "before the residual add"), ("gemma", "GELU"), ("mixtral", "mixture of experts"),
    ("qwen2_moe", "mixture of experts"), ("qwen3_moe", "mixture of experts"),
    ("deepseek_v3", "mixture of experts"), ("smollm3", "RoPE"), ("phi3", "fused"),
    ("something_new", "not described"),
])
def test_a_family_that_cannot_be_rotated_is_named_with_the_reason(model_type, reason):
    with pytest.raises(InputError, match=reason) as caught:
        get_family(model_type)
    assert model_type in str(caught.value)
    for family in all_families():
        assert family.model_type in str(caught.value).split("supported:")[1]
    with pytest.raises(InputError, match=reason):
        get_gguf_family(model_type)


def test_look_up():
    assert get_family("qwen3", ["Qwen3ForCausalLM"]).qk_norms
    assert get_family("", ["MistralForCausalLM"]).model_type == "mistral"
    assert get_gguf_family("llama").model_type == "llama"
    with pytest.raises(InputError, match="LlamaForSequenceClassification"):
        get_family("llama", ["LlamaForSequenceClassification"])


def test_families_and_config_import_no_torch():
    code = ("import sys, optrot_edge.models, optrot_edge.models.config, optrot_edge.models.family as f;"
            "f.all_families(); sys.exit('torch' in sys.modules or 'gguf' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
