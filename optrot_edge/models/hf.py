"""Reader of Hugging Face folders: memory-mapped safetensors, in one file or in indexed shards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from optrot_edge.errors import InputError
from optrot_edge.models.hf_config import parse_config, read_json
from optrot_edge.models.model_card import MODEL_CARD, hub_id, save_card
from optrot_edge.models.source import ModelSource
from optrot_edge.models.tokenizer_files import MORE_TEMPLATES, TOKENIZER_FILES, copy_tokenizer, tokenizer_files
from optrot_edge.tensor_types import all_shapes

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class HFSource(ModelSource):
    """A folder with config.json and model.safetensors, or shards and their index.

    Raises InputError when opened if anything but the values of the tensors is wrong.
    """

    kind = "hf"

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        data = read_json(self.path / "config.json")
        name = data.get("_name_or_path") or hub_id(self.path)
        self.family, self.config = parse_config(
            data, name if isinstance(name, str) and name else self.path.resolve().name)
        self._shard_of = self._find_shards()
        shapes = self._header_shapes()
        head = self.family.hf_name("lm_head.weight")
        ignored = {name for name in shapes if name.endswith(".rotary_emb.inv_freq")}
        self._spare_head = self.config.tie_word_embeddings and head in shapes
        self._check_tensors(shapes, self.family.hf_name, ignored | {head} if self._spare_head else ignored)
        self.files = [self.path / name for name in ("config.json", _INDEX) if (self.path / name).is_file()]
        self.files += [*tokenizer_files(self.path), *sorted(set(self._shard_of.values()))]

    def lm_head(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Output projection [vocab, hidden]; None when it is the embedding.

        A tied model may store the head too: InputError if that copy differs from the embedding.
        """
        if self._spare_head:
            self._compare_heads(*self._read(["embed_tokens.weight", "lm_head.weight"], dtype))
        return super().lm_head(dtype)

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows of the embedding or the head; InputError as `lm_head` raises it."""
        rows = super().rows(name, start, stop, dtype)
        if name in ("embed_tokens.weight", "lm_head.weight") and self._spare_head:
            self._compare_heads(rows, self._read_rows("lm_head.weight", start, stop, dtype))
        return rows

    def _compare_heads(self, embedding: torch.Tensor, head: torch.Tensor) -> None:
        if not torch.equal(embedding, head):
            raise InputError(f"{self.path}: tie_word_embeddings is true but lm_head.weight differs "
                             "from the embedding; set it to false in config.json")

    def save_tokenizer(self, folder: str | Path) -> list[Path]:
        """Copy the tokenizer files that exist into `folder`, with what the model card says; the files there."""
        folder = Path(folder)
        weights = sum(map(prod, all_shapes(self.family, self.config).values()))
        return copy_tokenizer(self.path, folder) + save_card(self.path, folder, self.config.name, weights)

    def stored_dtype(self, name: str) -> str:
        """The tensor's dtype in the file's header."""
        own = self.family.hf_name(name)
        with _opened(self._shard_of[own]) as handle:
            return handle.get_slice(own).get_dtype()

    def _find_shards(self) -> dict[str, Path]:
        """File of every tensor, by the tensor's own name; checks the index against the disk."""
        single = self.path / _SINGLE
        if _is_file(single):
            with _opened(single) as handle:
                return {name: single for name in handle.keys()}  # noqa: SIM118 (not a dict)
        if not _is_file(self.path / _INDEX):
            raise InputError(f"{self.path}: no {_SINGLE} and no {_INDEX}; "
                             "a model in another format has to be converted to safetensors first")
        weight_map = read_json(self.path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{self.path / _INDEX}: weight_map is missing or empty")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
                raise InputError(f"{self.path / _INDEX}: {shard!r} is not a file name")
            if not _is_file(self.path / shard):
                raise InputError(f"{self.path}: shard {shard} of the index is missing; "
                                 "download the model again")
        shard_of = {name: self.path / shard for name, shard in weight_map.items()}
        self._check_index(shard_of)
        return shard_of

    def _check_index(self, shard_of: dict[str, Path]) -> None:
        for path in sorted(set(shard_of.values())):
            with _opened(path) as handle:
                stored = set(handle.keys())
            listed = {name for name, where in shard_of.items() if where == path}
            if stored != listed:
                name = min(stored ^ listed)
                raise InputError(f"{path}: {_INDEX} and this shard disagree about tensor {name}; "
                                 "the files do not belong together")
        disk = set(self.path.glob("model-*-of-*.safetensors"))
        if strays := disk - set(shard_of.values()):
            raise InputError(f"{self.path}: shard {min(strays).name} is not in {_INDEX}; "
                             "the files do not belong together")

    def _header_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for path in sorted(set(self._shard_of.values())):
            with _opened(path) as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    part = handle.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise InputError(f"{path}: {name} has dtype {part.get_dtype()}; only "
                                         f"{', '.join(_DTYPES)} weights can be read")
                    shapes[name] = tuple(part.get_shape())
        return shapes

    def _read(self, names: list[str], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        # Files are opened anew for each call: a mapping that stays open keeps every page it has
        # touched in the resident size of the process.
        handles: dict[Path, safe_open] = {}
        with ExitStack() as stack:
            for name in names:
                own = self.family.hf_name(name)
                path = self._shard_of[own]
                if path not in handles:
                    handles[path] = stack.enter_context(_opened(path))
                try:
                    tensor = handles[path].get_tensor(own)
                except SafetensorError as error:
                    raise InputError(f"{path}: {own} cannot be read: {error}") from None
                yield tensor.to(dtype, copy=True)  # never hand out the mapping itself

    def _read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        own = self.family.hf_name(name)
        path = self._shard_of[own]
        with _opened(path) as handle:
            try:
                return handle.get_slice(own)[start:stop].to(dtype, copy=True)
            except SafetensorError as error:
                raise InputError(f"{path}: {own} cannot be read: {error}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system, for example
        return False


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from None


def download(model_id: str, revision: str | None = None) -> Path:
    """Folder of a hub model `owner/name`, from the local cache or downloaded; InputError if neither."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_id) or model_id.startswith((".", "-")):
        raise InputError(f"{model_id}: no such file or folder, and not a hub id (owner/name)")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise InputError(f"{model_id} is not on this disk; downloading it needs huggingface_hub "
                         "(pip install 'optrot-edge[learn]')") from None
    failures = (OSError, HFValidationError)  # the hub's own errors are OSErrors
    with suppress(ImportError):
        import httpx  # what newer versions of huggingface_hub speak through

        failures += (httpx.HTTPError,)
    patterns = ["config.json", "model*.safetensors", _INDEX, *TOKENIZER_FILES, MORE_TEMPLATES, MODEL_CARD]
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    except failures as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{model_id} is not on this disk and cannot be downloaded{offline}: "
                         f"{reason[0]}") from None
