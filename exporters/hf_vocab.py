"""`tokenizer.*` keys of a GGUF → a `tokenizers.Tokenizer` that gives llama.cpp's ids.

What llama.cpp does is read from its llama-vocab.cpp (as in llama-cpp-python 0.3.36). Pre-tokenizers come from
`pre_tokenizers.PRE_TOKENIZERS`; a name that is not there is refused. Control tokens are special tokens; set
`encode_special_tokens` to have them read as plain text, as llama.cpp does unless it is asked to parse them.

Where the ids can differ all the same:
- "tekken": words are cut by Mistral's own expression, of which llama.cpp's is a rough copy beyond ASCII.
- Special tokens that overlap in a text (one ends as another begins): llama.cpp takes the longest, this the leftmost.
- The bos and eos tokens are special here, which transformers insists on, also where the file says "user-defined".
- llama.cpp also makes control tokens of fill-in-the-middle marks that the file calls ordinary.
- A byte that a byte-level vocabulary has no token for (SmolLM2: some control characters) is left out by both; here its
  neighbours may merge then.
- "'\u017f" (a long s) is a contraction to the regexes of Llama-3 and Qwen2, but not in llama.cpp.
- Digits that Unicode has had since version 16 only are none yet in llama.cpp.
Decoding: an unused token is empty in llama.cpp and its text here; an added token made of letters that stand for bytes
in a byte-level vocabulary ("é") is decoded as those bytes; "▁" in an added token shows as a space; llama.cpp closes up
spaces before punctuation for some names (gpt-2, llama-bpe), this never does.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import TokenType

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import Entries, read_entries, write_entries
from optrot_edge.exporters.gguf_vocab import sentencepiece_entries
from optrot_edge.exporters.pre_tokenizers import ADD_BOS, ALIASES, PRE_TOKENIZERS, SPACE
from optrot_edge.exporters.special_tokens import ENDS
from optrot_edge.exporters.spm_merges import merges_of_scores

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

_INSTEAD = "start from the model's Hugging Face folder instead of its GGUF"
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_IDS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # what llama.cpp takes where the file is silent
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokenizer.

    `kind` is "gpt2" or "llama", `pre` a name in PRE_TOKENIZERS ("" for llama); `types` go with `tokens`; `merges` come
    best first; `ids` are those of the tokens called "bos", "eos", "eot", "eom", "unk" and "pad"; `templates` are chat
    templates by name, the main one as "default".
    """

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    space_prefix: bool
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    templates: dict[str, str]

    def special(self, name: str) -> str | None:
        """Text of the token called "bos", "eos", ... or None if there is none or it is an ordinary one."""
        token = self.ids.get(name)
        return self.tokens[token] if token is not None and self.types[token] in _SPECIAL else None


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of the GGUF at `path`.

    Raises InputError, saying what to do, if it is missing, damaged, or of a kind that is not known.
    """
    entries = read_entries(path)
    try:
        vocabulary = _vocabulary(entries)
        _check(vocabulary)
    except InputError as error:
        raise InputError(f"{path}: {error}; {_INSTEAD}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # a key of another type than it should have
        raise InputError(f"{path}: its tokenizer keys are damaged ({error!r}); {_INSTEAD}") from None
    return vocabulary


def read_sentencepiece_vocabulary(folder: Path, vocab_size: int | None = None) -> Vocabulary:
    """The vocabulary of the tokenizer.model in `folder`, padded up to `vocab_size` if that is given.

    Raises InputError as `gguf_vocab.vocabulary` and `read_vocabulary` do.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vocab.gguf"
        write_entries(path, sentencepiece_entries(folder, vocab_size))
        try:
            return read_vocabulary(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), f"{folder}/tokenizer.model")) from None


