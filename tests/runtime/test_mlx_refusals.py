"""MLX folders that cannot be run, or not without asking, and what is said of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optrot_edge.errors import InputError
from optrot_edge.runtime.mlx import MlxBackend
from tests.mlx_models import edit_config
from tests.tiny_models import save_tiny

pytest.importorskip("mlx_lm")
TOKENS = np.random.default_rng(0).integers(0, 512, 40)
QUANTISED = {"quantize": True, "q_bits": 4, "q_group_size": 32}


def refused(folder, **options):
    with pytest.raises(InputError) as caught:
        MlxBackend(folder, **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


CUSTOM = """
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)
"""


def test_a_model_file_needs_trust(mlx, copied):
    plain = mlx("llama")[1]
    folder = edit_config(copied(plain), model_file="doubled.py")
    (folder / "doubled.py").write_text(CUSTOM)
    message = refused(folder)
    assert "pass --trust-remote-code" in message and "requires importing and running a custom module" in message
    with MlxBackend(folder, trust_remote_code=True) as backend, MlxBackend(plain, trust_remote_code=True) as other:
        np.testing.assert_allclose(backend.logits(TOKENS), 2 * other.logits(TOKENS), atol=1e-5)
    (folder / "doubled.py").write_text("raise KeyError('broken on purpose')")
    assert "KeyError: 'broken on purpose'" in refused(folder, trust_remote_code=True)
    (folder / "doubled.py").write_text(CUSTOM.replace("2 *", "undefined *"))
    assert "cannot run it: NameError" in refused(folder, trust_remote_code=True)
    (folder / "doubled.py").unlink()
    assert "doubled.py" in refused(folder, trust_remote_code=True)


@pytest.mark.parametrize(("changes", "says"), [
    ({"model_type": None}, "model_type"), ({"model_type": "lamma"}, "lamma not supported"),
    ({"hidden_size": None}, "hidden_size"), ({"hidden_size": "96"}, "cannot load it"),
    ({"hidden_size": 64}, "shape"), ({"num_hidden_layers": 1}, "not in model"),
    ({"num_hidden_layers": 3}, "Missing"), ({"num_attention_heads": 0}, "cannot"),
    ({"quantization": {"group_size": 32, "bits": 4, "lm_head": {"group_size": 32, "bits": 7}}}, "7"),
    ({"quantization": {"group_size": 32, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}}}, "shape"),
    ({"quantization": {"group_size": 32, "bits": 4, "lm_head": False}}, "lm_head"),
    ({"quantization": [1]}, "cannot load it"),
    ({"optrot": {"format": "mlx", "format_version": 2}}, "by a newer optrot-edge (format 2; this one reads up to 1)"),
    ({"optrot": {"format": "mlx", "format_version": "x"}}, "format_version 'x'"), ({"optrot": [1]}, "not an object"),
])
def test_damaged_configs(mlx, copied, changes, says):
    case = mlx("llama", **QUANTISED) if "quantization" in changes else mlx("llama")
    folder = edit_config(copied(case[1]), **changes)
    assert says in refused(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_unreadable_configs(mlx, copied, content):
    folder = copied(mlx("llama")[1])
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refused(folder)


def test_damaged_weights(mlx, copied, tmp_path):
    whole = copied(mlx("llama", **QUANTISED)[1])
    file = whole / "model.safetensors"
    data, arrays = file.read_bytes(), load_file(file)
    for content in (b"", data[:100], data[:-1], b"\xff" * 8 + data[8:]):
        file.write_bytes(content)
        assert "truncated or damaged" in refused(whole)
    name = "model.layers.0.mlp.up_proj"
    for change, says in (({f"{name}.weight": arrays[f"{name}.weight"][:-1]}, "shape"),
                         ({f"{name}.scales": arrays[f"{name}.scales"][:, :-1]}, "group"),
                         ({f"{name}.biases": arrays[f"{name}.biases"][:-1]}, "shape"),
                         ({f"{name}.weight": arrays[f"{name}.weight"].astype(np.float32)}, "uint32"),
                         ({"model.norm.weight": np.ones(95, np.float32)}, "shape"),
                         ({"spare": np.ones(3, np.float32)}, "spare")):
        save_file(arrays | change, file, {"format": "mlx"})
        assert says in refused(whole), change.keys()
    del arrays[f"{name}.biases"]
    save_file(arrays, file)
    assert "biases" in refused(whole)
    file.unlink()
    assert "no model*.safetensors" in refused(whole)


def test_a_missing_shard_is_named(tmp_path):
    source = save_tiny(tmp_path / "float", "llama", shards=True)  # mlx-lm reads these as they are
    with MlxBackend(source) as backend:
        assert backend.logits([1]).shape == (1, 512)
    shard = sorted(source.glob("model-*"))[1]
    shard.unlink()
    assert f"shard {shard.name} of the index is missing" in refused(source)
    (source / "model.safetensors.index.json").unlink()
    assert "Missing" in refused(source)
    assert "config.json is missing" in refused(tmp_path)


def test_a_gptq_folder_is_not_run_wrongly(mlx, copied):
    folder = edit_config(copied(mlx("llama")[0]), quantization_config={"quant_method": "gptq", "bits": 4})
    assert "GPTQ" in refused(folder)


def test_too_low_a_limit_of_open_files(mlx):
    """mlx_lm raises the limits when it is imported; where that is forbidden, the message says so."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
from optrot_edge.errors import InputError
from optrot_edge.runtime.mlx import MlxBackend
try:
    MlxBackend({str(mlx("llama")[1])!r})
    print("loaded")
except InputError as error:
    print(error)
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))
    print("allowed")
except ValueError:
    print("forbidden")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[2]).stdout.splitlines()
    assert out[1] == "allowed" and out[0] == "loaded" or out[1] == "forbidden" and "open files" in out[0]


def test_what_cannot_have_kv_bits(mlx, copied):
    folder = mlx("llama")[1]
    with pytest.raises(InputError, match="kv_bits is 3; 4 or 8"):
        MlxBackend(folder, kv_bits=3)
    with pytest.raises(InputError, match="--kv-bits 8 cannot be had.*divisible"):  # heads of 16
        MlxBackend(folder, kv_bits=8)
    rotating = edit_config(copied(mlx("qwen2")[1]), model_type="llama", attention_bias=True, sliding_window=8,
                           layer_types=["sliding_attention", "full_attention"])
    weights = load_file(rotating / "model.safetensors")
    biases = {f"model.layers.{i}.self_attn.o_proj.bias": np.zeros(96, np.float32) for i in range(2)}
    save_file(weights | biases, rotating / "model.safetensors", {"format": "mlx"})
    with MlxBackend(rotating) as backend:
        assert backend.logits(TOKENS).shape == (40, 512)
    with pytest.raises(InputError, match="--kv-bits 4 cannot be had.*Rotating"):
        MlxBackend(rotating, kv_bits=4)


def test_importing_leaves_enough_open_files():
    import resource

    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (2048, 4096)
