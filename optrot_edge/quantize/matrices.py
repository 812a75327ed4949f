"""Matrices onto their grids: those that share an input together, embedding and head by rows, with a report on each.

Under torchrun every process solves for its share of the rows, and each gets the whole result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from optrot_edge.checkpoint import FLOAT_TYPES, QuantizedTensor
from optrot_edge.device import widest_float
from optrot_edge.errors import InputError
from optrot_edge.gridspec import fitting_type
from optrot_edge.quantize.asymmetric import Moments, corrected, mean_hessian
from optrot_edge.quantize.gptq import prepare_hessian
from optrot_edge.quantize.grids import Grid, GridParams
from optrot_edge.quantize.numerics import (
    against_rounding,
    as_float,
    check_weights,
    naming,
    shared_report,
    tensor_report,
)
from optrot_edge.quantize.refit import gptq_with_refits
from optrot_edge.quantize.statistics import output_error
from optrot_edge.recipe import ASYMMETRIC
from optrot_edge.rotations.distributed import World


@dataclass
class QuantizerOptions:
    """`types`: the grid of every matrix by canonical name, or f16/f32 to keep floats; rows that do not fill
    super-blocks get the type that `fitting_type` says. `method`: "gptq" or "rtn".
    `damp`: fraction of the mean Hessian diagonal. `asymmetric`: what GPTQ's targets make up for: "none", errors of the
    "inputs", or those of the "residual" stream too. `refits`: how often GPTQ's scales are fitted again.
    `batch_size`: calibration windows at a time."""

    types: dict[str, str]
    method: str = "gptq"
    damp: float = 0.1
    act_order: bool = True
    asymmetric: str = "none"
    refits: int = 0
    batch_size: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "rtn"):
            raise InputError(f"unknown quantizer {self.method!r}; use gptq or rtn")
        if self.asymmetric not in ASYMMETRIC:
            raise InputError(f"unknown asymmetric calibration {self.asymmetric!r}; use {', '.join(ASYMMETRIC)}")
        if self.asymmetric != "none" and self.method == "rtn":
            raise InputError("asymmetric calibration moves GPTQ's targets; round-to-nearest has none")
        if self.refits < 0:
            raise InputError(f"refits is {self.refits}; it counts and cannot be negative")
        for name in set(self.types.values()) - set(FLOAT_TYPES):
            Grid(name)


class MatrixQuantizer:
    """Quantises matrices by `options`; `reports` has what became of each, by canonical name without ".weight"."""

    def __init__(self, options: QuantizerOptions, world: World):
        self.options, self.world = options, world
        self.reports: dict[str, dict] = {}

    def linears(self, prefix: str, layer: dict, names, moments: list[Moments]) -> dict:
        """What is stored of a layer's matrices that share an input, by name; `layer` is updated with the decoded
        weights. With asymmetric calibration `moments` has those of the held-out windows too."""
        types, packed = {name: self.options.types[f"{prefix}{name}.weight"] for name in names}, {}
        for name in names:
            if types[name] in FLOAT_TYPES:
                with naming(prefix + name):
                    packed[name] = as_float(layer[f"{name}.weight"], types[name])
        weights = {name: layer[f"{name}.weight"] for name in names if name not in packed}
        if not weights:
            return packed
        hessian = mean_hessian(moments)
        prepared = self._prepare(hessian)
        factors: dict[str, dict] = {}
        for name, weight in weights.items():
            with naming(prefix + name):
                check_weights(weight)
        if self.options.asymmetric != "none":
            weights, factors = corrected(weights, *moments, self.options.damp)
        common = shared_report(prepared, hessian, moments)
        for kind in dict.fromkeys(types[name] for name in weights):
            same = {name: weight for name, weight in weights.items() if types[name] == kind}
            solved = self._stacked(prefix, same, kind, hessian, prepared)
            for name, (tensor, decoded, rounded) in solved.items():
                with naming(prefix + name):
                    self.reports[f"{prefix}{name}"] = tensor_report(same[name], decoded, rounded, hessian,
                                                                    common | factors.get(name, {}))
                packed[name], layer[f"{name}.weight"] = tensor, decoded
        return packed

    def _stacked(self, prefix: str, weights: dict, kind: str, hessian, prepared) -> dict[str, tuple]:
        """Matrices of one grid and one input, solved for together: by name what is stored, decoded, and what rounding
        to nearest would give (None without GPTQ). Every process solves for its share of the rows."""
        grid, fits = Grid(fitting_type(kind, next(iter(weights.values())).shape[1])), []
        mine = [weight[self.world.share(len(weight))] for weight in weights.values()]
        with self.world.same_errors():
            for name, part in zip(weights, mine, strict=True):
                with naming(prefix + name):
                    fits.append(self._fit(part, grid, hessian))
            codes, params = self._choose_codes(torch.cat(mine), grid, GridParams.join(fits), hessian, prepared,
                                               self.options.refits)
        found, first = {}, 0
        for (name, weight), fitted in zip(weights.items(), fits, strict=True):
            rows = slice(first, first + len(fitted.scales))
            first = rows.stop
            whole, its = self._gathered(codes[rows], params.rows(rows), len(weight))
            rounded = None
            if prepared is not None:
                rounded = grid.decode(*self._gathered(grid.round(weight[self.world.share(len(weight))], fitted), fitted,
                                                      len(weight)))
            found[name] = grid.pack(whole, its), grid.decode(whole, its), rounded
        return found

    def _gathered(self, codes: torch.Tensor, params: GridParams, rows: int) -> tuple[torch.Tensor, GridParams]:
        """Codes and parameters of all `rows`, of which every process has its share."""
        gather = self.world.gather
        return gather(codes, rows), GridParams(gather(params.scales, rows), gather(params.offsets, rows), {
            name: gather(part, rows) for name, part in params.stored.items()})

    def _prepare(self, hessian):
        """The factorised Hessian, or None when codes are to be rounded without feedback."""
        if self.options.method == "rtn" or hessian is None:
            return None
        return prepare_hessian(hessian, damp=self.options.damp, act_order=self.options.act_order)

    @staticmethod
    def _fit(weight: torch.Tensor, grid: Grid, hessian) -> GridParams:
        """Parameters before any codes are chosen."""
        return grid.fit(weight, None if hessian is None else hessian.diagonal())

    @staticmethod
    def _choose_codes(weight: torch.Tensor, grid: Grid, params: GridParams, hessian, prepared, refits: int = 0):
        """Codes and frozen parameters, from those first fitted."""
        if prepared is None:
            return grid.round(weight, params), params
        return gptq_with_refits(weight, hessian, prepared, grid, params, refits)

    def plain(self, name: str, chunks, hessian=None) -> QuantizedTensor | np.ndarray:
        """What is stored of the embedding or the head, which come in chunks of rows: weighted round-to-nearest, or GPTQ
        when there is a Hessian and it is asked for."""
        kind = self.options.types[f"{name}.weight"]
        with naming(name):
            if kind in FLOAT_TYPES:
                return np.concatenate([as_float(rows, kind) for rows in chunks])
            tensors, prepared, device = [], self._prepare(hessian), self.options.device
            signal, noise, wide = 0.0, 0.0, widest_float(device)
            error, rounded = 0.0, 0.0
            for rows in chunks:
                grid = Grid(fitting_type(kind, rows.shape[1]))
                count, rows = len(rows), rows[self.world.share(len(rows))].to(device)
                with self.world.same_errors():
                    check_weights(rows)
                    fitted = self._fit(rows, grid, hessian)
                    codes, params = self._choose_codes(rows, grid, fitted, hessian, prepared, self.options.refits)
                tensors.append(grid.pack(*self._gathered(codes, params, count)))
                delta = grid.decode(codes, params) - rows
                noise += float(delta.square().sum(dtype=wide))
                signal += float(rows.square().sum(dtype=wide))
                if prepared is not None:
                    error += output_error(delta, hessian)
                    rounded += output_error(grid.decode(grid.round(rows, fitted), fitted) - rows, hessian)
        sums = torch.tensor([signal, noise, error, rounded], dtype=torch.float64)
        signal, noise, error, rounded = self.world.sum(sums).tolist()
        report = {"snr_db": None, "relative_mse": noise / signal if signal else 0.0}
        if prepared is not None:
            report |= {"output_error": error} | against_rounding(error, rounded) | shared_report(prepared, hessian)
        self.reports[name] = report
        return QuantizedTensor.join(tensors)
