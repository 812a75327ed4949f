"""Final distillation: what stays continuous after quantisation learns from the float model.

The codes are fixed. Scales, mins, norm gains and biases (see `free_scales`) are trained by Adam on
KL(float ‖ quantised) of windows that were not calibrated on, through the checkpoint's own embedding and head, which
stay as they are. (GPTQ fits its own windows so closely that they teach nothing more.) Weights always have the values
that would be stored. After every epoch KL is measured on windows that are not trained on either; the best state is
kept, and nothing when KL does not fall.

Memory: one decoder layer with its gradients and the activations of one batch in it, the residual stream of that batch
before every layer, the float model's final hidden states (tokens × hidden × 4 bytes), three float32 for every stored
scale, and both heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from optrot_edge.checkpoint import CheckpointWriter, QuantizedCheckpoint
from optrot_edge.device import widest_float
from optrot_edge.errors import InputError
from optrot_edge.models import forward
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import HEAD_MIX
from optrot_edge.quantize.free_scales import FreeTensor, Moves

HELD_OUT = 8  # one window in so many only judges
BETAS, EPSILON = (0.9, 0.95), 1e-16  # gradients below 1e-22 have no square in float32
NORM = "norm.weight"
NOTE = "distilled"  # the journal's, and the name of the folder that the new shards are made in


@dataclass
class DistillOptions:
    """`epochs` over the windows; `learning_rate` in θ, see `free_scales`, falling to 0 along a cosine; `batch_size` in
    windows."""

    epochs: int = 2
    learning_rate: float = 3e-4
    batch_size: int = 4
    seed: int = 0
    device: str = "cpu"


def distill(source, writer: CheckpointWriter, manifest: dict, tokens: torch.Tensor, held_out: int,
            options: DistillOptions, progress: Callable[[int, int, float], None] | None = None) -> dict:
    """Train what is continuous in the checkpoint that `writer` holds, all but finished, with `manifest`.

    `source` is the float model, rotated or not. The last `held_out` of `tokens` [windows, length] only judge.
    `progress(step, steps, KL of the batch)`. Returns the manifest's entry: `kl_before`, `kl_after` (held-out mean in
    nats, at stored precision), `kept`, `kl_epochs`. The shards of `writer.work` are replaced file by file, each valid
    with all others before and after. InputError when no window is left to train on.
    """
    if not 0 < held_out < len(tokens):
        raise InputError(f"distillation of {len(tokens)} windows, {held_out} of them held out, leaves none to train on")
    checkpoint = QuantizedCheckpoint.unfinished(writer, manifest)
    run = _Distillation(source, Student(checkpoint, options.device), tokens, held_out, options)
    with CheckpointWriter(writer.work / NOTE) as better:
        report = run.train(better, progress or (lambda *_: None))
        if report["kept"]:
            writer.adopt(better.work, NOTE, report)
    return report


class Student:
    """A quantised checkpoint under moves: `moves` and Adam's two moments, by tensor and part. `forward` can run it."""

    def __init__(self, checkpoint: QuantizedCheckpoint, device: str = "cpu"):
        self.checkpoint, self.device = checkpoint, device
        self.config = ModelConfig.from_dict(checkpoint.manifest["model"])
        self.online = {name: checkpoint.manifest["rotation"].get(name) for name in ("r3_block", "r4_block")}
        self.r3_block, self.r4_block = self.online.values()
        self.moves: dict[str, Moves] = {}
        self.moments: dict[str, tuple[Moves, Moves]] = {}

    def tensor(self, name: str) -> FreeTensor:
        """The stored tensor, not moved; its moves are there from now on."""
        tensor = FreeTensor(name, self.checkpoint.get(name), self.device)
        if name not in self.moves:
            self.moves[name] = tensor.no_moves()
        return tensor

    def names_of(self, index: int) -> list[str]:
        """Full names of a layer's tensors."""
        return [name for name in self.checkpoint.names if name.startswith(f"layers.{index}.")]

    def layer(self, index: int, dtype=torch.float32) -> forward.Layer:
        """Decoder layer `index` after its moves."""
        prefix = f"layers.{index}."
        return {name.removeprefix(prefix): self.tensor(name).weights(self.moves[name]).to(dtype)
                for name in self.names_of(index)}

    def embedding(self, dtype=torch.float32) -> torch.Tensor:
        """Token embedding [vocab, hidden], on the CPU."""
        return torch.from_numpy(self.checkpoint.weights("embed_tokens.weight")).to(dtype)

    def lm_head(self, dtype=torch.float32) -> torch.Tensor | None:
        """Output head [vocab, hidden] on the CPU, None when tied."""
        if "lm_head.weight" not in self.checkpoint:
            return None
        return torch.from_numpy(self.checkpoint.weights("lm_head.weight")).to(dtype)

    def final_norm(self, dtype=torch.float32) -> torch.Tensor:
        """Gain of the last norm [hidden] after its moves, on the CPU."""
        return self.tensor(NORM).weights(self.moves[NORM]).to("cpu", dtype)

    def head_mix(self, dtype=torch.float32) -> torch.Tensor | None:
        """What the head is tied through [hidden, hidden] on the CPU, or None; it stays as it is."""
        return torch.from_numpy(self.checkpoint.weights(HEAD_MIX)).to(dtype) if self.config.head_mix else None

    def update(self, name: str, gradient: Moves, step: int, rate: float) -> None:
        """One step of Adam (arXiv 1412.6980), the `step`-th from 1."""
        if name not in self.moments:
            self.moments[name] = tuple({part: torch.zeros_like(g) for part, g in gradient.items()} for _ in range(2))
        means, squares = self.moments[name]
        for part, g in gradient.items():
            mean = means[part].lerp_(g, 1 - BETAS[0])
            square = squares[part].lerp_(g.square(), 1 - BETAS[1])
            size = (square / (1 - BETAS[1]**step)).sqrt_().add_(EPSILON)
            self.moves[name][part] -= rate / (1 - BETAS[0]**step) * mean / size

    def write(self, writer: CheckpointWriter) -> None:
        """All shards that hold something free, after the moves."""
        entries = self.checkpoint.manifest["tensors"]
        for file, names in groupby(sorted(entries, key=lambda name: entries[name]["file"]),
                                   key=lambda name: entries[name]["file"]):
            names = list(names)
            if any(self.moves.get(name) for name in names):
                writer.write_shard(file.removesuffix(".safetensors"), {name: self._stored(name) for name in names})

    def _stored(self, name: str):
        moves = self.moves.get(name)
        return self.tensor(name).stored(moves) if moves else self.checkpoint.get(name)


