"""Special token ids, which of them a prompt gets, and chat templates: a Hugging Face folder's → `tokenizer.*` keys.

The rules are those of transformers: a template in a file of its own goes before one in tokenizer_config.json. Where it
has none they are those of llama.cpp's converter: the token that a post-processor puts after every text is eos, whatever
the configuration calls so, and add_bos_token and add_eos_token go before the post-processor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gguf import GGUFValueType

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import Entries, array, boolean, string, u32

# llama.cpp ends an answer at these whatever the file says; the first ones it also takes for eot.
TURN_ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>"))
ENDS = TURN_ENDS | {
    "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<|eom_id|>", "[EOS]", "<eos>", "<turn|>",
    "<|tool_response>", "[e~["}
_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "sep": "seperator", "pad": "padding",
         "mask": "mask"}
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


def special_entries(folder: Path, tokens: list[str], post_processor: dict | None, *, add_bos: bool = False,
                    fallback: dict[str, list[int]] | None = None) -> Entries:
    """The keys for the tokenizer in `folder`, whose tokens are `tokens`, by id.

    `post_processor` is tokenizer.json's; `add_bos` is what holds where neither it nor tokenizer_config.json say;
    `fallback` holds ids of config.json ("bos", "eos", "pad"), the first of several counting. Every token at which
    generation_config.json (or else `fallback`) ends an answer becomes an end in llama.cpp. Raises InputError for what
    GGUF has no room for and for a tokenizer without an end.
    """
    config = read_json(folder / "tokenizer_config.json")
    fallback = fallback or {}
    ends = read_json(folder / "generation_config.json").get("eos_token_id", fallback.get("eos", []))
    ends = ends if isinstance(ends, list) else [ends]
    ids = {name: found[0] for name, found in fallback.items() if found} | _named(folder, config, tokens)
    first, last = _around(post_processor)
    if first:
        ids.setdefault("bos", _id(tokens, first))
    if first and tokens[ids["bos"]] != first:
        raise InputError(f"{first!r} is put before every text, but the bos token is {tokens[ids['bos']]!r}; GGUF can "
                         "only add bos")
    if last and ids.get("eos") != (token := _id(tokens, last)):
        ids |= {"eos": token} | ({"eot": ids["eos"]} if "eos" in ids else {})
    if "eos" not in ids and ends:
        ids["eos"] = ends[0]
    if "eos" not in ids:  # llama.cpp would stop at token 11
        raise InputError("no end-of-sequence token named in tokenizer_config.json; add eos_token or pass --vocab-from "
                         "FILE.gguf")
    if wrong := [token for token in (*ids.values(), *ends) if not 0 <= token < len(tokens)]:
        raise InputError(f"special token id {wrong[0]} is beyond the {len(tokens)} tokens")
    ids |= _more_ends(ids, ends, tokens)
    entries: Entries = {f"tokenizer.ggml.{key}_token_id": u32(ids[name]) for name, key in _KEYS.items() if name in ids}
    for name, added in (("bos", bool(first) or (add_bos and post_processor is None)), ("eos", bool(last))):
        wanted = config.get(f"add_{name}_token")
        added = wanted if isinstance(wanted, bool) else added
        if added and name not in ids:
            raise InputError(f"a {name} token is to be added, but none is named in tokenizer_config.json")
        entries[f"tokenizer.ggml.add_{name}_token"] = boolean(added)
    return entries | _template_entries(folder, config)


def read_json(path: Path) -> dict:
    """The object in the file, empty if there is no file. Raises InputError or ValueError."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise InputError(f"{path.name} is not an object")
    return data


def _named(folder: Path, config: dict, tokens: list[str]) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json names, or else special_tokens_map.json."""
    known, ids = {text: i for i, text in enumerate(tokens)}, {}
    named = read_json(folder / "special_tokens_map.json") | {key: value for key, value in config.items() if value}
    for name in _KEYS:
        token = named.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in known:
            ids[name] = known[text]
        elif text and name in ("bos", "eos"):
            raise InputError(f"the {name} token {text!r} is not in the vocabulary")
    return ids


def _id(tokens: list[str], text: str) -> int:
    if text not in tokens:
        raise InputError(f"the post-processor adds {text!r}, which is not in the vocabulary")
    return tokens.index(text)


def _around(post_processor: dict | None) -> tuple[str | None, str | None]:
    """The special tokens put before and after every text, by a tokenizer.json's post-processor."""
    parts = (post_processor or {}).get("processors") or [post_processor or {"type": "ByteLevel"}]
    parts = [part for part in parts if part["type"] != "ByteLevel"]
    if not parts:
        return None, None
    steps = parts[0].get("single") or []
    texts = [step["SpecialToken"]["id"] if "SpecialToken" in step else None for step in steps]
    if len(parts) > 1 or parts[0]["type"] != "TemplateProcessing" or texts.count(None) != 1 or len(texts) > 3 \
            or texts.index(None) > 1 or len(texts) - texts.index(None) > 2:
        raise InputError("its post-processor does more than putting one token before and one after a text, which GGUF "
                         "has no keys for; pass --vocab-from FILE.gguf if a published vocabulary is to be used")
    text = texts.index(None)
    return texts[0] if text else None, texts[-1] if text < len(texts) - 1 else None


def _more_ends(ids: dict[str, int], ends: list[int], tokens: list[str]) -> dict[str, int]:
    """"eot" and "eom" for ends of an answer that llama.cpp would not know otherwise."""
    known = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    missing = [token for token in dict.fromkeys(ends) if token not in known and tokens[token] not in ENDS]
    free = [name for name in ("eot", "eom") if name not in ids]
    if not TURN_ENDS.isdisjoint(tokens):  # llama.cpp has found eot by itself
        free.reverse()
    if len(missing) > len(free):
        texts = ", ".join(repr(tokens[token]) for token in missing)
        raise InputError(f"an answer ends at {texts} besides eos, and GGUF has room for {len(free)} more; shorten "
                         "eos_token_id in generation_config.json")
    return dict(zip(free, missing, strict=False))


def _template_entries(folder: Path, config: dict) -> Entries:
    """Chat templates: the main one, and others by name."""
    files = {path.stem: path for path in sorted(folder.glob(f"{_MORE_TEMPLATES}/*.jinja"))}
    if (folder / _TEMPLATE).is_file():
        files["default"] = folder / _TEMPLATE
    templates = {name: path.read_text(encoding="utf-8") for name, path in files.items()} \
        or config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if isinstance(templates, list):
        templates = {template["name"]: template["template"] for template in templates}
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise InputError("chat_template is neither a template nor several by name")
    entries, others = {}, []
    for name, text in templates.items():
        if name == "default":
            entries["tokenizer.chat_template"] = string(text)
            continue
        others.append(re.sub("[^A-Za-z0-9]", "_", name))
        entries[f"tokenizer.chat_template.{others[-1]}"] = string(text)
    if len(set(others)) != len(others):
        raise InputError(f"chat templates {', '.join(map(repr, templates))}: two names are one in GGUF")
    return entries | ({"tokenizer.chat_templates": array(others, GGUFValueType.STRING)} if others else {})
