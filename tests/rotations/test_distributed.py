"""Two gloo processes on CPU learn what one does; only the first writes and prints."""

import os
import subprocess
import sys

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.rotations.distributed import World, local_device
from optrot_edge.rotations.rotation import Rotation
from tests.tiny_models import save_tiny


def launch(command, processes=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"}  # no path is broken in two
    prefix = [sys.executable, "-m"]
    if processes > 1:
        prefix += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return subprocess.run([*prefix, "optrot_edge", *map(str, command)], capture_output=True, text=True, timeout=300,
                          env=environment)


def rotate(model, out, processes, *options):
    done = launch(["rotate", model, "--out", out, "--rotation", "optrot", "--calibration", "none", "--device", "cpu",
                   "--optrot-rows", 300, *options], processes)
    assert done.returncode == 0, done.stderr
    return Rotation.load(out), done


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--optrot-steps", 12), ("--optrot-solver", "cayley", "--optrot-steps", 12,
                                                              "--optrot-rows", 0)], ids=["polar", "cayley"])
def test_two_processes_learn_what_one_does(options, tmp_path):
    model = save_tiny(tmp_path / "model", "tinyllama")  # three layers: an uneven share
    one, _ = rotate(model, tmp_path / "one.safetensors", 1, *options)
    two, done = rotate(model, tmp_path / "two.safetensors", 2, *options)
    assert (one.recipe["processes"], two.recipe["processes"]) == (1, 2)
    torch.testing.assert_close(one.r1, two.r1, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.r2, two.r2, rtol=0, atol=1e-5)
    assert two.recipe["layer_loss"] == pytest.approx(one.recipe["layer_loss"], rel=1e-5)
    assert two.recipe["loss"] < 0.99 * two.recipe["loss_start"]
    assert done.stdout.count("two.safetensors") == 1


TOP_FIVE = """
import sys, torch
from optrot_edge.models import open_model
from optrot_edge.rotations import optrot
optrot.TOP = 5
source = open_model(sys.argv[1])
start = optrot.initial_rotation(source.config, {"r1", "r2"}, torch.Generator().manual_seed(0))
options = optrot.OptRotOptions(steps=12, rows=100, objective="top-50")
learned = optrot.learn(source, start, options, torch.Generator().manual_seed(1))
if learned.recipe["processes"] == 1 or torch.distributed.get_rank() == 1:  # every process has the whole result
    learned.save(sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_choose_the_same_matrices(tmp_path):
    model, script = save_tiny(tmp_path / "model", "tinyllama"), tmp_path / "script.py"
    script.write_text(TOP_FIVE)
    learned = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.safetensors"
        prefix = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        done = subprocess.run([sys.executable, *prefix, script, model, out], capture_output=True, text=True,
                              timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        learned.append(Rotation.load(out))
    one, two = learned
    assert two.recipe["processes"] == 2 and one.recipe["objective_loss"] < one.recipe["loss"]
    assert two.recipe["objective_loss"] == pytest.approx(one.recipe["objective_loss"], rel=1e-5)
    torch.testing.assert_close(one.r1, two.r1, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.r2, two.r2, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_other_commands_refuse_torchrun(tmp_path):
    done = launch(["inspect", tmp_path / "model"])
    assert done.returncode != 0 and done.stderr.count("torchrun serves rotate, quantize and export") == 1


@pytest.mark.slow
def test_an_error_waits_for_rank_0_to_say_it(tmp_path):
    command = [sys.executable, "-m", "optrot_edge", "inspect", str(tmp_path / "model")]
    ranks = [{**os.environ, "RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
    other = subprocess.Popen(command, env=ranks[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said = subprocess.run(command, env=ranks[0], capture_output=True, text=True, timeout=300)
        assert said.returncode == 2 and "torchrun serves" in said.stderr
        assert other.poll() is None
    finally:
        other.terminate()
    assert other.communicate(timeout=300)[0] == b""


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = World()
    assert list(world.mine(3)) == [0, 1, 2] and world.size == 1
    assert local_device("cuda") == "cuda"


def test_local_device(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("cuda") == "cuda:1" and local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="nproc-per-node"):
        local_device("cuda")
