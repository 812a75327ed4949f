"""Rotations learned through the whole quantised network: SpinQuant (arXiv 2405.16406), OSTQuant (arXiv 2501.13987).

The float model's weights stay as they are; what is learned decides in which basis activations, and weights where asked,
are rounded (see `rounding`). What the papers leave open, or their code does otherwise, was chosen thus:

* Both start from random Hadamards and round every decoder linear's input per token, asymmetric, to its smallest and
  largest entry; keys and values stay in float, for that is how the comparison is run.
* SpinQuant: Cayley SGD, learning rate 1.5 (30 for 8-bit activations) falling linearly to 0 (in its code along a
  cosine) over 100 steps, one R2 per KV head. After a step R is brought back to the group by Newton-Schulz (its code
  does a QR now and then). Steps of 1,024 tokens, its own are of 16,384; with so few, cross-entropy and gradients that
  pass straight through the rounding of activations alone, as it has them, are mostly noise
  (`benchmarks/e2e_gradients.py`), so loss and gradients are OSTQuant's.
* OSTQuant: KL from the float model over that model's 1,000 likeliest tokens, renormalised among them; gradients through
  the range of what is rounded, as well as straight through the rounding; rotations by Adam in the frame of R
  (RiemannAdam), the logarithms of channel scales by Adam. Step sizes are ours: 0.02 radians, 0.02 of a scale.
* The loss is measured on windows that are not trained on, before and after; where it does not fall the start is kept.

Memory: one layer at a time, or all that fit half the spare memory; the residual stream of a step before every layer,
or, if they fit the other half, all activations, which saves computing them twice; the head; for the KL the float
model's final hidden states (tokens × hidden × 4 bytes).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from optrot_edge.device import widest_float
from optrot_edge.errors import InputError
from optrot_edge.gridspec import fitting_type
from optrot_edge.models import forward
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.streams import native_chunks, picked_rows
from optrot_edge.rotations.baselines import EndToEndOptions
from optrot_edge.rotations.distributed import spare_memory
from optrot_edge.rotations.optrot_plus import start_log_scales
from optrot_edge.rotations.rotation import Rotation, projected, scale_widths
from optrot_edge.rotations.rounding import LayerBasis, Rounding, rounded_inputs, rounded_layer
from optrot_edge.rotations.sampling import batches
from optrot_edge.rotations.solvers import RiemannAdam, cayley_step, nearly_orthogonal

HELD_OUT = 8  # one window in so many only judges
TOP = 1000  # tokens that OSTQuant's KL is over


class QuantizedNetwork:
    """The loss of the quantised network at a point, a Rotation whose tensors may require gradients.

    `source` is the float model, `grid` the body's type, `tokens` int64 [windows, length].
    """

    def __init__(self, source, rounding: Rounding, loss: str, tokens: torch.Tensor, step_tokens: int,
                 device: str = "cpu", dtype=torch.float32):
        self.source, self.config, self.rounding = source, source.config, rounding
        self.tokens, self.device, self.dtype = tokens, device, dtype
        ids, self.places = tokens.unique(return_inverse=True)
        self.table = picked_rows(native_chunks(source), ids)
        head = source.lm_head(dtype)
        self.head = (source.embedding(dtype) if head is None else head).to(device)
        self.norm, mix = source.final_norm(dtype).to(device), forward.head_mix(source, dtype)
        self.mix = None if mix is None else mix.to(device)
        self.rope = forward.rope_tables(self.config, tokens.shape[1], dtype=dtype, device=device)
        self.aims = forward.final_hidden(source, tokens, dtype=dtype, device=device) if loss == "kl-top" else None
        room, size = spare_memory(device) // 2, self.head.element_size()
        self.keeps_layers = room >= size * self.config.num_hidden_layers * sum(
            math.prod(shape) for shape in source.family.layer_shapes(self.config).values())
        q_rows = self.config.num_attention_heads * self.config.head_dim
        self.keeps_activations = room >= size * step_tokens * self.config.num_hidden_layers * (
            10 * self.config.hidden_size + 6 * q_rows + 8 * self.config.intermediate_size)
        self._layers: dict[int, forward.Layer] = {}

    def layer(self, index: int, basis: LayerBasis) -> forward.Layer:
        """The float model's layer, norms folded where the rotation asks for it."""
        if index not in self._layers:
            layer = {k: v.to(self.device) for k, v in self.source.layer(index, self.dtype).items()}
            layer = basis.prepared(layer)
            if not self.keeps_layers:
                return layer
            self._layers[index] = layer
        return self._layers[index]

    def stream(self, windows: torch.Tensor, point: Rotation) -> torch.Tensor:
        """The last layer's output [b, length, hidden], in the float model's basis."""
        x = F.embedding(self.places[windows], self.table).to(self.device, self.dtype)
        grad = torch.is_grad_enabled() and not self.keeps_activations
        r1 = point.r1 if self.rounding.grids else None
        x = x if r1 is None else x @ r1
        for index in range(self.config.num_hidden_layers):
            x = checkpoint(self._run, x, index, point, use_reentrant=False) if grad else self._run(x, index, point)
        return x if r1 is None else x @ r1.T

    def _run(self, x: torch.Tensor, index: int, point: Rotation) -> torch.Tensor:
        basis, r4 = LayerBasis(point, index, self.config), None
        layer = self.layer(index, basis)
        if self.rounding.grids:
            layer, r4 = rounded_layer(layer, point, index, self.config, self.rounding), point.r4_block
        else:
            layer = rounded_inputs(layer, basis, self.rounding)
        return forward.decoder_layer(x, layer, self.config, self.rope, r4_block=r4)

    def loss(self, windows: torch.Tensor, point: Rotation) -> float:
        """Mean loss of `windows` per token, in nats; its gradient is added to the point's tensors that want one."""
        stream = self.stream(windows, point)
        leaf = stream.detach().requires_grad_(stream.requires_grad)
        count = stream.shape[0] * (stream.shape[1] - (self.aims is None))
        total = 0.0
        for place, window in enumerate(windows.tolist()):  # logits of one window at a time
            hidden = forward.head_input(leaf[place], self.norm, self.mix, self.config.rms_norm_eps)
            with torch.no_grad():
                loss, of_logits = self._window_loss(F.linear(hidden, self.head), window, stream.requires_grad)
            total += loss
            if stream.requires_grad:
                hidden.backward(of_logits @ self.head / count)
        if not math.isfinite(total):
            raise InputError("the loss of the quantised model is not finite; the model overflows or is damaged")
        if stream.requires_grad:
            stream.backward(leaf.grad)
        return total / count

    def _window_loss(self, logits: torch.Tensor, window: int, grad: bool):
        """Summed loss of one window's `logits` [length, vocab], and its gradient if wanted."""
        if self.aims is not None:
            return self._kl_top(logits, window, grad)
        labels = self.tokens[window, 1:, None].to(self.device)
        log_p = logits.log_softmax(-1)
        loss = -float(log_p[:-1].gather(1, labels).sum(dtype=widest_float(self.device)))
        if not grad:
            return loss, None
        p = log_p.exp_()
        p[:-1].scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))
        p[-1] = 0  # what follows the last token is not known
        return loss, p

    def _kl_top(self, logits: torch.Tensor, window: int, grad: bool):
        wanted = F.linear(self.aims[window].to(self.device), self.head)
        top, kept = wanted.topk(min(TOP, wanted.shape[-1]), dim=-1)
        wanted, mine = top.log_softmax(-1), logits.gather(-1, kept).log_softmax(-1)
        p = wanted.exp()
        loss = float((p * (wanted - mine)).sum(dtype=widest_float(self.device)))
        return loss, torch.zeros_like(logits).scatter_(-1, kept, mine.exp_() - p) if grad else None


