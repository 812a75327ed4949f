"""An MLX folder by its config.json and the headers of its tensors. Needs safetensors, neither mlx nor torch.

A quantised matrix `X` is three tensors: `X.weight`, uint32 words that hold the codes as one stream of bits; `X.scales`;
and, in MLX's affine mode, `X.biases`, one of each per group of inputs. `quantization` in config.json has group size and
bits, and under a matrix's name those of that one. Where a matrix has no entry, mlx-lm goes by its width, whatever the
general numbers are (`infer_quant_config` in mlx_lm/utils.py, mlx-lm 0.32.2), and so does this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from optrot_edge.errors import InputError
from optrot_edge.models.hf_config import read_json
from optrot_edge.models.optrot_entry import read_entry

_INDEX = "model.safetensors.index.json"
_AFFINE = [(bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
_BYTE_SCALES = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ON_HIDDEN = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BESIDE = ("scales", "biases", "global_scale")  # stored with a quantised weight, and no weights themselves


@dataclass(frozen=True)
class MlxTensor:
    """A matrix or vector: `kind` such as "4-bit g64" or "bfloat16", how many weights, and all bits stored for them."""

    kind: str
    weights: int
    bits: int


def is_mlx(folder: str | Path) -> bool:
    """Whether a folder's config.json describes quantisation in MLX's form, or names MLX as the package's format.

    Raises InputError when config.json cannot be read.
    """
    config = read_json(Path(folder) / "config.json")
    stated, ours = config.get("quantization"), config.get("optrot")
    return ((isinstance(stated, dict) and {"group_size", "bits"} <= stated.keys())
            or (isinstance(ours, dict) and ours.get("format") == "mlx"))


class MlxFolder:
    """What mlx-lm would load from `path`: `config`, and by name `shapes`, `dtypes` and `tensors` (see MlxTensor).

    text_config: `config` with what it has for the language model alone. optrot: what optrot-edge wrote into it.
    written_by_mlx: whether MLX or a packer for it wrote the tensors.

    Raises InputError for a missing or damaged config.json, index or shard, and for a newer optrot-edge's package.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        text = self.config.get("text_config")  # models that see or hear have the language model's numbers there
        self.text_config = self.config | text if isinstance(text, dict) else self.config
        self.optrot = read_entry(self.path, self.config)
        self.files = self._find_files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.written_by_mlx = False
        for file in self.files:
            self._read_header(file)

    def _find_files(self) -> list[Path]:
        files = sorted(self.path.glob("model*.safetensors"))  # what mlx-lm loads
        if not files:
            raise InputError(f"{self.path}: no model*.safetensors; export or download the package again")
        if (self.path / _INDEX).is_file():
            named = read_json(self.path / _INDEX).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
                raise InputError(f"{self.path / _INDEX}: weight_map is missing or damaged")
            if missing := set(named.values()) - {file.name for file in files}:
                raise InputError(f"{self.path}: shard {min(missing)} of the index is missing; export or download the "
                                 "package again")
        return files

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="numpy") as handle:
                self.written_by_mlx |= (handle.metadata() or {}).get("format") == "mlx"
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    part = handle.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is truncated or damaged: {error}") from None

    @property
    def tied_head(self) -> bool:
        """Whether the head is the embedding: no `lm_head` is stored."""
        return not any(re.search(r"(^|\.)lm_head\.weight$", name) for name in self.shapes)

    @property
    def tensors(self) -> dict[str, MlxTensor]:
        """Every matrix and vector by the name of its weights; InputError when scales do not fit a matrix."""
        found = {}
        for name in self.shapes:
            path, _, part = name.rpartition(".")
            quantised = f"{path}.scales" in self.shapes and self.dtypes.get(f"{path}.weight") == "U32"
            if quantised and part == "weight":
                found[name] = self._quantised(path)
            elif not (quantised and part in _BESIDE):
                found[name] = MlxTensor(_FLOATS.get(self.dtypes[name], self.dtypes[name].lower()),
                                        prod(self.shapes[name]), self._bits(name))
        return found

    def _bits(self, name: str) -> int:
        width = re.search(r"\d+", self.dtypes[name])  # F8_E4M3 has 8, BOOL a byte
        return prod(self.shapes[name]) * (int(width[0]) if width else 8)

    def _quantised(self, path: str) -> MlxTensor:
        words, scales = self.shapes[f"{path}.weight"], self.shapes[f"{path}.scales"]
        if words[:-1] != scales[:-1] or not scales or not scales[-1]:
            raise InputError(f"{self.path}: {path} has words {list(words)} and scales {list(scales)}, which do not "
                             "fit; export or download the package again")
        bits, group = self._grid(path, words[-1], scales[-1])
        kind = f"{bits}-bit g{group}"
        if self.dtypes[f"{path}.scales"] == "U8":
            kind = _BYTE_SCALES[bits, group]
        stored = sum(self._bits(f"{path}.{part}") for part in ("weight", *_BESIDE) if f"{path}.{part}" in self.shapes)
        return MlxTensor(kind, prod(scales) * group, stored)

    def _grid(self, path: str, words: int, groups: int) -> tuple[int, int]:
        """Bits and group size: the matrix's entry, else what its width leaves possible, else the general entry."""
        usual = _BYTE_SCALES if self.dtypes[f"{path}.scales"] == "U8" else _AFFINE
        fitting = [(bits, group) for bits, group in usual if 32 * words == bits * groups * group]
        stated = self.config.get("quantization")
        stated = stated if isinstance(stated, dict) else {}
        width = self._width(path.rpartition(".")[2])
        by_width = [{"bits": bits, "group_size": group} for bits, group in fitting if groups * group == width]
        for entry in (stated.get(path), *by_width, stated):
            if isinstance(entry, dict) and (grid := (entry.get("bits"), entry.get("group_size"))) in fitting:
                return grid
        if len(fitting) != 1:
            raise InputError(f"{self.path}: config.json does not say how {path} is quantised, and {words} words and "
                             f"{groups} scales per row fit {len(fitting)} of MLX's types; export the package again")
        return fitting[0]

    def _width(self, matrix: str) -> int | None:
        """Inputs of a dense decoder's matrix, None where config.json does not tell."""
        sizes = {name: size for name, size in self.text_config.items() if isinstance(size, int) and size > 0}
        hidden, heads = sizes.get("hidden_size"), sizes.get("num_attention_heads")
        if matrix == "down_proj":
            return sizes.get("intermediate_size")
        if matrix == "o_proj":
            return hidden and heads and heads * sizes.get("head_dim", hidden // heads)
        return hidden if matrix in _ON_HIDDEN else None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all tensors over their number of weights."""
        tensors = self.tensors.values()
        return sum(tensor.bits for tensor in tensors) / max(1, sum(tensor.weights for tensor in tensors))
