"""Whole evaluations of MLX packages: ours, mlx_lm's, and folders that were never quantised."""

import pytest

from optrot_edge.errors import InputError
from optrot_edge.runtime.backends import kind_of, open_package, open_reference
from optrot_edge.runtime.evaluate import evaluate_package, write_reference_file
from optrot_edge.runtime.mlx import MlxBackend
from tests.mlx_models import edit_config
from tests.runtime.byte_llama import TEXT
from tests.runtime.hf_backends import report_by_hand
from tests.runtime.test_evaluate import KEYS

pytest.importorskip("mlx_lm")
SHORT = {"text": TEXT, "windows": 2, "window": 48}


def four_bits(group=32):
    return {"quantize": True, "q_bits": 4, "q_group_size": group}


def test_report_against_the_float_model(mlx):
    report = report_by_hand(MlxBackend, *mlx("llama3_rope", **four_bits()))
    assert report.keys() == KEYS
    assert report["runtime"].startswith("mlx (mlx-lm ") and 6 < report["bits_per_weight"] < 6.2


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
def test_unquantised_folders(mlx, case):
    """What `mlx_lm.convert` writes without -q, and, when mlx is asked for, a Hugging Face folder itself."""
    source, folder = mlx(case)
    assert kind_of(source) == kind_of(folder) == "hf"
    for package, backend in ((folder, None), (source, "mlx")):
        report = evaluate_package(package, reference=source, backend=backend, speed=False, **SHORT)
        assert report["runtime"].startswith("mlx") and report["bits_per_weight"] == 32
        assert report["kl_max"] < 1e-6 and report["top1"] > 0.98
    with pytest.raises(InputError, match="not a package"):
        open_package(source)
    with open_reference(folder) as reference:  # float32 torch is the better reference
        assert reference.runtime == "torch"


def test_kv_bits(mlx):
    source, folder = mlx("wide", **four_bits(64))
    plain = evaluate_package(folder, reference=folder, speed=False, **SHORT)
    assert plain["kl_max"] == 0 and plain["reference_runtime"] == plain["runtime"] and "kv_bits" not in plain
    four, eight = (evaluate_package(folder, reference=folder, kv_bits=bits, speed=False, **SHORT) for bits in (4, 8))
    assert (four["kv_bits"], eight["kv_bits"]) == (4, 8)
    assert four["kl_mean"] > 20 * eight["kl_mean"] > 0
    with pytest.raises(InputError, match="kv_bits is 5"):
        evaluate_package(folder, reference=source, kv_bits=5, **SHORT)


def test_reference_file(mlx, tmp_path):
    source, folder = mlx("llama", **four_bits())
    path = tmp_path / "ref.json"
    write_reference_file(source, path, **SHORT)
    report = evaluate_package(folder, reference=path, speed=False)
    full = evaluate_package(folder, reference=source, speed=False, **SHORT)
    assert report["kl_mean"] < full["kl_mean"] < report["kl_upper_bound"]
    assert report["ppl"] == full["ppl"]
    write_reference_file(folder, path, **SHORT)  # and an MLX package can be the reference
    assert evaluate_package(folder, reference=path, speed=False)["kl_estimate"] == pytest.approx(0, abs=1e-6)


def test_another_models_reference_is_refused(mlx):
    package = mlx("llama", **four_bits())[1]
    with pytest.raises(InputError, match="tokenizers of mlx and float disagree"):
        evaluate_package(package, reference=mlx("qwen3")[0], **SHORT)
    with pytest.raises(InputError, match="longer than the context"):
        evaluate_package(package, reference=mlx("llama")[0], **SHORT | {"window": 257, "windows": 1})


def test_options_of_other_backends_are_refused(mlx, tiny):
    source, folder = mlx("llama", **four_bits())
    for options, says in (({"kv_bits": 8}, "--kv-bits"), ({"trust_remote_code": True}, "--trust-remote-code")):
        for backend in (None, "torch"):
            with pytest.raises(InputError, match=f"{says} is for MLX packages"):
                evaluate_package(tiny, reference=tiny, text=TEXT, backend=backend, **options)
    for backend in ("torch", "llama.cpp"):
        with pytest.raises(InputError, match=f"an MLX package runs in mlx only, not in {backend}"):
            evaluate_package(folder, reference=source, backend=backend, **SHORT)
        with pytest.raises(InputError, match=f"an MLX package runs in mlx only, not in {backend}"):
            evaluate_package(folder, reference=folder, reference_backend=backend, **SHORT)
    with pytest.raises(InputError, match="a GGUF runs in llama.cpp or torch only, not in mlx"):
        open_package(tiny, "mlx")


def test_model_files_are_run_when_told_to(mlx, copied):
    """In the package and in the reference."""
    source, folder = mlx("llama", **four_bits())
    custom = edit_config(copied(folder), model_file="own.py", optrot={"format": "mlx", "format_version": 1})
    (custom / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    assert kind_of(custom) == "mlx"
    for package, reference in ((custom, source), (folder, custom)):
        with pytest.raises(InputError, match="--trust-remote-code"):
            evaluate_package(package, reference=reference, **SHORT)
    report = evaluate_package(custom, reference=custom, trust_remote_code=True, speed=False, **SHORT)
    assert report["kl_max"] == 0
    with pytest.raises(InputError, match="--trust-remote-code"):
        write_reference_file(custom, custom / "r.json", **SHORT)
    write_reference_file(custom, custom / "r.json", trust_remote_code=True, **SHORT)
    assert evaluate_package(folder, reference=custom / "r.json", speed=False)["kl_mean"] == pytest.approx(0, abs=1e-6)
