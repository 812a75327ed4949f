r"""How a tokenizer.json cuts text into words, and llama.cpp's names for it.

llama.cpp cuts by a name alone (`tokenizer.ggml.pre`), and a wrong name is wrong silently. So a tokenizer is recognised
by its *definition* (normaliser, pre-tokenizer, `ignore_merges`) and anything that is not in the table is refused.

The expressions are those of the models' own files. llama.cpp reads some of them otherwise, which no key can mend:
`'ſ` (a long s) is no contraction to it, and in "tekken" every letter beyond ASCII is both upper and lower case and no
combining mark a part of a word (docs/gguf.md).
"""

from __future__ import annotations

import json

from optrot_edge.errors import InputError

SPACE = "\u2581"  # SentencePiece's visible space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # what may stand before a word and belong to it

_LLAMA3 = _CONTRACTIONS + _WORD + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORD + r"\p{N}" + _REST
_QWEN35 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES)
_SEED_CODER = _CONTRACTIONS + _WORD + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES
_MINICPM5 = _CONTRACTIONS + _WORD + r"\p{N}+" + _REST
_TEKKEN = f"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_BYTES = ("ByteLevel", False)  # the byte alphabet only
_GPT2 = ("ByteLevel", True)  # GPT-2's regex, then the byte alphabet
_ANY_NFC = ((), (("NFC",),))

# (tokenizer.ggml.pre, pre-tokenizer steps, ignore_merges, normalisers), after llama.cpp's
# llama-vocab.cpp; "smaug-bpe" is its name for Llama-3's regex with the merges always applied.
PRE_TOKENIZERS = (
    ("llama-bpe", (("Split", _LLAMA3), _BYTES), True, ((),)),
    ("smaug-bpe", (("Split", _LLAMA3), _BYTES), False, ((),)),
    ("qwen2", (("Split", _QWEN2), _BYTES), False, _ANY_NFC),
    ("qwen35", (("Split", _QWEN35), _BYTES), False, _ANY_NFC),
    ("tekken", (("Split", _TEKKEN), _BYTES), True, ((),)),
    ("seed-coder", (("Split", _SEED_CODER), _BYTES), False, ((),)),
    ("minicpm5", (("Split", r"\p{N}{1,3}"), ("Split", _MINICPM5), _BYTES), True, ((),)),
    ("smollm", (("Digits", True), _GPT2), False, ((),)),
    ("gpt-2", (_GPT2,), False, ((),)),
)
# Names that llama.cpp reads as one of those above.
ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "midm-2.0": "llama-bpe",
    "pixtral": "llama-bpe", "dbrx": "smaug-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "kormo": "qwen2",
    "stablelm2": "qwen2", "starcoder": "smollm", "refact": "smollm",
    "minerva-7b": "smollm", "exaone": "smollm", "phi-2": "gpt-2", "mellum": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2",
    "a.x-4.0": "gpt-2", "exaone4": "gpt-2", "trillion": "gpt-2",
}
ADD_BOS = ("llama-bpe", "tekken")  # llama.cpp adds a bos token with these where the file does not say


def identify(definition: dict) -> tuple[str, str, bool]:
    """(tokenizer.ggml.model, tokenizer.ggml.pre, add_space_prefix) of a tokenizer.json.

    Raises InputError for a tokenizer that is not in the table.
    """
    model = definition["model"]
    steps = tuple(_step(s) for s in _flatten(definition.get("pre_tokenizer"), "pretokenizers"))
    normalisers = tuple(_step(s) for s in _flatten(definition.get("normalizer"), "normalizers"))
    ignore_merges = bool(model.get("ignore_merges"))
    if (kind := model.get("type", "BPE")) != "BPE":
        raise _unknown(f"a {kind} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(f"a BPE with {key}")
    if model.get("byte_fallback"):
        spaces = {(): None, (("Prepend", SPACE), ("Replace", " ", SPACE)): True,
                  (("Replace", " ", SPACE),): False}.get(normalisers, "unknown")
        if spaces is None and len(steps) == 1 and steps[0][0] == "Metaspace":
            spaces, steps = steps[0][1], ()
        if isinstance(spaces, bool) and not steps and not ignore_merges:
            return "llama", "default", spaces
    else:
        for name, wanted, ignore, allowed in PRE_TOKENIZERS:
            if steps == wanted and ignore == ignore_merges and normalisers in allowed:
                return "gpt2", name, False
    raise _unknown(f"normaliser {_names(normalisers)}, pre-tokenizer {_names(steps)}"
                   + ", ignore_merges" * ignore_merges + ", byte_fallback" * bool(model.get("byte_fallback")))


def _unknown(what: str) -> InputError:
    return InputError(f"no pre-tokenizer of llama.cpp is known to match this tokenizer ({what}); pass --vocab-from "
                      "FILE.gguf to copy the vocabulary of a published GGUF of this model")


def _names(steps: tuple) -> str:
    """The steps in short, for a message."""
    return " + ".join(" ".join(map(str, step))[:80] for step in steps) or "none"


def _flatten(step: dict | None, key: str) -> list[dict]:
    """A step, or the steps of a (nested) Sequence."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in _flatten(part, key)]
    return [step]


def _step(step: dict) -> tuple:
    """What matters of a normaliser or pre-tokenizer step; the whole of it when it is not a known one."""
    kind = step["type"]
    whole = (kind, json.dumps(step, sort_keys=True))
    if kind == "ByteLevel":
        return whole if step.get("add_prefix_space", True) else (kind, step.get("use_regex", True))
    if kind == "Split":  # to keep the matches, or to remove what lies between them
        mode = (step.get("behavior"), bool(step.get("invert")))
        regex = step["pattern"].get("Regex")
        if not regex or mode not in (("Isolated", False), ("Removed", True)):
            return whole
        return kind, regex.replace("\r", r"\r").replace("\n", r"\n")  # some files hold the characters themselves
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Metaspace":
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        plain = step.get("replacement") == SPACE and step.get("split", True) is False
        return (kind, scheme != "never") if plain else whole
    if kind == "Prepend":
        return kind, step["prepend"]
    if kind == "Replace":
        return kind, step["pattern"].get("String"), step["content"]
    return (kind,) if set(step) == {"type"} else whole
