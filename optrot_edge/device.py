"""What a device can compute in."""

from __future__ import annotations

import torch


def widest_float(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on Apple GPUs: Metal has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