class _Distillation:
    """One run: the float model's final hidden states, the windows, and the training loop."""

    def __init__(self, source, student: Student, tokens: torch.Tensor, held_out: int, options: DistillOptions,
                 dtype=torch.float32):
        self.student, self.options, self.dtype, self.device = student, options, dtype, options.device
        self.config, self.tokens, self.trained = student.config, tokens, len(tokens) - held_out
        self.embedding = student.embedding(dtype)
        self.head, self.teacher_head = (self._head_of(model) for model in (student, source))
        self.aims = forward.final_hidden(source, tokens, dtype=dtype, device=self.device).cpu()
        self.rope = forward.rope_tables(self.config, tokens.shape[1], dtype=dtype, device=self.device)

    def _head_of(self, model) -> torch.Tensor:
        head = model.lm_head(self.dtype)
        return (model.embedding(self.dtype) if head is None else head).to(self.device)

    def train(self, better: CheckpointWriter, progress: Callable) -> dict:
        """Train, writing the shards of the best epoch into `better`; returns the report of `distill`."""
        generator = torch.Generator().manual_seed(self.options.seed)
        batches = -(-self.trained // self.options.batch_size)
        total, step = self.options.epochs * batches, 0
        before = best = float(self.held_out_kl().mean())
        found = []
        for _ in range(self.options.epochs):
            for windows in torch.randperm(self.trained, generator=generator).split(self.options.batch_size):
                rate = self.options.learning_rate * (1 + math.cos(math.pi * step / total)) / 2
                step += 1
                kl = self._step(windows, step, rate)
                progress(step, total, kl)
            found.append(float(self.held_out_kl().mean()))
            if found[-1] < best:
                best = found[-1]
                self.student.write(better)
        finite = lambda kl: kl if math.isfinite(kl) else None  # noqa: E731 - JSON has no NaN
        return {"kl_before": finite(before), "kl_after": finite(best), "kept": best < before,
                "kl_epochs": [finite(kl) for kl in found],
                "windows": self.trained, "held_out": len(self.tokens) - self.trained,
                "epochs": self.options.epochs, "learning_rate": self.options.learning_rate,
                "batch_size": self.options.batch_size}

    @torch.no_grad()
    def held_out_kl(self) -> torch.Tensor:
        """Mean KL in nats of every window [held_out] that is not trained on, float64."""
        hidden = forward.final_hidden(self.student, self.tokens[self.trained:], dtype=self.dtype, device=self.device)
        pairs = zip(hidden, self.aims[self.trained:], strict=True)
        return torch.tensor([self._compare(mine.to(self.device), aim)[0] for mine, aim in pairs],
                            dtype=torch.float64) / hidden.shape[1]

    def _compare(self, hidden: torch.Tensor, aim: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Summed KL of one window [length, hidden], and d KL / d logits."""
        mine = F.linear(hidden, self.head).log_softmax(-1)
        wanted = F.linear(aim.to(self.device), self.teacher_head).log_softmax(-1)
        p = wanted.exp()
        return float((p * (wanted - mine)).sum(dtype=widest_float(p.device))), mine.exp_().sub_(p)

    def _step(self, windows: torch.Tensor, step: int, rate: float) -> float:
        gradients = self.gradients(windows)
        kl = next(gradients)
        for name, gradient in gradients:
            self.student.update(name, gradient, step, rate)
        return kl

    def gradients(self, windows: torch.Tensor) -> Iterator:
        """First the mean KL of these windows, then (name, d KL / dθ) of every tensor that has something free, from the
        last to the first. A layer may be moved once its gradients are out."""
        streams, config = [F.embedding(self.tokens[windows], self.embedding)], self.config
        streams[0] = streams[0].to(self.device)
        for index in range(config.num_hidden_layers):
            layer = self.student.layer(index, self.dtype)
            with torch.no_grad():
                streams.append(forward.decoder_layer(streams[-1], layer, config, self.rope, **self.student.online))
        kl, gradient, of_norm = self._head_gradient(streams.pop(), windows)
        yield kl
        norm = self.student.tensor(NORM)
        if self.student.moves[NORM]:
            yield NORM, norm.gradient(of_norm)
        for index in reversed(range(config.num_hidden_layers)):
            gradient, found = self._layer_gradients(index, streams.pop(), gradient)
            yield from found

    def _head_gradient(self, stream: torch.Tensor, windows: torch.Tensor):
        """Mean KL, and its gradients with respect to the last layer's output and the final norm's gain."""
        count, total, out = stream[..., 0].numel(), 0.0, torch.empty_like(stream)
        gain = self.student.final_norm(self.dtype).to(self.device).requires_grad_()
        mix = self.student.head_mix(self.dtype)
        mix = None if mix is None else mix.to(self.device)
        for place, window in enumerate(windows.tolist()):  # logits of one window at a time
            x = stream[place].requires_grad_()
            hidden = forward.head_input(x, gain, mix, self.config.rms_norm_eps)
            kl, of_logits = self._compare(hidden.detach(), self.aims[window])
            total += kl
            out[place], of_gain = torch.autograd.grad(hidden, (x, gain), of_logits @ self.head / count)
            gain.grad = of_gain if gain.grad is None else gain.grad + of_gain
        return total / count, out, gain.grad

    def _layer_gradients(self, index: int, stream: torch.Tensor, gradient: torch.Tensor):
        """Gradients of the layer's input, and the list of (name, d KL / dθ)."""
        prefix, layer = f"layers.{index}.", {}
        tensors = {name: self.student.tensor(name) for name in self.student.names_of(index)}
        for name, tensor in tensors.items():
            moves = self.student.moves[name]
            layer[name] = tensor.weights(moves).to(self.dtype).requires_grad_(bool(moves))
        x = stream.requires_grad_()
        y = forward.decoder_layer(x, {name.removeprefix(prefix): weight for name, weight in layer.items()},
                                  self.config, self.rope, **self.student.online)
        y.backward(gradient)
        return x.grad, [(name, tensor.gradient(layer[name].grad)) for name, tensor in tensors.items()
                        if self.student.moves[name]]