class EndToEndLearner:
    """State of one run; see `learn_end_to_end`."""

    def __init__(self, network: QuantizedNetwork, start: Rotation, options: EndToEndOptions, generator):
        self.network, self.start, self.options, self.generator = network, start, options, generator
        self.rotations = {name: matrix.to(network.device, network.dtype).requires_grad_()
                          for name, matrix in (("r1", start.r1), ("r2", start.r2)) if matrix is not None}
        self.log_scales = {}
        if options.scales:
            names = [name for name in scale_widths(network.config) if not (name == "up" and start.r4_block)]
            found = start_log_scales(network.source, start, names, native=start.r1 is None)
            self.log_scales = {name: value.to(network.device, network.dtype).requires_grad_()
                               for name, value in found.items()}
        self.adams = {name: RiemannAdam(matrix) for name, matrix in self.rotations.items()
                      if options.solver == "adam"}
        self.scale_adam = None
        if self.log_scales:
            self.scale_adam = torch.optim.Adam(self.log_scales.values(), betas=RiemannAdam.BETAS,
                                               eps=RiemannAdam.EPSILON)

    def point(self) -> Rotation:
        """Where the run is."""
        return Rotation("none", self.rotations.get("r1"), self.rotations.get("r2"), None, self.start.r4_block, {},
                        {name: value.exp() for name, value in self.log_scales.items()})

    def step(self, windows: torch.Tensor, progress: float) -> float:
        """One step on `windows`; `progress` in [0, 1) shortens it linearly. Returns the loss before it."""
        for leaf in (*self.rotations.values(), *self.log_scales.values()):
            leaf.grad = None
        loss = self.network.loss(windows, self.point())
        lr = self.options.lr * (1 - progress)
        with torch.no_grad():
            for name, matrix in self.rotations.items():
                if matrix.grad is None:  # nothing is rounded in its basis
                    continue
                if name in self.adams:
                    moved = self.adams[name].step(matrix, matrix.grad, lr)
                else:
                    moved = nearly_orthogonal(cayley_step(matrix, matrix.grad, lr))
                matrix.copy_(moved)
        if self.scale_adam is not None:
            self.scale_adam.param_groups[0]["lr"] = self.options.scale_lr * (1 - progress)
            self.scale_adam.step()
        return loss

    @torch.no_grad()
    def held_out(self, first: int, point: Rotation) -> float:
        """Mean loss of the windows from `first` on."""
        tokens = self.network.tokens
        windows = torch.arange(first, len(tokens))
        parts = windows.split(max(1, self.options.tokens // tokens.shape[1]))
        return sum(len(part) * self.network.loss(part, point) for part in parts) / len(windows)

    def result(self, name: str) -> Rotation:
        """The learned rotation: float64 on the CPU, projected."""
        r1, r2 = (projected(self.rotations[key].detach()) if key in self.rotations else None for key in ("r1", "r2"))
        scales = {key: value.detach().cpu().double().exp() for key, value in self.log_scales.items()}
        return Rotation(name, r1, r2, self.start.r3_block, self.start.r4_block, dict(self.start.recipe), scales)


def as_point(rotation: Rotation, device: str, dtype=torch.float32) -> Rotation:
    """A Rotation in the dtype of the computation."""
    to = lambda t: None if t is None else t.to(device, dtype)  # noqa: E731
    return Rotation(rotation.method, to(rotation.r1), to(rotation.r2), None, rotation.r4_block, {},
                    {name: to(scale) for name, scale in rotation.scales.items()})


def learn_end_to_end(source, name: str, start: Rotation, grid: str, tokens: torch.Tensor, options: EndToEndOptions,
                     generator: torch.Generator, *, device: str = "cpu",
                     progress: Callable[[int, int, float], None] | None = None) -> Rotation:
    """The rotation `name` of `baselines.END_TO_END` for the float model, learned from `start`.

    `grid` is the body's type, `tokens` int64 [windows, length], an eighth of which only judges.
    `progress(step, steps, loss of the step)`. The recipe holds the options, except that `objective` names the loss and
    `tokens` counts those of a step's whole windows, the loss of every step (`loss_curve`), that of the held-out windows
    before and after (`loss_start`, `loss`, nats per token), and whether the learned rotation was `kept` for being the
    better of the two. Raises InputError with fewer than two windows, and when the loss is not finite.
    """
    if len(tokens) < 2:
        raise InputError(f"--rotation {name} learns on windows of text and judges on others; give at least two "
                         "(--nsamples)")
    grids = grids_by_width(source, grid) if options.weights else None
    rounding = Rounding(options.activations, grids, options.through_range)
    network = QuantizedNetwork(source, rounding, options.loss, tokens, options.tokens, device)
    learner = EndToEndLearner(network, start, options, generator)
    first = len(tokens) - max(1, len(tokens) // HELD_OUT)
    before, curve = learner.held_out(first, learner.point()), []
    together = min(first, max(1, options.tokens // tokens.shape[1]))
    drawn = batches(first, together, generator)
    for step in range(options.steps):
        curve.append(learner.step(next(drawn), step / options.steps))
        if progress:
            progress(step + 1, options.steps, curve[-1])
    learned = learner.result(name)
    after = learner.held_out(first, as_point(learned, device))
    kept = after < before
    if not kept:
        learned = Rotation(name, start.r1, start.r2, start.r3_block, start.r4_block, dict(start.recipe), start.scales)
    learned.recipe |= {**vars(options), "objective": options.loss, "tokens": together * tokens.shape[1],
                       "grid": grid if options.weights else None, "calibration_tokens": tokens.numel(),
                       "kept": kept, "loss_start": before, "loss": after, "loss_curve": curve}
    return learned


def grids_by_width(source, kind: str) -> dict[int, Grid]:
    """The grid of `kind` for every width of the decoder's rows; InputError where rows do not divide into groups."""
    grids = {}
    for shape in source.family.layer_shapes(source.config).values():
        if len(shape) == 2 and shape[1] not in grids:
            grids[shape[1]] = Grid(fitting_type(kind, shape[1]))
            grids[shape[1]].check_width(shape[1])
    return grids
