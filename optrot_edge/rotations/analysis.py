"""Methods whose transforms run online, in torch only: what they would reach with the same grid and quantiser.

No package can hold them, so there is no checkpoint: `analyse` returns a view that `optrot_edge.models.forward` and
`TorchBackend` run, weights transformed, rounded and transformed back, activations rounded in the transformed basis.

* "quip#": random Hadamards on both sides of every weight (QuIP#, arXiv 2402.04396, its incoherence processing; not
  its E8 codebook, as all arms share a grid).
* "flatquant": FlatQuant (arXiv 2410.09426): an invertible Kronecker product per input of linears. Its per-channel
  scales, learned clipping and the split of o's transform into heads are left out.
* "butterflyquant": ButterflyQuant (arXiv 2509.09679): butterflies of Givens rotations per input, without its
  regulariser towards uniform entries. A fixed random orthogonal matrix covers the odd factor of a width.

The last two learn per input on the squared error of the outputs of the linears that read it, relative to the outputs,
over 512 sampled tokens (of which an eighth judges: the start stays where nothing is won), by Adam with a cosine step,
weights rounded with scales from the range (`quantize.min_max`), gradients through the range. (FlatQuant's loss is that
of a decoder layer's output.) Inputs are those of the layers already quantised. The body is held in memory, float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optrot_edge.errors import InputError
from optrot_edge.gridspec import fitting_type
from optrot_edge.models import forward
from optrot_edge.models.activations import FLOAT, check_activations, rounding_error
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.min_max import weight_error
from optrot_edge.quantize.statistics import MeanProduct
from optrot_edge.quantize.streams import embedded, native_chunks, picked_rows
from optrot_edge.rotations.baselines import ONLINE
from optrot_edge.rotations.covariance import INPUTS
from optrot_edge.rotations.transforms import Butterfly, Dense, Kronecker

KIND_OF_FIRST = {names[0]: kind for kind, names in INPUTS.items()}
TOKENS, HELD_OUT = 512, 8
STARTS = {"quip#": Dense.hadamard, "flatquant": Kronecker.start, "butterflyquant": Butterfly.start}
RATES = {"flatquant": 0.005, "butterflyquant": 0.02}  # of Adam: entries of the factors, radians


@dataclass
class AnalysisOptions:
    """`method` of `baselines.ONLINE`; `grid`: the body's type; `quantizer` "gptq" (plain, act-order) or "rtn"
    (searched scales), of the transformed weights; `activations`: bits they are learned for; `steps` per input.
    Raises InputError on values out of range."""

    method: str
    grid: str = "q4_0"
    quantizer: str = "gptq"
    activations: int = FLOAT
    steps: int = 60
    damp: float = 0.1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.method not in ONLINE:
            raise InputError(f"unknown method {self.method!r}; use {', '.join(ONLINE)}")
        if self.quantizer not in ("gptq", "rtn"):
            raise InputError(f"unknown quantizer {self.quantizer!r}; use gptq or rtn")
        if self.steps < 1:
            raise InputError("at least one step is needed")
        check_activations(self.activations)


class AnalysisModel:
    """A float model with its body quantised in another basis; see `forward.logits` for what it offers.

    `losses`, per layer and kind of input, are the relative squared errors (before, after) of learning.
    """

    def __init__(self, source, layers: list[forward.Layer], transforms: list[dict], losses: list[dict]):
        self.source, self.config = source, source.config
        self.layers, self.transforms, self.losses = layers, transforms, losses

    def layer(self, index: int, dtype: torch.dtype = torch.float32) -> forward.Layer:
        """Decoder layer `index`, decoded."""
        return {name: tensor.to(dtype) for name, tensor in self.layers[index].items()}

    def input_transforms(self, index: int, dtype: torch.dtype = torch.float32) -> dict:
        """By kind of input, the basis in which activations are rounded."""
        return self.transforms[index]

    def embedding(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Token embedding [vocab, hidden], the float model's."""
        return self.source.embedding(dtype)

    def final_norm(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Gain of the final norm [hidden], the float model's."""
        return self.source.final_norm(dtype)

    def lm_head(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Output projection [vocab, hidden], the float model's; None when tied."""
        return self.source.lm_head(dtype)


@torch.no_grad()
def analyse(source, tokens: torch.Tensor, options: AnalysisOptions, generator: torch.Generator,
            progress: Callable[[int, int], None] | None = None) -> AnalysisModel:
    """Quantise the float model `source` as `options` say, calibrated on `tokens` int64 [windows, length].

    Raises InputError for rows that do not fit the grid, and as GPTQ does.
    """
    config, device = source.config, options.device
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    kept = torch.randperm(tokens.numel(), generator=generator)[:TOKENS].sort().values
    stream = embedded(tokens, lambda ids: picked_rows(native_chunks(source), ids))
    layers, transforms, losses = [], [], []
    for index in range(config.num_hidden_layers):
        layer = {k: v.to(device) for k, v in source.layer(index, torch.float32).items()}
        hessians, rows = _observe(stream, layer, config, rope, kept, device)
        found, errors = {}, {}
        for kind, names in INPUTS.items():
            found[kind] = STARTS[options.method](hessians[kind].shape[0], generator)
            weight = torch.cat([layer[f"{name}.weight"] for name in names])
            if found[kind].parameters:
                errors[kind] = learn_transform(found[kind], weight, rows[kind], options)
            decoded = quantised(weight, hessians[kind], found[kind], options, generator)
            parts = decoded.split([len(layer[f"{name}.weight"]) for name in names])
            layer |= {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
        for windows in stream.batches(8):
            out = forward.decoder_layer(stream.read(windows).to(device), layer, config, rope)
            stream.write(windows, out.cpu())
        layers.append({name: tensor.cpu() for name, tensor in layer.items()})
        transforms.append(found)
        losses.append(errors)
        if progress:
            progress(index + 1, config.num_hidden_layers)
    stream.close()
    return AnalysisModel(source, layers, transforms, losses)


def _observe(stream, layer: forward.Layer, config, rope, kept: torch.Tensor, device: str) -> tuple[dict, dict]:
    """E[xxᵀ] of the layer's inputs by kind, and the rows `kept` of them."""
    sums: dict[str, MeanProduct] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    for windows in stream.batches(8):
        x = stream.read(windows).to(device)
        first, last = (place * x.shape[1] for place in (windows.start, windows.stop))
        here = (kept[(kept >= first) & (kept < last)] - first).to(device)

        def tap(name, read, y, here=here):
            kind = KIND_OF_FIRST.get(name)
            if kind is not None:
                sums.setdefault(kind, MeanProduct(read.shape[-1], read.shape[-1], device)).add(read)
                rows.setdefault(kind, []).append(read.flatten(0, 1)[here])
            return y

        forward.decoder_layer(x, {**layer, "tap": tap}, config, rope)
    return {kind: total.mean() for kind, total in sums.items()}, {kind: torch.cat(part) for kind, part in rows.items()}


def output_error(transform, weight: torch.Tensor, x: torch.Tensor, grid: Grid, activations: int) -> torch.Tensor:
    """‖ŷ − y‖² / ‖y‖² of `y = x Wᵀ` [rows, out] when weights (and activations) are rounded in the transform's basis."""
    z, turned = transform.apply(x), transform.weight(weight)
    error = weight_error(turned, grid, through_range=True)
    change = z @ error.T
    if activations != FLOAT:
        change = change + rounding_error(z, activations, through_range=True) @ (turned + error).T
    return change.square().sum() / (x @ weight.T).square().sum().clamp_min(torch.finfo(x.dtype).tiny)


@torch.no_grad()
def learn_transform(transform, weight: torch.Tensor, x: torch.Tensor, options: AnalysisOptions) -> tuple[float, float]:
    """Adjust the transform's parameters in place; the relative error on rows that only judge, before and after."""
    grid = Grid(fitting_type(options.grid, weight.shape[1]))
    judges = max(1, len(x) // HELD_OUT)
    judged = lambda: float(output_error(transform, weight, x[:judges], grid, options.activations))  # noqa: E731
    before, start = judged(), [parameter.detach().clone() for parameter in transform.parameters]
    adam = torch.optim.Adam(transform.parameters, lr=RATES[options.method])
    for step in range(options.steps):
        adam.param_groups[0]["lr"] = RATES[options.method] * (1 + math.cos(math.pi * step / options.steps)) / 2
        adam.zero_grad()
        with torch.enable_grad():
            output_error(transform, weight, x[judges:], grid, options.activations).backward()
        adam.step()
    for parameter in transform.parameters:
        parameter.requires_grad_(False)
    after = judged()
    if after < before:
        return before, after
    for parameter, value in zip(transform.parameters, start, strict=True):
        parameter.copy_(value)
    return before, before


def quantised(weight: torch.Tensor, hessian: torch.Tensor, transform, options: AnalysisOptions,
              generator: torch.Generator) -> torch.Tensor:
    """The decoded weight [out, in], float32, in its own basis; `hessian` [in, in] is its input's."""
    outer = Dense.hadamard(len(weight), generator) if options.method == "quip#" else None
    grid = Grid(fitting_type(options.grid, weight.shape[1]))
    turned = transform.weight(weight.double())
    if outer is not None:
        turned = outer.apply(turned.T).T
    turned = turned.float().contiguous()
    h = transform.apply(transform.apply(hessian.double()).T.contiguous())
    params = grid.fit(turned, h.diagonal())
    codes = grid.round(turned, params)
    if options.quantizer == "gptq":
        codes = gptq(turned, prepare_hessian(h, damp=options.damp), grid, params)
    decoded = grid.decode(codes, params).double()
    if outer is not None:
        decoded = outer.undo(decoded.T).T
    return transform.weight_back(decoded.contiguous()).float()
