"""Which float a device is given."""

import pytest
import torch

from optrot_edge.device import widest_float


@pytest.mark.parametrize("device", ["cpu", "cuda", torch.device("cuda", 1)])
def test_float64_where_there_is_one(device):
    assert widest_float(device) is torch.float64


@pytest.mark.parametrize("device", ["mps", torch.device("mps", 0)])
def test_float32_on_apple_gpus(device):
    assert widest_float(device) is torch.float32
