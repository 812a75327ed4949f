"""Second moments of what every linear reads, collected once from the float model.

For the two norms the inputs are taken *before* the gain (x / rms(x)), in the model's own basis, so a
change of R1 or of the gains only transforms them: an input `x̂ R1 diag(s)` has the covariance
`diag(s) R1ᵀ H R1 diag(s)`. Nothing has to be collected again.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from optrot_edge.errors import InputError, StorageError
from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models import forward
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.forward import Layer
from optrot_edge.quantize.numerics import naming, refuse_overflow
from optrot_edge.quantize.statistics import MeanProduct
from optrot_edge.quantize.streams import embedded, native_chunks, picked_rows
from optrot_edge.rotations.rotation import Rotation

INPUTS = {"attn": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "mlp": ("gate_proj", "up_proj"),
          "down": ("down_proj",)}
FEW_TOKENS = 20  # per input dimension: fewer over-fit


class Covariances:
    """`E[xxᵀ]` per layer and kind of input, on disk: {"attn", "o", "mlp", "down"} float32 [in, in].

    "attn" and "mlp" are the normed residual before its gain, "o" the attention context and "down" the
    hidden activations of the MLP, all of the unrotated float model. `tokens` is how many were averaged.
    Removed with `close`, or at the end of a `with` block.
    """

    def __init__(self, folder: str | Path, tokens: int, layers: int):
        self.folder, self.tokens, self.layers = Path(folder), tokens, layers

    def layer(self, index: int, device="cpu", dtype=torch.float64) -> dict[str, torch.Tensor]:
        """The layer's covariances."""
        stored = load_file(self.folder / f"{index:05d}.safetensors")
        return {name: tensor.to(device, dtype) for name, tensor in stored.items()}

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Covariances:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_tokens(tokens: int, width: int, warn: bool = True) -> None:
    """InputError below one token per dimension of an input of `width`; a warning below 20, if wanted."""
    if tokens < width:
        raise InputError(f"{tokens} calibration tokens cannot describe inputs of {width} dimensions; "
                         f"at least {width}, better {FEW_TOKENS * width} are needed: raise --nsamples")
    if warn and tokens < FEW_TOKENS * width:
        # stacklevel: whoever called `collect`
        warnings.warn(f"{tokens} calibration tokens are few for inputs of {width} dimensions; "
                      f"{FEW_TOKENS * width} would be better (--nsamples)", stacklevel=3)


def collect(source, tokens: torch.Tensor, *, device: str = "cpu", batch_size: int = 8,
            folder: str | Path | None = None, scratch: Path | None = None,
            progress: Callable[[int, int], None] | None = None) -> Covariances:
    """Run the float model over `tokens` [windows, length] and keep the covariances under a new folder.

    They take `4 (3 hidden² + intermediate²)` bytes per layer (when heads · head_dim = hidden): 30 GiB for
    Llama-3-8B. The new folder is made in `folder`, by default where temporary files go. The residual stream lies in
    the folder `scratch`, if given.
    Raises InputError when there are fewer tokens than residual dimensions or the model overflows, StorageError when the
    disk is full; nothing is left behind then.
    """
    check_tokens(tokens.numel(), source.config.hidden_size)
    try:
        made = Path(tempfile.mkdtemp(prefix=".optrot-covariances-", suffix=".partial", dir=folder))
    except OSError as error:
        raise StorageError(f"cannot make a temporary folder in {folder}: {error.strerror}") from None
    try:
        _collect(source, tokens, device, batch_size, made, scratch, progress)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return Covariances(made, tokens.numel(), source.config.num_hidden_layers)


