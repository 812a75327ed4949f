"""Hugging Face's tokenizer files for a package, copied from the checkpoint or rebuilt from a GGUF's vocabulary.

A rebuilt tokenizer gives llama.cpp's ids, save for what `hf_vocab` lists, and ends an answer at the tokens that the
GGUF calls eos, eot and eom; llama.cpp ends it at others too that it knows by their text. For models of family qwen2
transformers takes its own Qwen2 pre-tokenizer, and NFC, which llama.cpp leaves out, whatever tokenizer.json says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from optrot_edge.errors import InputError, StorageError
from optrot_edge.exporters.hf_vocab import (
    Vocabulary,
    build_tokenizer,
    read_sentencepiece_vocabulary,
    read_vocabulary,
)
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.tokenizer_files import TOKENIZER_FILES, copy_tokenizer

_NEEDED, _VOCAB, _MODEL = "tokenizer.json", "vocab.gguf", "tokenizer.model"


def write_hf_tokenizer(folder: Path, out: Path, config: ModelConfig) -> list[Path]:
    """Put the tokenizer of a checkpoint into the folder `out`, made if missing; the files written.

    `folder` is the checkpoint's `tokenizer/`. If it holds tokenizer.json, all Hugging Face files in it are copied.
    If it holds vocab.gguf, or else tokenizer.model, these are made from it: tokenizer.json, tokenizer_config.json,
    generation_config.json and the chat templates (chat_template.jinja, and additional_chat_templates/NAME.jinja for
    others); `config` gives the vocabulary's size, the longest text and the family. Raises InputError if there is
    neither, for a vocabulary that does not fit the model, and as `read_vocabulary` and `build_tokenizer` do;
    StorageError if the disk refuses.
    """
    folder, out = Path(folder), Path(out)
    if (folder / _NEEDED).is_file():
        return copy_tokenizer(folder, out)
    source = next((folder / name for name in (_VOCAB, _MODEL) if (folder / name).is_file()), None)
    if source is None:
        found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        raise InputError(f"{folder}: no {_NEEDED} and no {_VOCAB}, only {', '.join(found) or 'no tokenizer at all'}; "
                         "make tokenizer.json in the model's own folder with transformers "
                         "(AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)) and start from it again, or "
                         f"put tokenizer.json into {folder}")
    vocabulary = (read_vocabulary(source) if source.name == _VOCAB
                  else read_sentencepiece_vocabulary(folder, config.vocab_size))
    _check_model(source, vocabulary, config)
    texts = {_NEEDED: build_tokenizer(vocabulary).to_str(pretty=True),
             "tokenizer_config.json": _json(_tokenizer_config(vocabulary, config)),
             "generation_config.json": _json(_generation_config(vocabulary))}
    for name, template in vocabulary.templates.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"{source}: chat template {name!r} cannot be a file's name")
        texts["chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"] = template
    return [_write(out / name, text) for name, text in texts.items()]


def _check_model(path: Path, vocabulary: Vocabulary, config: ModelConfig) -> None:
    if len(vocabulary.tokens) != config.vocab_size:
        raise InputError(f"{path}: {len(vocabulary.tokens)} tokens, but the model has {config.vocab_size} embedding "
                         "rows; the vocabulary belongs to another model")
    if config.family == "qwen2" and vocabulary.pre != "qwen2":
        raise InputError(f"{path}: the model is a qwen2 with a {vocabulary.pre or 'SentencePiece'} tokenizer, but "
                         "transformers gives every qwen2 model Qwen2's own; start from the model's Hugging Face folder")


def _tokenizer_config(vocabulary: Vocabulary, config: ModelConfig) -> dict:
    """tokenizer_config.json; a token is null where there is none, or a loader's default would be added."""
    named = {f"{name}_token": vocabulary.special(name) for name in ("bos", "eos", "pad", "unk")}
    return named | {
        "add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast"}


def _generation_config(vocabulary: Vocabulary) -> dict:
    """generation_config.json: where transformers and mlx-lm look for the tokens that end an answer."""
    ends = list(dict.fromkeys(vocabulary.ids[name] for name in ("eos", "eot", "eom") if name in vocabulary.ids))
    ids = {f"{name}_token_id": vocabulary.ids[name] for name in ("bos", "pad") if vocabulary.special(name)}
    return ids | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def _json(data: dict) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(text.encode())
        return partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error
