"""Special tokens, ends of an answer and chat templates of a Hugging Face folder, in keys and in real llama.cpp."""

from __future__ import annotations

import json

import llama_cpp
import pytest

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import boolean, string, u32
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.exporters.special_tokens import special_entries
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.exporters.gguf_tokenizers import edit, make_byte_level
from tests.exporters.hf_folders import write_vocab

TOKENS = ["<s>", "</s>", "<turn>", "<tool>", "<stop>", "a", "<|im_end|>"]


def write(folder, **files):
    """JSON files by their stems."""
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))


def entries_of(folder, processor=None, tokens=TOKENS, **options):
    """The keys without their common prefix, as plain values."""
    found = special_entries(folder, tokens, processor, **options)
    return {key.removeprefix("tokenizer.ggml."): entry.value for key, entry in found.items()}


def template(*steps):
    """A TemplateProcessing: "$" is the text, anything else a special token."""
    return {"type": "TemplateProcessing", "single": [
        {"Sequence": {"id": "A", "type_id": 0}} if step == "$" else {"SpecialToken": {"id": step, "type_id": 0}}
        for step in steps]}


def test_names_come_from_the_configuration_then_the_map_then_config_json(tmp_path):
    write(tmp_path, tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": None, "pad_token": "<gone>"},
          special_tokens_map={"eos_token": "<stop>", "unk_token": "a"})
    assert entries_of(tmp_path, fallback={"bos": [0], "eos": [4], "pad": [3]}) == {
        "bos_token_id": 0, "eos_token_id": 1, "unknown_token_id": 5, "padding_token_id": 3, "eom_token_id": 4,
        "add_bos_token": False, "add_eos_token": False}


@pytest.mark.parametrize(("steps", "config", "bos", "eos"), [
    (("$",), {}, False, False), (("<s>", "$"), {}, True, False), (("<s>", "$", "</s>"), {}, True, True),
    (("$", "</s>"), {}, False, True), (("<s>", "$"), {"add_bos_token": False}, False, False),
    (("$",), {"add_bos_token": True, "add_eos_token": True}, True, True)])
def test_what_is_added_to_a_text(steps, config, bos, eos, tmp_path):
    write(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"} | config)
    for processor in (template(*steps), {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(*steps)]}):
        found = entries_of(tmp_path, processor)
        assert (found["add_bos_token"], found["add_eos_token"]) == (bos, eos)


def test_the_token_put_after_a_text_is_eos(tmp_path):
    """As in embedding models: what the configuration calls eos still ends an answer."""
    write(tmp_path, tokenizer_config={"eos_token": "<turn>"})
    found = entries_of(tmp_path, template("$", "</s>"))
    assert (found["eos_token_id"], found["eot_token_id"], found["add_eos_token"]) == (1, 2, True)


