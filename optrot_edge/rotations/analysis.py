"""Methods whose transforms run online, in torch only: what they would reach with the same grid and quantiser.

No package can hold them, so there is no checkpoint: `analyse` returns a view that `optrot_edge.models.forward` and
`TorchBackend` run, weights transformed, rounded and transformed back, activations rounded in the transformed basis.

* "quip#": random Hadamards on both sides of every weight (QuIP#, arXiv 2402.04396, its incoherence processing; not
  its E8 codebook, as all arms share a grid).
* "flatquant": FlatQuant (arXiv 2410.09426): an invertible Kronecker product per input of linears. Its per-channel
  scales, learned clipping and the split of o's transform into heads are left out.
* "butterflyquant": ButterflyQuant (arXiv 2509.09679): butterflies of Givens rotations per input, without its
  regulariser towards uniform entries. A fixed random orthogonal matrix covers the odd factor of a width.

The last two learn per input of the float model (as FlatQuant's code does) on the squared error of the outputs of the
linears that read it, relative to the outputs, over 1,024 sampled tokens (others judge: the start stays where nothing is
won), by Adam with a cosine step, weights rounded with scales from the range (`quantize.min_max`), gradients through the
range. (FlatQuant's loss is that of a decoder layer's output.) What is learned depends on the grid and on the bits of
the activations, not on the quantiser, so one `LearnedTransforms` serves both. The body is held in memory, float32.

GPTQ sees what the layers quantised before give a layer, but all four inputs of a layer as its float weights make them
(`optrot_edge.quantize.sequential` collects o's and down's after the layer's earlier matrices are rounded).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from optrot_edge.device import widest_float
from optrot_edge.errors import InputError, StorageError
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
from optrot_edge.rotations.transforms import Butterfly, Hadamard, Kronecker

KIND_OF_FIRST = {names[0]: kind for kind, names in INPUTS.items()}
TOKENS, JUDGES = 1024, 146  # sampled to learn on, and to judge by
LEARNED = {"flatquant": Kronecker, "butterflyquant": Butterfly}
RATES = {"flatquant": 0.005, "butterflyquant": 0.02}  # of Adam: entries of the factors, radians


@dataclass
class AnalysisOptions:
    """`method` of `baselines.ONLINE`; `grid`: the body's type; `quantizer` "gptq" (plain, with `damp` and `act_order`)
    or "rtn" (scales fit the weights alone), of the transformed weights; `activations`: bits they are learned for;
    `steps` per input. Raises InputError on values out of range."""

    method: str
    grid: str = "q4_0"
    quantizer: str = "gptq"
    activations: int = FLOAT
    steps: int = 100
    damp: float = 0.1
    act_order: bool = True
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
    """A float model with its body quantised in another basis; see `forward.logits` for what it offers."""

    def __init__(self, source, layers: list[forward.Layer], transforms: list[dict]):
        self.source, self.config = source, source.config
        self.layers, self.transforms = layers, transforms

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


@dataclass
class LearnedTransforms:
    """`layers`: a transform per layer and kind of input; `losses`: for each the relative squared error on the tokens
    that judge, before and after; `tokens`: how many were learned on."""

    method: str
    layers: list[dict]
    losses: list[dict]
    steps: int
    tokens: int

    @property
    def learning(self) -> dict:
        """Steps, tokens a step and the losses' sums, under the names of `arms.learning_of`."""
        before, after = (sum(pair[which] for layer in self.losses for pair in layer.values()) for which in (0, 1))
        return {"steps": self.steps, "tokens_per_step": self.tokens, "loss_start": before, "loss": after}

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file; StorageError when that fails."""
        tensors = {f"{index}.{kind}.{name}": tensor.detach().cpu().contiguous()
                   for index, layer in enumerate(self.layers) for kind, transform in layer.items()
                   for name, tensor in transform.tensors().items()}
        about = {"method": self.method, "losses": self.losses, "steps": self.steps, "tokens": self.tokens}
        try:
            save_file(tensors, path, metadata={"optrot-transforms": json.dumps(about)})
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write {path}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> LearnedTransforms:
        """Read what `save` wrote; InputError when it is something else."""
        try:
            with safe_open(path, framework="pt") as handle:
                about = json.loads((handle.metadata() or {})["optrot-transforms"])
                found: list[dict] = [{} for _ in about["losses"]]
                for key in handle.keys():  # noqa: SIM118
                    index, kind, name = key.split(".")
                    found[int(index)].setdefault(kind, {})[name] = handle.get_tensor(key)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} holds no learned transforms ({error})") from None
        layers = [{kind: LEARNED[about["method"]](**tensors) for kind, tensors in layer.items()} for layer in found]
        return cls(about["method"], layers, about["losses"], about["steps"], about["tokens"])


@torch.no_grad()
def learn_transforms(source, tokens: torch.Tensor, options: AnalysisOptions, generator: torch.Generator,
                     progress: Callable[[int, int], None] | None = None) -> LearnedTransforms:
    """The transforms of "flatquant" or "butterflyquant" for the float model `source`, on `tokens` int64 [windows,
    length]. Raises InputError for a method that learns nothing, and for rows that do not fit the grid."""
    if options.method not in RATES:
        raise InputError(f"{options.method} learns nothing")
    config, device = source.config, options.device
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    kept = torch.randperm(tokens.numel(), generator=generator)[:TOKENS + JUDGES].sort().values
    judges = max(1, min(JUDGES, len(kept) // 8))  # the first of the text
    stream = embedded(tokens, lambda ids: picked_rows(native_chunks(source), ids))
    layers, losses = [], []
    for index in range(config.num_hidden_layers):
        layer = {k: v.to(device) for k, v in source.layer(index, torch.float32).items()}
        rows = _sampled(stream, layer, config, rope, kept)
        found, errors = {}, {}
        for kind, names in INPUTS.items():
            found[kind] = LEARNED[options.method].start(rows[kind].shape[1], generator)
            weight = torch.cat([layer[f"{name}.weight"] for name in names])
            errors[kind] = learn_transform(found[kind], weight, rows[kind][judges:], rows[kind][:judges], options)
        layers.append(found)
        losses.append(errors)
        if progress:
            progress(index + 1, config.num_hidden_layers)
    stream.close()
    return LearnedTransforms(options.method, layers, losses, options.steps, len(kept) - judges)


@torch.no_grad()
def analyse(source, tokens: torch.Tensor, options: AnalysisOptions, generator: torch.Generator,
            progress: Callable[[int, int], None] | None = None, *,
            learned: LearnedTransforms | None = None) -> AnalysisModel:
    """Quantise the float model `source` as `options` say, calibrated on `tokens` int64 [windows, length].

    A method that learns needs what it `learned`. Raises InputError without, for rows that do not fit the grid, and as
    GPTQ does.
    """
    if (learned.method if learned else None) != (options.method if options.method in RATES else None):
        raise InputError(f"{options.method} takes what `learn_transforms` learned for it, quip# takes none")
    config, device = source.config, options.device
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    stream = embedded(tokens, lambda ids: picked_rows(native_chunks(source), ids))
    layers, transforms = [], []
    for index in range(config.num_hidden_layers):
        layer = {k: v.to(device) for k, v in source.layer(index, torch.float32).items()}
        hessians = _hessians(stream, layer, config, rope)
        found = {kind: Hadamard.start(len(hessians[kind]), generator) for kind in INPUTS} if learned is None \
            else learned.layers[index]
        for kind, names in INPUTS.items():
            weights = [layer[f"{name}.weight"] for name in names]
            parts = quantised(weights, hessians[kind], found[kind], options, generator)
            layer |= {f"{name}.weight": part for name, part in zip(names, parts, strict=True)}
        _run(stream, layer, config, rope)
        layers.append({name: tensor.cpu() for name, tensor in layer.items()})
        transforms.append(found)
        if progress:
            progress(index + 1, config.num_hidden_layers)
    stream.close()
    return AnalysisModel(source, layers, transforms)


def _run(stream, layer: forward.Layer, config, rope, *, see: Callable | None = None, write: bool = True) -> None:
    """Take the stream through `layer`, or leave it; `see(kind, x, windows)` is shown what the linears read."""
    device = layer["o_proj.weight"].device
    for windows in stream.batches(8):
        def tap(name, x, y, windows=windows):
            if name in KIND_OF_FIRST:
                see(KIND_OF_FIRST[name], x, windows)
            return y

        out = forward.decoder_layer(stream.read(windows).to(device), layer if see is None else {**layer, "tap": tap},
                                    config, rope)
        if write:
            stream.write(windows, out.cpu())


def _sampled(stream, layer: forward.Layer, config, rope, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs, by kind, of the tokens at the sorted places `kept`; the stream is taken through the layer."""
    rows: dict[str, list[torch.Tensor]] = {}

    def see(kind: str, x: torch.Tensor, windows: slice) -> None:
        first, last = (place * x.shape[1] for place in (windows.start, windows.stop))
        here = kept[(kept >= first) & (kept < last)] - first
        rows.setdefault(kind, []).append(x.flatten(0, 1)[here.to(x.device)])

    _run(stream, layer, config, rope, see=see)
    return {kind: torch.cat(parts) for kind, parts in rows.items()}


