"""Runs llama.cpp's own converter on a model folder: python convert_keys.py LLAMA_CPP_FOLDER MODEL OUT.gguf

In a process of its own, because it brings its own version of the module `gguf`. The tokenizers of tiny models are in no
table of its, so it is told which pre-tokenizer to write; the tokenizer's keys are not what it is run for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    llama_cpp, model, out = map(Path, sys.argv[1:])
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    sys.dont_write_bytecode = True
    import gguf
    from conversion import get_model_class
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    architecture = json.loads((model / "config.json").read_text())["architectures"][0]
    get_model_class(architecture)(model, gguf.LlamaFileType.ALL_F32, out).write()
