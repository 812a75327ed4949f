"""OptRot's objective: Σ ‖vec W̃‖₄⁴ over q, k, v, o, gate, up, down of every layer (arXiv 2512.24124).

Each matrix is written as rows `X` that R1 multiplies from the right, so one closed-form gradient
`4 Xᵀ(XR)^∘3` serves all of them. v and o are kept as blocks per KV head, because R2 mixes their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from optrot_edge.device import widest_float
from optrot_edge.kernels.fourth_power import fourth_power
from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.forward import Layer
from optrot_edge.rotations.fuse import fold_norms

FIXED = ("q_proj", "k_proj", "gate_proj", "up_proj", "down_proj")  # untouched by R2
MATRICES = (*FIXED, "v_proj", "o_proj")
_SLICE = 16384  # rows multiplied at once


@dataclass
class LayerRows:
    """One layer as the objective sees it, norms folded and R4's fused half applied.

    `fixed` [n, hidden]: rows of q, k, gate, up and columns of down, in that order. `values`
    [kv_heads, head_dim, 1 + groups, hidden]: rows of v, then columns of o for each query head that
    shares it. `spans` gives the rows of each matrix of FIXED inside `fixed`.
    """

    fixed: torch.Tensor
    values: torch.Tensor
    spans: dict[str, slice]

    @classmethod
    def of(cls, layer: Layer, config: ModelConfig, *, fold: bool, r4_block: int | None,
           chosen: set[str] | None = None) -> LayerRows:
        """From a plain layer. `fold` when R1 is used; `chosen` (None: all) names the matrices that count:
        the others have no rows here, v and o zero ones."""
        layer = fold_norms(layer) if fold else dict(layer)
        if r4_block:
            layer["down_proj.weight"] = block_hadamard(layer["down_proj.weight"], r4_block)
        parts, spans, start = [], {}, 0
        for name in FIXED:
            weight = layer[f"{name}.weight"]
            rows = weight.T if name == "down_proj" else weight
            if chosen is not None and name not in chosen:
                rows = rows[:0]
            parts.append(rows)
            spans[name] = slice(start, start := start + len(rows))
        kv, dim, groups = config.num_key_value_heads, config.head_dim, config.query_groups
        v = layer["v_proj.weight"].view(kv, 1, dim, -1)
        o = layer["o_proj.weight"].T.reshape(kv, groups, dim, -1)
        if chosen is not None:
            v, o = v * ("v_proj" in chosen), o * ("o_proj" in chosen)
        return cls(torch.cat(parts), torch.cat([v, o], 1).transpose(1, 2).contiguous(), spans)

    @property
    def nbytes(self) -> int:
        """Memory of the rows."""
        return self.fixed.nbytes + self.values.nbytes

    def value_rows(self, r2: torch.Tensor | None) -> torch.Tensor:
        """Rows [kv_heads · head_dim · (1 + groups), hidden] of v and o after `r2` [kv, head_dim, head_dim]."""
        if r2 is None:
            return self.values.flatten(0, 2)
        return (r2.mT.to(self.values) @ self.values.flatten(2)).view(-1, self.values.shape[-1])

    def matrices(self, r2: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The rows of each matrix of MATRICES, R2 applied."""
        heads, dim, shared, hidden = self.values.shape
        rows = self.value_rows(r2).view(heads, dim, shared, hidden)
        return {**{name: self.fixed[span] for name, span in self.spans.items()},
                "v_proj": rows[:, :, 0].reshape(-1, hidden), "o_proj": rows[:, :, 1:].reshape(-1, hidden)}

    @cached_property
    def mass(self) -> torch.Tensor:
        """‖row‖⁴ of the rows of `fixed`, then of those of `value_rows`, ‖row‖² there a mean over its head.

        That mean does not depend on R2, so neither do draws by mass: rounding cannot change them.
        """
        squares = self.values.square().sum(3)
        squares = squares.mean(1, keepdim=True).expand_as(squares).flatten()
        return torch.cat([self.fixed.square().sum(1), squares]).square()

    def gradient(self, r1: torch.Tensor, r2: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of the layer and its gradient [hidden, hidden] with respect to R1, on all rows."""
        loss, gradient = fourth_power(self.fixed, r1)
        other, more = fourth_power(self.value_rows(r2), r1)
        return loss + other, gradient + more


def fourth_powers(rows: torch.Tensor, r1: torch.Tensor | None) -> float:
    """‖X R‖₄⁴ without a gradient; R None is the identity."""
    total = 0.0
    for part in rows.split(_SLICE):
        y = part if r1 is None else part @ r1
        total += float(y.square().square().sum(dtype=widest_float(rows.device)))
    return total


def value_problems(layers: list[LayerRows], r1: torch.Tensor | None) -> torch.Tensor:
    """The R2 problems of `layers`, R1 applied: Z [layers · kv_heads, head_dim, (1 + groups) · hidden],
    each with loss ‖R2ᵀ Z‖₄⁴."""
    values = torch.stack([rows.values for rows in layers])
    if r1 is not None:
        values = values @ r1
    return values.flatten(0, 1).flatten(2)


def value_gradient(z: torch.Tensor, r2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [b] (float64 where the device has it) and gradient [b, h, h] of ‖R2ᵀ Z‖₄⁴, Z [b, h, n], R2 [b, h, h]."""
    y = r2.mT @ z
    cubed = y * y * y
    return (cubed * y).sum((1, 2), dtype=widest_float(z.device)), 4 * (z @ cubed.mT)
