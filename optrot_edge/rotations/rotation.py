"""A set of rotations and channel scales: what was learned or drawn, for which model, and how to keep it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from optrot_edge.errors import InputError, StorageError
from optrot_edge.models.config import ModelConfig

ORTHOGONALITY = 1e-12  # largest entry of |RᵀR − I| that a stored rotation may have, in float64


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """Nearest orthogonal matrix (batched, square), by SVD in float64."""
    u, _, vh = torch.linalg.svd(matrix.double())
    return u @ vh


def orthogonality_error(matrix: torch.Tensor) -> float:
    """max |RᵀR − I| of a (batched) square matrix in float64."""
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    return float((matrix.double().mT @ matrix.double() - eye).abs().max())


def projected(matrix: torch.Tensor) -> torch.Tensor:
    """A learned rotation (batched), orthogonal in float64, on the CPU; RuntimeError if it cannot be."""
    out = polar(matrix.cpu())
    if not (error := orthogonality_error(out)) <= ORTHOGONALITY:
        raise RuntimeError(f"a learned rotation is not orthogonal when projected: max |RᵀR - I| = {error:.1e}")
    return out


def scale_widths(config: ModelConfig) -> dict[str, int]:
    """Channels of each kind of scale (see Rotation)."""
    return {"attn_norm": config.hidden_size, "mlp_norm": config.hidden_size,
            "value": config.num_key_value_heads * config.head_dim, "up": config.intermediate_size}


@dataclass
class Rotation:
    """R1 [hidden, hidden], R2 [layers, kv_heads, head_dim, head_dim] (float64 or None), and the
    block sizes of the online Walsh-Hadamard rotations R3 and R4 (None when off).

    `scales` are positive per-channel factors that fuse away like rotations, float64 [layers, n] by name:
    "attn_norm" and "mlp_norm" (n = hidden) are the norm gains kept in the rotated basis,
    `W' = W diag(γ) R1 diag(1/s)`; "value" (n = kv_heads · head_dim) multiplies the rows of v after R2 and
    divides the columns of o; "up" (n = intermediate) multiplies the rows of up and divides down's columns.

    `method` is "none", "hadamard", "optrot" or "optrot+"; `recipe` records how it was made (seed,
    construction, solver, losses).
    """

    method: str
    r1: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    r3_block: int | None = None
    r4_block: int | None = None
    recipe: dict = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def applied(self) -> list[str]:
        """Names of the rotations in force, e.g. ["r1", "r2"]; channel scales are not among them."""
        on = {"r1": self.r1 is not None, "r2": self.r2 is not None,
              "r3": self.r3_block is not None, "r4": self.r4_block is not None}
        return [name for name, present in on.items() if present]

    @property
    def changes(self) -> bool:
        """Whether any weight differs from the original's."""
        return bool(self.applied or self.scales)

    def describe(self) -> dict:
        """JSON-serialisable summary for manifests."""
        return {"rotation": self.method, "applied": self.applied, "r3_block": self.r3_block,
                "r4_block": self.r4_block, "scales": sorted(self.scales), "recipe": self.recipe}

    def validate(self, config: ModelConfig) -> None:
        """Raise InputError unless shapes fit `config`, R1 and R2 are orthogonal in float64, scales positive."""
        expected = {"R1": (self.r1, (config.hidden_size,) * 2),
                    "R2": (self.r2, (config.num_hidden_layers, config.num_key_value_heads,
                                     config.head_dim, config.head_dim))}
        for name, (matrix, shape) in expected.items():
            if matrix is None:
                continue
            if tuple(matrix.shape) != shape:
                raise InputError(f"rotation {name} has shape {tuple(matrix.shape)}, the model needs {shape}; "
                                 "it was made for another model")
            if not (error := orthogonality_error(matrix)) <= ORTHOGONALITY:
                raise InputError(f"rotation {name} is not orthogonal: max |RᵀR - I| = {error:.1e}")
        self._validate_scales(config)
        for name, block, size in (("R3", self.r3_block, config.head_dim),
                                  ("R4", self.r4_block, config.intermediate_size)):
            if block is not None and (block < 2 or block & (block - 1) or size % block):
                raise InputError(f"{name} block {block} must be a power of two that divides {size}")

    def _validate_scales(self, config: ModelConfig) -> None:
        widths = scale_widths(config)
        for name, scale in self.scales.items():
            shape = (config.num_hidden_layers, widths.get(name))
            if tuple(scale.shape) != shape:
                raise InputError(f"channel scales {name!r} have shape {tuple(scale.shape)}, the model needs "
                                 f"{shape}; they were made for another model")
            if not (scale.isfinite() & (scale > 0)).all():
                raise InputError(f"channel scales {name!r} must be positive and finite; learn them again")

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file (through a temporary name)."""
        path = Path(path)
        tensors = {k: v.contiguous() for k, v in (("r1", self.r1), ("r2", self.r2)) if v is not None}
        tensors |= {f"scale.{name}": scale.contiguous() for name, scale in self.scales.items()}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata={"optrot": json.dumps(self.describe())})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write {path}: {error}") from None
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Rotation:
        """Read a file written by `save`; InputError when it is something else."""
        try:
            with safe_open(path, framework="pt") as handle:
                about = json.loads((handle.metadata() or {})["optrot"])
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} is not a saved rotation ({error}); "
                             "make one with `optrot-edge rotate`") from None
        scales = {k.removeprefix("scale."): v for k, v in tensors.items() if k.startswith("scale.")}
        return cls(about["rotation"], tensors.get("r1"), tensors.get("r2"),
                   about["r3_block"], about["r4_block"], about["recipe"], scales)
