"""What stays continuous in a stored tensor once its codes are fixed, and the gradient of a loss with respect to it.

A quantised matrix keeps its codes, zero-points and integers of two-level grids; its stored scales (d of
super-blocks) and float offsets (mins, dmin) may move. Moves θ are relative: a scale is s₀·(1 + θ), an offset
o₀ + s₀·θ, so that one step size suits every block of every matrix. Gains of norms and biases move likewise, a bias in
units of its root mean square. MXFP4's powers of two leave nothing to move.
"""

from __future__ import annotations

import numpy as np
import torch

from optrot_edge.checkpoint import QuantizedTensor
from optrot_edge.gridspec import decode_scales
from optrot_edge.quantize.grids import Grid, GridParams
from optrot_edge.quantize.refit import slopes_of

Moves = dict[str, torch.Tensor]  # θ by part: "scales", "offsets" [out, in / block_size], or "values" [n]


class FreeTensor:
    """One stored tensor, as read from a checkpoint, on `device`; moves given to its methods are on it too."""

    def __init__(self, name: str, tensor: QuantizedTensor | np.ndarray, device: str = "cpu"):
        self.grid = self.codes = self.params = None
        if isinstance(tensor, QuantizedTensor):
            self.grid = Grid(tensor.spec)
            self.codes, self.params = _unpack(tensor, device)
            self._start = self.params.stored or {"scales": self.params.scales, "offsets": self.params.offsets}
            kinds = ("scales", "offsets") if tensor.spec.kind == "min" else ("scales",)
            is_free = tensor.spec.scale_dtype != "e8m0"
            self._units = dict.fromkeys(kinds, self._start["scales"]) if is_free else {}
        else:
            values = torch.from_numpy(tensor).to(device)
            self._start = {"values": values}
            is_free = values.ndim == 1 and values.dtype == torch.float32
            unit = values.square().mean().sqrt().expand_as(values) if name.endswith(".bias") else values
            self._units = {"values": unit} if is_free else {}

    def no_moves(self) -> Moves:
        """θ = 0 of every part that may move; empty when none may."""
        return {part: torch.zeros_like(self._start[part]) for part in self._units}

    def _moved(self, moves: Moves) -> dict[str, torch.Tensor]:
        """Every part after `moves`, at stored precision."""
        store = self.grid.store if self.grid else lambda values: values
        return self._start | {part: store(self._start[part] + self._units[part] * theta)
                              for part, theta in moves.items()}

    def _params(self, moves: Moves) -> GridParams:
        parts = self._moved(moves)
        return GridParams.of_two_levels(parts) if self.params.stored else GridParams(**parts)

    def weights(self, moves: Moves) -> torch.Tensor:
        """What the tensor stands for after `moves`, at stored precision, float32."""
        return self.grid.decode(self.codes, self._params(moves)) if self.grid else self._moved(moves)["values"].float()

    def gradient(self, of_weights: torch.Tensor) -> Moves:
        """d loss / dθ from d loss / d weights; rounding to stored precision is passed straight through."""
        if self.grid is None:
            return {part: of_weights * unit for part, unit in self._units.items()}
        slopes = slopes_of(self.grid, self.codes, self.params)
        blocks = of_weights.view(slopes[0].shape)
        return {part: (blocks * slope).sum(-1) * unit
                for (part, unit), slope in zip(self._units.items(), slopes, strict=False)}

    def stored(self, moves: Moves) -> QuantizedTensor | np.ndarray:
        """The tensor after `moves` as a checkpoint holds it; the same codes and dtypes."""
        if self.grid is None:
            return self._moved(moves)["values"].cpu().numpy()
        return self.grid.pack(self.codes, self._params(moves))


def _unpack(tensor: QuantizedTensor, device: str) -> tuple[torch.Tensor, GridParams]:
    """Codes and parameters of a stored tensor: the inverse of `Grid.pack`."""
    spec = tensor.spec
    floats = lambda part: torch.from_numpy(decode_scales(part, spec.scale_dtype)).to(device)  # noqa: E731
    integers = lambda part: torch.from_numpy(part.astype(np.float32)).to(device)  # noqa: E731
    codes, scales, offsets = torch.from_numpy(tensor.codes).to(device), floats(tensor.scales), None
    if tensor.offsets is not None:
        offsets = integers(tensor.offsets) if spec.kind == "zero" else floats(tensor.offsets)
    if not spec.subscales:
        return codes, GridParams(scales, offsets)
    stored = {"scales": scales, "subscales": integers(tensor.subscales)}
    if offsets is not None:
        stored |= {"offsets": offsets, "suboffsets": integers(tensor.suboffsets)}
    return codes, GridParams.of_two_levels(stored)