def _hessians(stream, layer: forward.Layer, config, rope) -> dict[str, torch.Tensor]:
    """E[xxᵀ] of the layer's inputs by kind; the stream stays where it is."""
    sums: dict[str, MeanProduct] = {}

    def see(kind: str, x: torch.Tensor, windows: slice) -> None:
        sums.setdefault(kind, MeanProduct(x.shape[-1], x.shape[-1], x.device)).add(x)

    _run(stream, layer, config, rope, see=see, write=False)
    return {kind: total.mean() for kind, total in sums.items()}


def output_error(transform, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, grid: Grid,
                 activations: int) -> torch.Tensor:
    """‖ŷ − y‖² / ‖y‖² of `y = x Wᵀ` [rows, out] when weights (and activations) are rounded in the transform's basis."""
    z, turned = transform.apply(x), transform.weight(weight)
    turned = turned + weight_error(turned, grid, through_range=True)
    if activations != FLOAT:
        z = z + rounding_error(z, activations, through_range=True)
    return (z @ turned.T - y).square().sum() / y.square().sum().clamp_min(torch.finfo(x.dtype).tiny)


@torch.no_grad()
def learn_transform(transform, weight: torch.Tensor, x: torch.Tensor, judging: torch.Tensor,
                    options: AnalysisOptions) -> tuple[float, float]:
    """Adjust the transform's parameters in place on the inputs `x` [tokens, n] of `weight` [out, n]; the relative error
    on the inputs `judging`, before and after."""
    grid = Grid(fitting_type(options.grid, weight.shape[1]))
    parameters = [parameter.requires_grad_() for parameter in transform.parameters]
    y, wanted = x @ weight.T, judging @ weight.T
    judged = lambda: float(output_error(transform, weight, judging, wanted, grid, options.activations))  # noqa: E731
    before, start = judged(), [parameter.detach().clone() for parameter in parameters]
    adam = torch.optim.Adam(parameters, lr=RATES[options.method])
    for step in range(options.steps):
        adam.param_groups[0]["lr"] = RATES[options.method] * (1 + math.cos(math.pi * step / options.steps)) / 2
        adam.zero_grad()
        with torch.enable_grad():
            output_error(transform, weight, x, y, grid, options.activations).backward()
        adam.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    after = judged()
    if after < before:
        return before, after
    for parameter, value in zip(parameters, start, strict=True):
        parameter.copy_(value)
    return before, before


