"""Layer-by-layer quantisation: each linear is fitted on what the already quantised ones feed it.

Memory: one decoder layer, the residual stream of the calibration tokens, one Hessian, the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from optrot_edge.checkpoint import FLOAT_TYPES, CheckpointWriter, QuantizedTensor
from optrot_edge.device import widest_float
from optrot_edge.errors import InputError
from optrot_edge.gridspec import fitting_type
from optrot_edge.models import forward
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.statistics import matrix_report

KEEP_BYTES = 2**29  # inputs of o_proj and down_proj are kept for the residual update up to this size
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class QuantizerOptions:
    """`body`, `embedding`, `head`: grid names, or f16/f32 to keep floats; rows that do not fill super-blocks get the
    type that `fitting_type` says. `method`: "gptq" or "rtn".
    `damp`: fraction of the mean Hessian diagonal. `batch_size`: calibration windows at a time."""

    body: str = "q4_0"
    embedding: str = "q4_0"
    head: str = "q8_0"
    method: str = "gptq"
    damp: float = 0.1
    act_order: bool = True
    batch_size: int = 8
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.method not in ("gptq", "rtn"):
            raise InputError(f"unknown quantizer {self.method!r}; use gptq or rtn")
        for name in (self.body, self.embedding, self.head):
            if name not in FLOAT_TYPES:
                Grid(name)


class HessianSum:
    """H = E[xxᵀ] accumulated over tokens: float32 products, float64 sum."""

    def __init__(self, width: int, device):
        self.total = torch.zeros(width, width, dtype=widest_float(device), device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., width]."""
        x = x.reshape(-1, x.shape[-1])
        self.total += (x.T @ x).to(self.total)
        self.tokens += len(x)

    def mean(self) -> torch.Tensor:
        """E[xxᵀ] [width, width]."""
        return self.total / self.tokens


def as_float(weight: torch.Tensor, dtype: str):
    """numpy array in a float storage type ("f32" or "f16"); InputError if fp16 overflows."""
    if dtype == "f32":
        return weight.float().cpu().numpy()
    half = weight.half()
    if not half.isfinite().all():
        raise InputError("weights exceed the range of f16; keep them as f32")
    return half.cpu().numpy()


