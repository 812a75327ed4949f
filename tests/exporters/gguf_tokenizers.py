"""Tiny tokenizers of every kind the exporter knows, and a corpus that tells them apart."""

from __future__ import annotations

import json
import pydoc_data.topics
import unicodedata
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.tiny_models import TOKENIZER_KINDS, VOCAB_SIZE, save_tiny_tokenizer

TEXTS = [
    "Hello, world! It's what they'd've WANTED; I'LL say 'tis so, don't you?",
    "1 12 123 1234 12345678 3.14159 1,000,000 2026-11-21 ½ ² Ⅷ ٣٤٥ १२३",
    "  two leading,   three inside, trailing   ", " a", "a ", "\t\ttabs\tand \t mixed \n \n\n x",
    "line\r\nbreak\r\n\r\n  indented\r\rold mac\n", "\n", " ", "    ", "\u00a0no-break\u2003em\u3000wide",
    "naïve café Ångström ẞ İstanbul ﬁ ligature", "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย ខ្មែរ",
    "我想在苹果工作1314151天～ 日本語のテスト。한국어 텍스트",
    "😀👍🏽 👨‍👩‍👧‍👦 🇩🇪 ✅🚀🌫️ ☕️", "\u200bzero\u200dwidth\ufeff",
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # 100%\n\n\nclass A(B):\n\tpass\n",
    "<div class=\"a\">&nbsp;</div> http://example.org/?q=a+b#c $x_1 = @y; ~/.bashrc \\n ......!!!!??",
    "snake_case camelCase ALLCAPS x2y 9lives ''quoted'' ``ticks`` — – … •", "aaaaaaaaaaaaaaaaaaaa     bbbb",
    "columns  1   22    333     4444  1   22    333     4444",
    "", "\x00\x01\x7f control", "Zalgo̴͝ c\u0323\u0307", "㍿ ℡ 𝕏 𐍈 \U0001f9ff",
    *list(pydoc_data.topics.topics.values())[:3],
]
LARGE = 1600
_ENDINGS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
# Expressions of Mistral-Nemo, Qwen3.5, Seed-Coder and MiniCPM5, one after another.
_SPLITS = {
    "tekken": [_CASED % ("*", "+") + "|" + _CASED % ("+", "*") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _ENDINGS],
    "qwen35": [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
               + _ENDINGS],
    "seed-coder": ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+"
                   "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"],
    "minicpm5": [r"\p{N}{1,3}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _ENDINGS],
}
BYTE_LEVEL = [*TOKENIZER_KINDS, "smaug-bpe", *_SPLITS]
NORMALISES = ("qwen2", "qwen35")  # NFC, which llama.cpp leaves out
CASED = ("tekken",)  # expressions that ask for upper and lower case, which llama.cpp knows of ASCII only
ADDS_BOS = ("llama-bpe", "smaug-bpe", "tekken")


def make_byte_level(folder: Path, kind: str, vocab_size: int = VOCAB_SIZE) -> Path:
    """A tiny tokenizer; "smaug-bpe" is Llama-3's without ignore_merges."""
    base = {"smaug-bpe": "llama-bpe", "tekken": "llama-bpe", "qwen35": "qwen2"}
    save_tiny_tokenizer(folder, base.get(kind, kind if kind in TOKENIZER_KINDS else "smollm"), vocab_size)
    if kind not in TOKENIZER_KINDS:
        edit(folder / "tokenizer.json", lambda data: data["model"].update(ignore_merges=kind in ("tekken", "minicpm5")))
    if kind in _SPLITS:
        steps = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
                 for regex in _SPLITS[kind]]
        steps += [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
        edit(folder / "tokenizer.json",
             lambda data: data.update(pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
    return folder


def join_across_words(folder: Path) -> None:
    """Give the tokenizer merges that cross every boundary, learned from `TEXTS` taken whole.

    With these any other way of splitting words gives other ids; and one word is a token that no
    merge makes, which `ignore_merges` finds.
    """
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    specials = [token["content"] for token in definition["added_tokens"]]
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.train_from_iterator(TEXTS[:-3], trainers.BpeTrainer(
        vocab_size=LARGE - 1, special_tokens=specials, show_progress=False, min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    learned = json.loads(whole.to_str())
    vocab, word = learned["model"]["vocab"], "Ġleading"
    vocab.setdefault(word, len(vocab))
    merges = [merge for merge in learned["model"]["merges"] if "".join(merge) != word]
    definition["model"] |= {"vocab": vocab, "merges": merges}
    definition["added_tokens"] = learned["added_tokens"]
    bos = definition["post_processor"] and definition["post_processor"].get("processors")
    for special in bos[1]["special_tokens"].values() if bos else ():
        special["ids"] = [whole.token_to_id(token) for token in special["tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")


def comparable(kind: str, text: str) -> str:
    """The text without what llama.cpp's pre-tokenizer of that name is known to read otherwise; in NFC if the tokenizer
    normalises.
    """
    if kind in CASED:
        return "".join(c for c in text if not unicodedata.category(c).startswith("M")
                       and (c.isascii() or unicodedata.category(c) not in ("Lu", "Ll", "Lt")))
    return unicodedata.normalize("NFC", text) if kind in NORMALISES else text


def join_all_bytes(folder: Path) -> int:
    """Give the tokenizer a merge for every two bytes, so that almost any other way of cutting a text into words gives
    other ids, whatever the text; the size of the vocabulary.
    """
    def change(data: dict) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [[left, right] for left in alphabet for right in alphabet]
        specials = data["added_tokens"]
        texts = [*alphabet, *map("".join, merges), *(token["content"] for token in specials)]
        data["model"] |= {"vocab": {text: i for i, text in enumerate(texts)}, "merges": merges}
        for token in specials:
            token["id"] = texts.index(token["content"])
        data["post_processor"] = None

    edit(folder / "tokenizer.json", change)
    return 256 + 256 ** 2 + len(json.loads((folder / "tokenizer.json").read_text())["added_tokens"])


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def make_sentencepiece(folder: Path, style: str = "llama-2", vocab_size: int = 480) -> Path:
    """A tiny byte-fallback BPE as made from a SentencePiece model: all splits of a token are merges."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    alphabet = sorted({c for text in list(pydoc_data.topics.topics.values())[:60] for c in text if c > " "})
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False,
                                  initial_alphabet=alphabet, limit_alphabet=len(alphabet) + 1)
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:60], trainer)
    definition = json.loads(tokenizer.to_str())
    pieces = sorted(definition["model"]["vocab"], key=definition["model"]["vocab"].get)[len(specials):]
    splits = [[text[:cut], text[cut:]] for text in pieces for cut in range(1, len(text))]
    definition["model"]["merges"] = [split for split in splits if set(split) <= set(pieces)]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    if style == "llama-2":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([tokenizers.AddedToken("[[USER]]", normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Byte tokens are plain vocabulary in a real file.
    edit(folder / "tokenizer.json", lambda data: data.update(
        added_tokens=[token for token in data["added_tokens"] if not token["content"].startswith("<0x")]))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"}, "add_bos_token": True,
         "add_eos_token": False, "chat_template": "{{ messages[0].content }}"}))
    return folder


def hugging_face_of(keys) -> Tokenizer:
    """SmolLM2's tokenizer rebuilt in the `tokenizers` library from GGUF keys."""
    tokens = [token.decode() for token in keys["tokenizer.ggml.tokens"].value]
    merges = [tuple(merge.decode().split(" ")) for merge in keys["tokenizer.ggml.merges"].value]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    types = keys["tokenizer.ggml.token_type"].value
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == 3])
    return tokenizer
