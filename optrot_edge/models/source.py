"""What every checkpoint reader offers; the two readers differ only in where a tensor comes from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from optrot_edge.errors import InputError
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family


class ModelSource:
    """A model on disk, read on demand; every tensor returned is a fresh copy.

    `files` are the inputs (for hashing). Readers implement `_read`, which returns tensors by
    canonical name, and call `_check_tensors` once their headers are parsed.
    """

    kind: str
    path: Path
    files: list[Path]
    config: ModelConfig
    family: Family

    def layer(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """The tensors of one decoder layer by canonical name; InputError if damaged."""
        names = self.family.layer_shapes(self.config)
        tensors = self._checked([f"layers.{index}.{name}" for name in names], dtype)
        return dict(zip(names, tensors, strict=True))

    def embedding(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Token embedding [vocab, hidden]."""
        return self._checked(["embed_tokens.weight"], dtype)[0]

    def final_norm(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Gain of the final norm [hidden]."""
        return self._checked(["norm.weight"], dtype)[0]

    def lm_head(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Output projection [vocab, hidden]; None when it is the embedding."""
        if self.config.tie_word_embeddings:
            return None
        return self._checked(["lm_head.weight"], dtype)[0]

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows `start` to `stop` of "embed_tokens.weight" or "lm_head.weight"; of a tied head the embedding's."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "embed_tokens.weight"
        rows = self._read_rows(name, start, stop, dtype)
        self._check_finite(name, rows)
        return rows

    def save_tokenizer(self, folder: str | Path) -> list[Path]:
        """Write what a checkpoint keeps of the tokenizer into `folder`; returns the files."""
        raise NotImplementedError

    def stored_dtype(self, name: str) -> str:
        """How the file stores the tensor of that canonical name, e.g. "F16" or "Q4_0"."""
        raise NotImplementedError

    def _read(self, names: list[str], dtype: torch.dtype) -> Iterable[torch.Tensor]:
        raise NotImplementedError

    def _read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def _checked(self, names: list[str], dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = list(self._read(names, dtype))
        for name, tensor in zip(names, tensors, strict=True):
            self._check_finite(name, tensor)
        return tensors

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        if not torch.isfinite(tensor).all():
            stored = self.stored_dtype(name)
            reason = {"F16": "a conversion overflowed float16, which ends at 65504, or the file is damaged; take "
                             "the original weights, in bfloat16 or float32",
                      "F64": "the file is damaged, or its values do not fit float32"}
            raise InputError(f"{self.path}: {name} holds NaN or infinite values, stored as {stored}: "
                             + reason.get(stored, "the file is damaged; download it again"))

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]], translate,
                       ignored: Iterable[str] = ()) -> None:
        """Compare the file's `shapes` (by its own names) with what the config calls for.

        `translate` maps canonical names to the file's. Stops at the first difference, so that an
        absurd layer count costs nothing.
        """
        expected: set[str] = set(ignored)

        def check(name: str, shape: tuple[int, ...]) -> None:
            own = translate(name)
            if own not in shapes:
                raise InputError(f"{self.path}: tensor {own} is missing; the file is incomplete "
                                 f"or its configuration is wrong{_hint(name)}")
            if shapes[own] != shape:
                raise InputError(f"{self.path}: tensor {own} is {list(shapes[own])} but the "
                                 f"configuration calls for {list(shape)}")
            expected.add(own)

        for name, shape in self.family.outer_shapes(self.config).items():
            check(name, shape)
        layer_shapes = self.family.layer_shapes(self.config)
        for index in range(self.config.num_hidden_layers):
            for name, shape in layer_shapes.items():
                check(f"layers.{index}.{name}", shape)
        if unknown := sorted(shapes.keys() - expected):
            raise InputError(f"{self.path}: {len(unknown)} tensors that a {self.family.model_type} "
                             f"of this configuration does not have, for example {unknown[0]}")


def _hint(name: str) -> str:
    return " (does it tie its embeddings?)" if name == "lm_head.weight" else ""