def quantised(weights: list[torch.Tensor], hessian: torch.Tensor, transform, options: AnalysisOptions,
              generator: torch.Generator) -> list[torch.Tensor]:
    """The decoded weights [out, in] of the linears that read one input, float32, in their own basis; `hessian` [in, in]
    is the input's. Outputs are mixed within each of them: a mixture of all would share the error of the largest."""
    outer = [Hadamard.start(len(weight), generator) for weight in weights] if options.method == "quip#" else []
    grid, wide = Grid(fitting_type(options.grid, len(hessian))), widest_float(hessian.device)
    parts = [transform.weight(w.to(wide)) for w in weights]
    for index, one in enumerate(outer):
        parts[index] = one.apply(parts[index].T).T
    turned = torch.cat(parts).float().contiguous()
    if options.quantizer == "rtn":
        params = grid.fit(turned)
        codes = grid.round(turned, params)
    else:
        h = transform.apply(transform.apply(hessian.to(wide)).T.contiguous())
        params = grid.fit(turned, h.diagonal())
        codes = gptq(turned, prepare_hessian(h, damp=options.damp, act_order=options.act_order), grid, params)
    parts = list(grid.decode(codes, params).to(wide).split([len(weight) for weight in weights]))
    for index, one in enumerate(outer):
        parts[index] = one.undo(parts[index].T).T
    return [transform.weight_back(part.contiguous()).float() for part in parts]
