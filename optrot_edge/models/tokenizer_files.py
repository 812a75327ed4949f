"""The files of a Hugging Face tokenizer. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from optrot_edge.errors import InputError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)


def copy_tokenizer(source: Path, folder: Path) -> list[Path]:
    """Copy those of `TOKENIZER_FILES` that `source` holds into `folder`; the copies. Raises InputError."""
    copies = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                partial = folder / f"{name}.partial"
                shutil.copyfile(source / name, partial)
                copies.append(partial.replace(folder / name))
    except OSError as error:
        raise InputError(f"cannot copy the tokenizer to {folder}: {error}") from None
    return copies
