"""Two gloo processes on CPU quantise to the codes of one; only the first writes and prints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from optrot_edge.checkpoint import QuantizedCheckpoint, QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
from optrot_edge.quantize.statistics import MeanProduct
from optrot_edge.rotations.distributed import World
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.rotation import Rotation
from tests.road import save_model
from tests.rotations.test_distributed import launch

WINDOWS = ["--nsamples", 40, "--seqlen", 32, "--device", "cpu"]  # 35 to fit on in five batches, five held out in one


def quantise(model, out, text, processes, *options):
    done = launch(["quantize", model, "--out", out, "--calibration", text, *WINDOWS, *options], processes)
    assert done.returncode == 0, done.stderr
    return QuantizedCheckpoint(out), done


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ("--rotation", "hadamard"), ("--rotation", "none", "--quantizer", "rtn", "--type", "q5_1"),
    ("--rotation", "none", "--asymmetric", "none", "--type", "int4-g32-zero", "--embedding-type", "f16")],
    ids=["all", "rtn", "plain"])
def test_two_processes_quantise_to_the_same_codes(options, text, tmp_path):
    model = save_model(tmp_path / "model", "tinyllama")
    one, _ = quantise(model, tmp_path / "one", text, 1, *options)
    two, done = quantise(model, tmp_path / "two", text, 2, *options)
    assert one.names == two.names and done.stdout.count("Per layer") == 1
    for name in one.names:
        mine, theirs = one.get(name), two.get(name)
        if isinstance(mine, QuantizedTensor):
            assert all(np.array_equal(part, theirs.parts()[key]) for key, part in mine.parts().items()), name
        else:
            assert np.array_equal(mine, theirs), name
    for name, report in one.manifest["errors"].items():
        mine, theirs = ({key: value for key, value in report.items() if value is not None}
                        for report in (report, two.manifest["errors"][name]))
        assert theirs == pytest.approx(mine, rel=1e-4, abs=1e-6), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "two"]


@pytest.mark.slow
def test_two_processes_export(text, tmp_path):
    model = save_model(tmp_path / "model", "smollm2")
    done = [launch(["export", model, "--out", tmp_path / f"{processes}.gguf", "--calibration", text, *WINDOWS,
                    "--rotation", "none", "--json"], processes) for processes in (1, 2)]
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    assert json.loads(done[1].stdout)["path"].endswith("2.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.gguf", "2.gguf", "model"]


@pytest.mark.slow
def test_two_processes_export_for_another_execution_provider(text, tmp_path):
    """Every process fits scales to the dtype that the package stores."""
    model = save_model(tmp_path / "model", "tinyllama")
    done = [launch(["export", model, "--format", "onnx", "--execution-provider", "webgpu", "--out",
                    tmp_path / str(processes), "--checkpoint", tmp_path / f"c{processes}", "--calibration", text,
                    *WINDOWS, "--rotation", "none", "-q"], processes) for processes in (1, 2)]
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    one, two = (QuantizedCheckpoint(tmp_path / f"c{processes}") for processes in (1, 2))
    for name in one.names:
        if isinstance(mine := one.get(name), QuantizedTensor):
            assert all(np.array_equal(part, two.get(name).parts()[key]) for key, part in mine.parts().items()), name


@pytest.mark.slow
def test_an_error_in_the_second_process_is_printed(text, tmp_path):
    """Scales overflow in a row that belongs to rank 1, which is mute."""
    model = save_model(tmp_path / "model", "tinyllama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][-1] *= 1e7
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done = launch(["quantize", model, "--out", tmp_path / "out", "--calibration", text, *WINDOWS, "--rotation", "none"],
                  2)
    assert done.returncode != 0 and done.stderr.count("error: layers.1.k_proj: the scales of q4_0 overflow") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_auto_is_refused(text, tmp_path):
    done = launch(["quantize", save_model(tmp_path / "model", "llama"), "--out", tmp_path / "out", "--calibration",
                   text], 2)
    assert done.returncode != 0 and done.stderr.count("--rotation auto runs in one process") == 1


@pytest.mark.parametrize(("count", "step", "size"), [(28, 8, 2), (3, 8, 2), (0, 8, 3), (7, 1, 3), (512, 1, 8)])
def test_shares_are_whole_pieces_of_everything(count, step, size):
    shares = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        shares.append(range(count)[world.share(count, step)])
    assert [place for share in shares for place in share] == list(range(count))
    assert all(share.start % step == 0 for share in shares if len(share))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2 * step


def test_alone_nothing_changes():
    world, part = World(), torch.randn(4, 3)
    assert world.gather(part, 4) is part and world.gather(None, 4) is None and world.maximum(2.5) == 2.5
    product = MeanProduct(3, 3, "cpu")
    product.add(part)
    assert torch.equal(product.summed(world).mean(), product.mean())
    with pytest.raises(InputError, match="wrong"), world.same_errors():
        raise InputError("wrong")


def test_more_processes_than_rows_are_refused(tiny, monkeypatch):
    source = open_model(tiny("llama"))  # 32 rows of keys
    monkeypatch.setattr(World, "__init__", lambda self, device: setattr(self, "size", 33))
    with pytest.raises(InputError, match="33 processes are more than a matrix has rows"):
        SequentialQuantizer(RotatedModel(source, Rotation("none")), QuantizerOptions({}, "rtn"), None)
