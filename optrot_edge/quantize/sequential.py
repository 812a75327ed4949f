"""Layer-by-layer quantisation: each linear is fitted on what the already quantised ones feed it.

Under torchrun every process runs this alike, with its share of the calibration windows and of every matrix's rows;
sums and rows are joined, so that each has the whole result.

Memory: one decoder layer, the residual stream of the calibration tokens (or none of it, on the disk), one Hessian, the
codes of the embedding; with asymmetric calibration a float layer and its stream beside them, and five more matrices
of a Hessian's size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from optrot_edge.checkpoint import CheckpointWriter, InputSums, QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.memory import CHUNK
from optrot_edge.models import forward
from optrot_edge.models.family import HEAD_MIX
from optrot_edge.quantize.asymmetric import Moments, held_out_count, input_sums, mean_hessian
from optrot_edge.quantize.matrices import MatrixQuantizer, QuantizerOptions
from optrot_edge.quantize.numerics import (
    as_float,
    naming,
    peak_of,
    refuse_overflow,
)
from optrot_edge.quantize.streams import embedded, picked_rows
from optrot_edge.rotations.distributed import World

STREAM_LIMIT = 1e18  # of the residual stream in float32: RMSNorm squares it
KEEP_BYTES = 2**29  # inputs of o_proj and down_proj are kept for the residual update up to this size
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # one input each
LINEARS = tuple(name for names in STAGES for name in names)


class SequentialQuantizer:
    """Quantises a (rotated) model into a checkpoint; see `run`. The streams lie in the folder `scratch`, if given."""

    def __init__(self, model, options: QuantizerOptions, tokens: torch.Tensor | None, scratch: Path | None = None,
                 guidance: list[dict[str, torch.Tensor]] | None = None):
        """`guidance`: weights of the tokens, see `optrot_edge.quantize.guidance`."""
        self.model, self.options, self.config = model, options, model.config
        self.source = getattr(model, "source", model)
        self.device = options.device
        self._entered = 0  # reports that are in a shard's entry
        self.tokens, self.scratch, self.guidance = tokens, scratch, guidance
        self._stream = self._float_stream = None
        self._sums: InputSums = {}  # of the shard in the making
        self._held_out, self._judges = 0, False
        self.world = World(self.device)
        self.matrices = MatrixQuantizer(options, self.world)
        self.reports = self.matrices.reports
        vocab, values = self.config.vocab_size, self.config.num_key_value_heads * self.config.head_dim
        if self.world.size > min(vocab % CHUNK or CHUNK, values):
            raise InputError(f"{self.world.size} processes are more than a matrix has rows; lower --nproc-per-node")
        if tokens is None and options.method == "gptq":
            raise InputError("GPTQ needs calibration text; give --calibration, or use --quantizer rtn")

    def run(self, writer: CheckpointWriter, progress: Callable[[int, int, float], None] | None = None) -> None:
        """Write every tensor; `progress(done, layers, worst_snr_db)` after each layer.

        Shards that `writer` kept of an interrupted run are not made again: the streams run through their weights
        by the same operations, so that what follows gets the same bits.
        """
        self._write_embedding(writer)
        for index in range(self.config.num_hidden_layers):
            self._write_layer(writer, index)
            if progress:
                rows = [r["snr_db"] for n, r in self.reports.items()
                        if n.startswith(f"layers.{index}.") and r["snr_db"] is not None]
                progress(index + 1, self.config.num_hidden_layers, min(rows, default=float("inf")))
        if not self._was_kept(writer, "head"):
            self._commit(writer, "head", self._quantize_head())

    def _write_embedding(self, writer) -> None:
        """Quantise an untied embedding, and start the streams if any layer needs them."""
        finished, stored = writer.kept("head") is not None, None
        if not self.config.tie_word_embeddings:
            if not self._was_kept(writer, "embedding"):
                stored = self.matrices.plain("embed_tokens", self.model.chunks("embed_tokens.weight"))
                self._commit(writer, "embedding", {"embed_tokens.weight": stored})
            elif not finished:
                stored = writer.read("embedding")["embed_tokens.weight"]
        if self.tokens is not None and not finished:
            self._start(stored)

    def _write_layer(self, writer, index: int) -> None:
        shard = f"layer-{index:05d}"
        if not self._was_kept(writer, shard):
            self._commit(writer, shard, self._quantize_layer(index))
        elif self._stream is not None:
            self._quantize_layer(index, writer.read(shard))

    def _was_kept(self, writer, shard: str) -> bool:
        """Whether an interrupted run finished `shard`; its reports are taken over then."""
        reports = writer.kept(shard)
        if reports is not None:
            self.reports |= reports
            self._entered = len(self.reports)
        return reports is not None

    def _commit(self, writer, shard: str, tensors: dict) -> None:
        """Write `shard` with the reports on its tensors and the sums of their squared inputs."""
        writer.write_shard(shard, tensors, dict(list(self.reports.items())[self._entered:]), self._sums)
        self._entered, self._sums = len(self.reports), {}

    def _start(self, stored: QuantizedTensor | np.ndarray | None) -> None:
        """Residual streams before the first layer: as the package has it (`stored`) and, for asymmetric calibration,
        the float model's. A tied embedding is quantised last, so its errors are not seen here."""
        def original(ids):
            return picked_rows(self.model.chunks("embed_tokens.weight"), ids)

        def package(ids):
            rows = stored.rows(ids.numpy()).decode() if isinstance(stored, QuantizedTensor) else stored[ids.numpy()]
            return torch.from_numpy(rows).float()

        self._rope = forward.rope_tables(self.config, self.tokens.shape[1], device=self.device)
        self._judges = self.options.asymmetric != "none"
        held_out = held_out_count(len(self.tokens)) if self._judges else 0
        # Whole batches to each process, so that every product is the one that a single process would have.
        fit, held = (part[self.world.share(len(part), self.options.batch_size)] for part in
                     (self.tokens[:len(self.tokens) - held_out], self.tokens[len(self.tokens) - held_out:]))
        tokens, self._held_out = torch.cat([fit, held]), len(held)
        self._stream = embedded(tokens, original if stored is None else package, self.scratch)
        if self._judges:
            self._float_stream = embedded(tokens, original, self.scratch)

    def _parts(self):
        """Both streams, batch by batch (the float one None without asymmetric calibration), with the batch's place and
        whether it is held out: every batch's windows are or none is."""
        first = len(self._stream) - self._held_out
        for held_out, start, stop in ((False, 0, first), (True, first, len(self._stream))):
            for windows in self._stream.batches(self.options.batch_size, start, stop):
                whole = None if self._float_stream is None else self._float_stream.read(windows)
                yield windows, self._stream.read(windows), whole, held_out

    def _observe(self, inputs: Callable, float_inputs: Callable | None, width: int, writes: bool,
                 weights: torch.Tensor | None = None) -> list[Moments]:
        """Moments of a stage's inputs over the windows to fit on and, where some are, over those held out; empty
        without calibration. `weights` of the tokens [windows, length]: None for 1."""
        if self._stream is None:
            return []
        gap = writes and self.options.asymmetric == "residual"
        hidden = self.config.hidden_size if gap else None
        sums = [Moments(width, self.device, float_inputs=float_inputs is not None, hidden=hidden)
                for _ in range(2 if self._judges else 1)]
        for windows, part, whole, held_out in self._parts():
            seen = (inputs(part), None if float_inputs is None else float_inputs(whole),
                    (whole - part).to(self.device) if gap else None)
            sums[held_out].add(*seen, None if weights is None else weights[windows].to(self.device))
        return sums if self.world.size == 1 else [one.summed(self.world) for one in sums]

    def _remembered(self, inputs: Callable, width: int) -> Callable:
        """`inputs` that computes each part once, when all of them fit KEEP_BYTES and memory is not short."""
        if self._stream is None or self.scratch or 4 * self.tokens.numel() * width > KEEP_BYTES:
            return inputs
        kept: dict[int, torch.Tensor] = {}

        def once(x):
            key = x.data_ptr()  # parts are views of the stream: the same storage at both visits
            if key not in kept:
                kept[key] = inputs(x)
            return kept[key]

        return once

    @torch.no_grad()
    def _quantize_layer(self, index: int, kept: dict | None = None) -> dict:
        """Quantise a layer, or use its tensors `kept` from an interrupted run, and bring the streams behind it."""
        out = {}
        layer = {k: v.to(self.device) for k, v in self.model.layer(index).items()}
        prefix = f"layers.{index}."
        for name, tensor in layer.items():
            if name.removesuffix(".weight") not in LINEARS:
                with naming(prefix + name):
                    out[prefix + name] = as_float(tensor, "f32")
        original = dict(layer) if self._float_stream is not None else None
        reads = self._stage_inputs(layer)
        aims = None if original is None else self._stage_inputs(original)
        for names in STAGES:
            name, writes = names[0], names[0] in ("o_proj", "down_proj")
            width = layer[f"{name}.weight"].shape[1]
            inputs, float_inputs = reads[name], None if aims is None else aims[name]
            if kept is not None:
                self._use_kept(kept, prefix, layer, names)
            else:
                if writes:  # read again below
                    inputs = self._remembered(inputs, width)
                    float_inputs = None if aims is None else self._remembered(float_inputs, width)
                weights = None if self.guidance is None else self.guidance[index][name]
                moments = self._observe(inputs, float_inputs, width, writes, weights)
                if moments:
                    self._sums |= dict.fromkeys((f"{prefix}{name}.weight" for name in names), input_sums(moments))
                with naming(", ".join(prefix + name for name in names)):
                    if not all(one.finite for one in moments):
                        refuse_overflow(layer, index, self.source)
                    stored = self.matrices.linears(prefix, layer, names, moments)
                out |= {f"{prefix}{name}.weight": tensor for name, tensor in stored.items()}
            if writes and self._stream is not None:
                peak = self._advance(name, inputs, layer, float_inputs, original)
                if not peak < STREAM_LIMIT:
                    with naming(f"output of {prefix}{name}"):
                        refuse_overflow(layer, index, self.source)
                self.reports.get(prefix + name, {})["stream_peak"] = peak
        return out

    def _use_kept(self, kept: dict, prefix: str, layer: dict, names) -> None:
        """Update `layer` as `MatrixQuantizer.linears` does, with the decoded weights of tensors that were kept."""
        for name in names:
            tensor = kept[f"{prefix}{name}.weight"]
            if isinstance(tensor, QuantizedTensor):  # floats are stored in less precision than the streams see
                layer[f"{name}.weight"] = torch.from_numpy(tensor.decode()).to(self.device)

    def _advance(self, name: str, inputs: Callable, layer: dict, float_inputs: Callable | None,
                 original: dict | None) -> float:
        """Add what the linear `name` writes to both residual streams; their largest magnitude then."""
        peak = torch.zeros(())
        for windows, part, whole, _ in self._parts():
            part += forward.linear(inputs(part), layer, name).to(part.device)
            self._stream.write(windows, part)
            peak = torch.maximum(peak, peak_of(part).cpu())
            if whole is not None:
                whole += forward.linear(float_inputs(whole), original, name).to(whole.device)
                self._float_stream.write(windows, whole)
                peak = torch.maximum(peak, peak_of(whole).cpu())
        return self.world.maximum(float(peak))

    def _stage_inputs(self, layer: dict) -> dict[str, Callable]:
        """By the first name of a stage: from a part of the residual stream to what its linears read in `layer`."""
        config, model = self.config, self.model

        def normed(x, norm):
            return forward.rms_norm(x.to(self.device), layer[f"{norm}.weight"], config.rms_norm_eps)

        return {"q_proj": lambda x: normed(x, "attn_norm"),
                "o_proj": lambda x: forward.attention_context(normed(x, "attn_norm"), layer, config, self._rope,
                                                              r3_block=model.r3_block),
                "gate_proj": lambda x: normed(x, "mlp_norm"),
                "down_proj": lambda x: forward.mlp_hidden(normed(x, "mlp_norm"), layer, r4_block=model.r4_block)}

    @torch.no_grad()
    def _quantize_head(self) -> dict:
        """Final norm, head, and what it is tied through. A tied matrix is treated as the head, as which it errs most;
        as an embedding it gains from that too."""
        norm, mix = self.model.final_norm(torch.float32), forward.head_mix(self.model)
        with naming("norm.weight"):
            out = {"norm.weight": as_float(norm, "f32")}
        if mix is not None:
            with naming(HEAD_MIX):
                out[HEAD_MIX] = as_float(mix, self.options.types[HEAD_MIX])
            mix = torch.from_numpy(out[HEAD_MIX]).float().to(self.device)  # as the package has it
        gain, eps = norm.to(self.device), self.config.rms_norm_eps
        moments = self._observe(lambda x: forward.head_input(x.to(self.device), gain, mix, eps), None,
                                self.config.hidden_size, writes=False)
        if not all(one.finite for one in moments):
            with naming("lm_head"):
                refuse_overflow({"norm.weight": norm}, None, self.source)
        name = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        if moments and mix is None:
            self._sums[f"{name}.weight"] = input_sums(moments)
        out[f"{name}.weight"] = self.matrices.plain(name, self.model.chunks(f"{name}.weight"), mean_hessian(moments))
        return out