def _vocabulary(entries: Entries) -> Vocabulary:
    def value(key: str, default=None):
        return entries[key].value if key in entries else default

    kind, pre = _kind(value("tokenizer.ggml.model", b"").decode(), value("tokenizer.ggml.pre", b"").decode())
    if any(name in value("general.name", b"").decode().lower() for name in ("phi-3", "phi3")):
        raise InputError("llama.cpp strips the space after special tokens of models called phi-3, which is not "
                         "supported here")
    tokens = [token.decode() or f"[EMPTY_{i}]" for i, token in enumerate(value("tokenizer.ggml.tokens", ()))]
    types = [TokenType.CONTROL if token in ENDS else TokenType(number) for token, number
             in zip(tokens, value("tokenizer.ggml.token_type", ()), strict=True)]
    ids = {name: value(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    ids = {name: token for name, token in ids.items() if token is not None}
    if any(not 0 <= token < len(tokens) for token in ids.values()):
        raise InputError(f"the special tokens {ids} are not all among the {len(tokens)} tokens")
    if kind == "llama":
        ids = {name: token for name, token in _SENTENCEPIECE_IDS.items() if types[token] in _SPECIAL} | ids
    for name in ("bos", "eos"):
        if name in ids and types[ids[name]] == TokenType.USER_DEFINED:
            types[ids[name]] = TokenType.CONTROL
    if kind == "llama":
        merges = _merges_of_scores(tokens, types, value("tokenizer.ggml.scores", ()))
    else:  # llama.cpp keeps the first of two equal ones
        pairs = [tuple(merge.decode().split(" ", 1)) for merge in value("tokenizer.ggml.merges", ())]
        merges = list(dict.fromkeys(pairs))
    templates = {key.removeprefix(_TEMPLATE)[1:] or "default": entry.value.decode() for key, entry in entries.items()
                 if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")}
    return Vocabulary(
        kind, pre, tokens, types, merges, bool(value("tokenizer.ggml.add_space_prefix", True)), ids,
        bool(value("tokenizer.ggml.add_bos_token", kind == "llama" or pre in ADD_BOS)),
        bool(value("tokenizer.ggml.add_eos_token", False)), templates)


def _kind(model: str, pre: str) -> tuple[str, str]:
    known = [name for name, *_ in PRE_TOKENIZERS]
    if model == "llama":
        return model, ""
    if model != "gpt2":
        raise InputError(f"tokenizer.ggml.model is {model!r}; only 'gpt2' and 'llama' can become Hugging Face files")
    if ALIASES.get(pre, pre) not in known:
        raise InputError(f"tokenizer.ggml.pre is {pre!r}, and how that splits a text is not known here; known are "
                         f"{', '.join([*known, *ALIASES])}")
    return model, ALIASES.get(pre, pre)


def _check(vocabulary: Vocabulary) -> None:
    tokens, known = vocabulary.tokens, set(vocabulary.tokens)
    if len(known) != len(tokens):
        raise InputError("the vocabulary holds a token twice")
    for name, wanted in (("eos", True), ("bos", vocabulary.add_bos)):
        if vocabulary.special(name) is None and (wanted or name in vocabulary.ids):
            found = tokens[vocabulary.ids[name]] if name in vocabulary.ids else None
            raise InputError(f"the {name} token is {found!r}, but it has to be a control token")
    if vocabulary.kind == "gpt2":
        if not vocabulary.merges or any(
                len(pair) != 2 or {*pair, "".join(pair)} - known for pair in vocabulary.merges):
            raise InputError("there are no merges, or some that do not join two of the tokens to another")
    elif missing := {f"<0x{byte:02X}>" for byte in range(256)} - known:
        raise InputError(f"the byte token {min(missing)} is missing")


def _merges_of_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise InputError("a SentencePiece vocabulary needs a finite score for every token")
    return merges_of_scores(tokens, types, scores)


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The vocabulary in Hugging Face's library. Raises InputError without the package `tokenizers`."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    except ImportError:
        raise InputError("a GGUF's vocabulary becomes Hugging Face files through the package tokenizers, which is "
                         'not installed; run: pip install "optrot-edge[mlx]"') from None
    tokenizer = Tokenizer(_model(vocabulary))
    if vocabulary.kind == "gpt2":
        tokenizer.pre_tokenizer, tokenizer.decoder = _pre_tokenizer(vocabulary.pre), decoders.ByteLevel()
    else:  # mlx-lm tells SentencePiece by this very list of decoders
        prefix = vocabulary.space_prefix
        spaces = [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)]
        tokenizer.normalizer = normalizers.Sequence(spaces)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            + [decoders.Strip(" ", 1, 0)] * prefix)
    tokenizer.add_tokens([
        AddedToken(token, special=kind != TokenType.USER_DEFINED, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (*_SPECIAL, TokenType.USER_DEFINED)])
    first = [vocabulary.special("bos")] if vocabulary.add_bos else []
    last = [vocabulary.special("eos")] if vocabulary.add_eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=[*first, "$A", *last, *first, "$B", *last],
        special_tokens=[(token, vocabulary.tokens.index(token)) for token in {*first, *last}])
    return tokenizer


def _model(vocabulary: Vocabulary) -> BPE:
    from tokenizers.models import BPE

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    if vocabulary.kind == "llama":
        return BPE(ids, vocabulary.merges, unk_token=vocabulary.special("unk"), fuse_unk=True, byte_fallback=True)
    ignore_merges = {name: ignore for name, _, ignore, _ in PRE_TOKENIZERS}[vocabulary.pre]
    return BPE(ids, vocabulary.merges, ignore_merges=ignore_merges)


def _pre_tokenizer(pre: str):
    from tokenizers import Regex, pre_tokenizers

    make = {"Split": lambda regex: pre_tokenizers.Split(Regex(regex), "isolated"),
            "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
            "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)}
    steps = {name: steps for name, steps, *_ in PRE_TOKENIZERS}[pre]
    made = [make[kind](argument) for kind, argument in steps]
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