@torch.no_grad()
def _collect(source, tokens, device, batch_size, folder: Path, scratch, progress) -> None:
    """Write one file per layer into `folder`."""
    config = source.config
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    stream = embedded(tokens, lambda ids: picked_rows(native_chunks(source), ids), scratch)
    for index in range(config.num_hidden_layers):
        layer = {k: v.to(device) for k, v in source.layer(index, torch.float32).items()}
        widths = {name: layer[f"{readers[0]}.weight"].shape[1] for name, readers in INPUTS.items()}
        sums = {name: MeanProduct(width, width, device) for name, width in widths.items()}
        for windows in stream.batches(batch_size):
            stream.write(windows, _observe(stream.read(windows).to(device), layer, config, rope, sums).cpu())
        means = {name: total.mean().float().cpu().contiguous() for name, total in sums.items()}
        for name, mean in means.items():
            if not mean.isfinite().all():
                with naming(", ".join(f"layers.{index}.{reader}" for reader in INPUTS[name])):
                    refuse_overflow(layer, index, source)
        try:
            save_file(means, folder / f"{index:05d}.safetensors")
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write covariances to {folder.parent}: {error}") from None
        if progress:
            progress(index + 1, config.num_hidden_layers)
    stream.close()


def _observe(x: torch.Tensor, layer: Layer, config: ModelConfig, rope, sums: dict[str, MeanProduct]) -> torch.Tensor:
    """One layer on the residual stream `x` [batch, length, hidden]; its four inputs are added to `sums`."""
    ones, eps = torch.ones_like(layer["attn_norm.weight"]), config.rms_norm_eps
    normed = forward.rms_norm(x, ones, eps)
    sums["attn"].add(normed)
    context = forward.attention_context(normed * layer["attn_norm.weight"], layer, config, rope)
    sums["o"].add(context)
    x = x + forward.linear(context, layer, "o_proj")
    normed = forward.rms_norm(x, ones, eps)
    sums["mlp"].add(normed)
    hidden = forward.mlp_hidden(normed * layer["mlp_norm.weight"], layer)
    sums["down"].add(hidden)
    return x + forward.linear(hidden, layer, "down_proj")


def rotate_covariances(stored: dict[str, torch.Tensor], rotation: Rotation, layer_index: int,
                       rotated_layer: Layer, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Covariances of what the linears of the rotated model read, from those of the float model.

    `stored` is `Covariances.layer(layer_index)`; `rotated_layer` is `RotatedModel(...).layer(layer_index)`,
    whose norm gains g are in force after the rotation; `config` is the float model's. Exact:

    * "attn", "mlp": `diag(g) R1ᵀ H R1 diag(g)`;
    * "o": `AᵀHA`, A = blockdiag(R2 of the KV head that each query head shares) · diag("value" scale);
    * "down": `AᵀHA`, A = diag("up" scale) · R4.

    With `Rotation("none")` and the native layer these are the native inputs' (the native gain included).
    Matrices that nothing changes are returned as they are. Same dtype and device as `stored`.
    """
    out = dict(stored)
    for name in ("attn", "mlp"):
        h, gain = stored[name], rotated_layer[f"{name}_norm.weight"]
        if rotation.r1 is not None:
            r1 = rotation.r1.to(h)
            h = r1.T @ h @ r1
        gain = gain.to(h)
        out[name] = gain[:, None] * h * gain
    if rotation.r2 is not None:
        blocks = rotation.r2[layer_index].to(stored["o"]).repeat_interleave(config.query_groups, dim=0)
        out["o"] = both_sides(stored["o"], lambda h: _times_blocks(h, blocks))
    if "value" in rotation.scales:
        per_head = rotation.scales["value"][layer_index].to(stored["o"]).view(config.num_key_value_heads, -1)
        scale = per_head.repeat_interleave(config.query_groups, dim=0).flatten()
        out["o"] = scale[:, None] * out["o"] * scale
    if "up" in rotation.scales:
        scale = rotation.scales["up"][layer_index].to(stored["down"])
        out["down"] = scale[:, None] * stored["down"] * scale
    if rotation.r4_block:
        out["down"] = both_sides(out["down"], lambda h: block_hadamard(h, rotation.r4_block))
    return out


def both_sides(h: torch.Tensor, right: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`AᵀHA` for the matrix A that `right` multiplies by from the right, H symmetric."""
    return right(right(h).T.contiguous())


def _times_blocks(h: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """`h · blockdiag(blocks)`: h [n, heads · head_dim], blocks [heads, head_dim, head_dim]."""
    return torch.einsum("nhi,hij->nhj", h.view(len(h), *blocks.shape[:2]), blocks).reshape(h.shape)