@pytest.mark.parametrize(("processor", "message"), [
    (template("<s>", "<turn>", "$"), "does more than"), (template("$", "<turn>", "</s>"), "does more than"),
    ({"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}, "does more than"),
    (template("<turn>", "$"), "'<turn>' is put before every text, but the bos token is '<s>'"),
    (template("$", "<gone>"), "adds '<gone>', which is not in the vocabulary")])
def test_other_post_processors_are_refused(processor, message, tmp_path):
    write(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(InputError, match=message):
        entries_of(tmp_path, processor)


@pytest.mark.parametrize(("config", "message"), [
    ({}, "no end-of-sequence token"), ({"eos_token": "<gone>"}, "the eos token '<gone>' is not in the vocabulary"),
    ({"eos_token": "</s>", "add_bos_token": True}, "a bos token is to be added, but none is named"),
    ({"eos_token": "</s>", "chat_template": 5}, "chat_template is neither"),
    ({"eos_token": "</s>", "chat_template": {"tool-use": "a", "tool_use": "b"}}, "two names are one in GGUF")])
def test_incomplete_configurations_are_refused(config, message, tmp_path):
    write(tmp_path, tokenizer_config=config)
    with pytest.raises(InputError, match=message):
        entries_of(tmp_path)


def test_ends_of_generation_config(tmp_path):
    write(tmp_path, tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": [1, 3]})
    assert entries_of(tmp_path)["eom_token_id"] == 3  # "<|im_end|>" is eot to llama.cpp already
    found = entries_of(tmp_path, tokens=TOKENS[:-1])
    assert found["eot_token_id"] == 3 and "eom_token_id" not in found
    write(tmp_path, generation_config={"eos_token_id": [1, 2, 3]})
    assert [entries_of(tmp_path)[f"{name}_token_id"] for name in ("eos", "eom", "eot")] == [1, 2, 3]
    write(tmp_path, generation_config={"eos_token_id": [1, 2, 3, 4]})
    with pytest.raises(InputError, match="ends at '<turn>', '<tool>', '<stop>' besides eos, and GGUF has room for 2"):
        entries_of(tmp_path)
    write(tmp_path, generation_config={"eos_token_id": 77})
    with pytest.raises(InputError, match="special token id 77 is beyond the 7 tokens"):
        entries_of(tmp_path)
    write(tmp_path, tokenizer_config={}, generation_config={"eos_token_id": 4})
    assert entries_of(tmp_path)["eos_token_id"] == 4


def test_llama_cpp_ends_an_answer_where_transformers_does(tmp_path):
    """Ids that it would not know by their text, and those it would."""
    make_byte_level(tmp_path, "llama-bpe")
    names = {name: 507 + i for i, name in enumerate(["begin", "end", "start_header", "end_header", "eot"])}
    ends = {names["end"], names["start_header"], names["end_header"], names["eot"]}
    write(tmp_path, generation_config={"eos_token_id": sorted(ends)})
    path = write_vocab(tmp_path / "v.gguf", vocabulary(tmp_path, 512))
    with LlamaCppBackend(path, vocab_only=True) as backend:
        assert {i for i in range(512) if llama_cpp.llama_vocab_is_eog(backend._vocab, i)} == ends


def test_chat_templates(tmp_path):
    def templates():
        return {key: value for key, value in entries_of(tmp_path).items() if "chat_template" in key}

    write(tmp_path, tokenizer_config={"eos_token": "</s>"}, chat_template={"chat_template": "of json"})
    assert templates() == {"tokenizer.chat_template": "of json"}
    write(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": "of config"})
    assert templates() == {"tokenizer.chat_template": "of config"}
    write(tmp_path, tokenizer_config={"eos_token": "</s>", "chat_template": [
        {"name": "default", "template": "main"}, {"name": "tool-use", "template": "tools"}]})
    several = {"tokenizer.chat_template": "main", "tokenizer.chat_template.tool_use": "tools",
               "tokenizer.chat_templates": ["tool_use"]}
    assert templates() == several
    (tmp_path / "chat_template.jinja").write_text("of jinja\n")
    assert templates() == {"tokenizer.chat_template": "of jinja\n"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("rag")
    assert templates() == {"tokenizer.chat_template": "of jinja\n", "tokenizer.chat_template.rag": "rag",
                           "tokenizer.chat_templates": ["rag"]}


def test_keys_are_those_of_llama_cpps_converter(tmp_path):
    """What convert_hf_to_gguf.py of llama.cpp (as in llama-cpp-python 0.3.36) wrote for this folder, but for
    add_sep_token, which is about pairs of texts; tokens, types and merges were equal, too.
    """
    make_byte_level(tmp_path, "llama-bpe")
    edit(tmp_path / "tokenizer_config.json", lambda data: data.update(chat_template="T"))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    keys = vocabulary(tmp_path, 515)
    for key in ("tokens", "token_type", "merges"):
        keys.pop(f"tokenizer.ggml.{key}")
    assert keys == {
        "tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string("llama-bpe"),
        "tokenizer.ggml.bos_token_id": u32(507), "tokenizer.ggml.eos_token_id": u32(511),
        "tokenizer.ggml.add_bos_token": boolean(True), "tokenizer.ggml.add_eos_token": boolean(False),
        "tokenizer.chat_template": string("T")}