class SequentialQuantizer:
    """Quantises a (rotated) model into a checkpoint; see `run`."""

    def __init__(self, model, options: QuantizerOptions, tokens: torch.Tensor | None):
        self.model, self.options, self.config = model, options, model.config
        self.device = options.device
        self.reports: dict[str, dict] = {}
        self.tokens = tokens
        if tokens is None and options.method == "gptq":
            raise InputError("GPTQ needs calibration text; give --calibration, or use --quantizer rtn")

    def run(self, writer: CheckpointWriter, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Write every tensor; `progress(done, layers, worst_snr_db)` after each layer."""
        self._stream = None
        embedding = self.model.embedding(torch.float32)
        if self.tokens is not None:
            self._stream = F.embedding(self.tokens, embedding)
            self._rope = forward.rope_tables(self.config, self.tokens.shape[1], device=self.device)
        if not self.config.tie_word_embeddings:
            stored = self._quantize_plain("embed_tokens", embedding, self.options.embedding)
            writer.write_shard("embedding", {"embed_tokens.weight": stored})
            del embedding, stored
        for index in range(self.config.num_hidden_layers):
            writer.write_shard(f"layer-{index:05d}", self._quantize_layer(index))
            if progress:
                rows = [r["snr_db"] for n, r in self.reports.items()
                        if n.startswith(f"layers.{index}.") and r["snr_db"] is not None]
                progress(index + 1, self.config.num_hidden_layers, min(rows, default=float("inf")))
        writer.write_shard("head", self._quantize_head())

    def _parts(self):
        return self._stream.split(self.options.batch_size)

    def _accumulate(self, inputs: Callable, width: int) -> torch.Tensor | None:
        """Hessian of `inputs(part)` over the calibration stream, or None without calibration."""
        if self._stream is None:
            return None
        hessian = HessianSum(width, self.device)
        for part in self._parts():
            hessian.add(inputs(part))
        return hessian.mean()

    def _remembered(self, inputs: Callable, width: int) -> Callable:
        """`inputs` that computes each part once, when all of them fit KEEP_BYTES."""
        if self._stream is None or 4 * self._stream.shape[0] * self._stream.shape[1] * width > KEEP_BYTES:
            return inputs
        kept: dict[int, torch.Tensor] = {}

        def once(x):
            key = x.data_ptr()  # parts are views of the stream: the same storage at both visits
            if key not in kept:
                kept[key] = inputs(x)
            return kept[key]

        return once

    @torch.no_grad()
    def _quantize_layer(self, index: int) -> dict:
        config, out = self.config, {}
        layer = {k: v.to(self.device) for k, v in self.model.layer(index).items()}
        prefix = f"layers.{index}."
        for name, tensor in layer.items():
            if name.removesuffix(".weight") not in LINEARS:
                out[prefix + name] = as_float(tensor, "f32")
        eps, r4 = config.rms_norm_eps, self.model.r4_block

        def attention_input(x):
            return forward.rms_norm(x.to(self.device), layer["attn_norm.weight"], eps)

        def context(x):
            return forward.attention_context(attention_input(x), layer, config, self._rope,
                                             r3_block=self.model.r3_block)

        def mlp_input(x):
            return forward.rms_norm(x.to(self.device), layer["mlp_norm.weight"], eps)

        def hidden(x):
            return forward.mlp_hidden(mlp_input(x), layer, r4_block=r4)

        def residual(inputs, name):
            for part in self._parts() if self._stream is not None else ():
                part += forward.linear(inputs(part), layer, name).to(part.device)

        stages = ((("q_proj", "k_proj", "v_proj"), attention_input), (("o_proj",), context),
                  (("gate_proj", "up_proj"), mlp_input), (("down_proj",), hidden))
        for names, inputs in stages:
            writes = names[0] in ("o_proj", "down_proj")
            width = layer[f"{names[0]}.weight"].shape[1]
            inputs = self._remembered(inputs, width) if writes else inputs
            hessian = self._accumulate(inputs, width)
            stored = self._quantize_linears(prefix, layer, names, hessian)
            out |= {f"{prefix}{name}.weight": tensor for name, tensor in stored.items()}
            if writes:
                residual(inputs, names[0])
        return out

    def _quantize_linears(self, prefix: str, layer: dict, names, hessian) -> dict:
        """Quantise matrices that share an input; `layer` is updated with the decoded weights."""
        if self.options.body in FLOAT_TYPES:
            return {name: as_float(layer[f"{name}.weight"], self.options.body) for name in names}
        weights = [layer[f"{name}.weight"] for name in names]
        grid = Grid(fitting_type(self.options.body, weights[0].shape[1]))
        stacked = torch.cat(weights)
        prepared = self._prepare(hessian)
        codes, params = self._choose_codes(stacked, grid, hessian, prepared)
        extra = {} if prepared is None else {"damp": prepared.damp, "damp_escalations": prepared.escalations,
                                             "dead_columns": int(prepared.dead.sum()),
                                             "tr_d_over_tr_h": prepared.feedback_gain(hessian)}
        decoded = grid.decode(codes, params)
        packed, first = {}, 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(first, first + len(weight))
            first = rows.stop
            packed[name] = grid.pack(codes[rows], params.rows(rows))
            self.reports[f"{prefix}{name}"] = matrix_report(weight, decoded[rows], hessian) | extra
            layer[f"{name}.weight"] = decoded[rows]
        return packed

    def _prepare(self, hessian):
        """The factorised Hessian, or None when codes are to be rounded without feedback."""
        if self.options.method == "rtn" or hessian is None:
            return None
        return prepare_hessian(hessian, damp=self.options.damp, act_order=self.options.act_order)

    @staticmethod
    def _choose_codes(weight: torch.Tensor, grid: Grid, hessian, prepared):
        """Codes and frozen parameters."""
        params = grid.fit(weight, None if hessian is None else hessian.diagonal())
        if prepared is None:
            return grid.round(weight, params), params
        return gptq(weight, prepared, grid, params), params

    def _quantize_plain(self, name: str, weight: torch.Tensor, kind: str, hessian=None):
        """Embedding or head: weighted round-to-nearest, or GPTQ when there is a Hessian and it is asked."""
        if kind in FLOAT_TYPES:
            return as_float(weight, kind)
        grid, tensors, prepared = Grid(fitting_type(kind, weight.shape[1])), [], self._prepare(hessian)
        signal, noise, wide = 0.0, 0.0, widest_float(self.device)
        for rows in weight.split(8192):
            rows = rows.to(self.device)
            codes, params = self._choose_codes(rows, grid, hessian, prepared)
            tensors.append(grid.pack(codes, params))
            noise += float((grid.decode(codes, params) - rows).square().sum(dtype=wide))
            signal += float(rows.square().sum(dtype=wide))
        self.reports[name] = {"snr_db": None, "relative_mse": noise / signal if signal else 0.0}
        return QuantizedTensor.join(tensors)

    @torch.no_grad()
    def _quantize_head(self) -> dict:
        """Final norm and head. A tied matrix is also the embedding, so it is rounded with the head's
        importance but without GPTQ's feedback, which would damage the rows as lookups."""
        norm = self.model.final_norm(torch.float32)
        out = {"norm.weight": as_float(norm, "f32")}
        gain, eps = norm.to(self.device), self.config.rms_norm_eps
        hessian = self._accumulate(lambda x: forward.rms_norm(x.to(self.device), gain, eps), self.config.hidden_size)
        head = self.model.lm_head(torch.float32)
        if head is None:
            diagonal = None if hessian is None else hessian.diagonal().diag()
            out["embed_tokens.weight"] = self._quantize_plain(
                "embed_tokens", self.model.embedding(torch.float32), self.options.head, diagonal)
        else:
            out["lm_head.weight"] = self._quantize_plain("lm_head", head, self.options.head, hessian)
        return out
