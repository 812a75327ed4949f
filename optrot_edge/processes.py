"""Which of the processes of a `torchrun` launch this one is; needs no torch."""

from __future__ import annotations

import os


def process_count() -> int:
    """Processes of the launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def process_rank() -> int:
    """Rank of this process; 0 writes and prints."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0
