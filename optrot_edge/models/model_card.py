"""What a Hugging Face folder says about its model, as the general.* keys that llama.cpp's converter writes of it.

Names, sizes, licence, languages, base models and data sets come from README.md's front matter and the model's name, by
gguf-py's own heuristics (`gguf.Metadata`, which the converter uses); sampling advice from generation_config.json.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import yaml
from gguf import GGUFWriter, Metadata

from optrot_edge.errors import StorageError

MODEL_CARD = "README.md"
SAMPLING = "generation_config.json"
CARD_FILE = "model_card.gguf"
_BAD_CARD = (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError, IndexError,
             struct.error)


def hub_id(folder: Path) -> str | None:
    """owner/name of a folder in the hub's cache, whose own name is a commit; None for any other."""
    found = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\][0-9a-f]+$", str(folder.absolute()))
    return f"{found[1]}/{found[2]}" if found else None


def save_card(source: Path, folder: Path, name: str, weights: int) -> list[Path]:
    """Write `model_card.gguf`, the general.* keys of the model in the folder `source`, into `folder`; a list of it.

    `name` is what its config.json calls it, or its folder's name; `weights` their number, by which sizes in a name are
    told from other numbers. Warns of a model card that cannot be read, and returns [] then. Raises InputError when
    nothing can be written.
    """
    path = folder / CARD_FILE
    partial = path.with_name(path.name + ".partial")
    try:
        metadata = _load(source, hub_id(source) or name, weights)
        writer = GGUFWriter(None, "none")
        writer.kv_data[0].clear()
        metadata.set_gguf_meta_model(writer)
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.flush()
        finally:
            writer.close()
        return [partial.replace(path)]
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from None
    except _BAD_CARD as error:
        partial.unlink(missing_ok=True)
        reason = " ".join(str(error).split())
        warnings.warn(f"the model card in {source} cannot be read ({reason}); licence, languages and the like will not "
                      f"be in a GGUF. Mend the front matter of {MODEL_CARD}, or {SAMPLING}", stacklevel=2)
        return []


def _load(source: Path, name: str, weights: int) -> Metadata:
    """gguf-py's Metadata, which takes what it knows from a folder called like the model."""
    with tempfile.TemporaryDirectory() as root:
        stand_in = Path(root, Path(name).name or "model")
        stand_in.mkdir()
        (stand_in / "config.json").write_text(json.dumps({"_name_or_path": name}), encoding="utf-8")
        if (source / MODEL_CARD).is_file():
            shutil.copyfile(source / MODEL_CARD, stand_in / MODEL_CARD)
        if (source / SAMPLING).is_file():
            advice = json.loads((source / SAMPLING).read_text(encoding="utf-8"))
            advice.setdefault("penalty_repeat", advice.get("repetition_penalty"))  # gguf-py 0.19 knows no other name
            (stand_in / SAMPLING).write_text(json.dumps(advice), encoding="utf-8")
        metadata = Metadata.load(None, stand_in, None, weights)
    metadata.name = metadata.name or name
    return metadata
