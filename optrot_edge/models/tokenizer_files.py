"""The files of a Hugging Face tokenizer. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from optrot_edge.errors import StorageError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)


MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # those beside the default one, by transformers' own names


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in `folder`."""
    return [path for path in (*(folder / name for name in TOKENIZER_FILES), *sorted(folder.glob(MORE_TEMPLATES)))
            if path.is_file()]


def copy_tokenizer(source: Path, folder: Path) -> list[Path]:
    """Copy the tokenizer in `source` into `folder`; the copies. Raises StorageError."""
    copies = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in tokenizer_files(source):
            out = folder / path.relative_to(source)
            out.parent.mkdir(exist_ok=True)
            partial = out.with_name(f"{out.name}.partial")
            shutil.copyfile(path, partial)
            copies.append(partial.replace(out))
    except OSError as error:
        raise StorageError(f"cannot copy the tokenizer to {folder}: {error}") from None
    return copies
