"""llama.cpp through the C functions of `llama-cpp-python`: logits, tokens, chat, speed."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.runtime.imports import require
from optrot_edge.runtime.llama_kv_cache import KvCache
from optrot_edge.runtime.llama_library import available_threads, errors, load_library, notes, probe, why
from optrot_edge.runtime.llama_r4 import R4Callback, architecture_override
from optrot_edge.runtime.text import check_ids


def _count(value) -> int:
    return value if isinstance(value, int) else 0


class LlamaCppBackend:
    """One GGUF in llama.cpp.

    path: the GGUF. n_ctx: longest sequence in tokens, None for the model's training context (memory
    for the KV cache is taken as sequences need it). n_batch: tokens per `llama_decode`; one micro-batch
    each. device: "cpu", "cuda" or "mps" (all layers on the GPU), "auto" for a GPU when the build has one.
    vocab_only: tokenise only. kv_type, kv_rotation: of the KV cache, see `KvCache.parse`. Raises InputError when the
    file cannot be loaded. A file with R4 (see `optrot_edge.models.gguf_r4`) is loaded under its base architecture, and
    R4 applied by `r4` or an `R4Callback`.
    """

    runtime = "llama.cpp"

    def __init__(self, path: str | Path, n_ctx: int | None = None, *, n_threads: int | None = None,
                 n_batch: int = 512, device: str = "cpu", vocab_only: bool = False, kv_type: str | None = None,
                 kv_rotation: bool = True, r4=None):
        self._model = self._ctx = self._batch = None
        self.kv_cache = KvCache.parse(kv_type, kv_rotation)
        self.path = Path(path)
        from optrot_edge.models.gguf_file import GGUFFile  # gguf is needed here only
        from optrot_edge.models.gguf_r4 import base_architecture, read_r4_block

        header = GGUFFile(self.path)  # llama.cpp aborts on some damaged headers
        architecture = str(header.value("general.architecture", ""))
        base = base_architecture(architecture)
        self.context_length = _count(header.value(f"{base}.context_length"))
        self._c = c = load_library()
        self.vocab_only, self.n_batch, self.n_threads = vocab_only, n_batch, n_threads or available_threads()
        self._gpu = self._use_gpu(device)
        block = None if vocab_only else read_r4_block(header)
        probe(self.path, vocab_only, base if base != architecture else "")
        self._r4 = block and (r4 or R4Callback(c, block, header.value(f"{base}.feed_forward_length"),
                                               _count(header.value(f"{base}.block_count"))))
        params = c.llama_model_default_params()
        if base != architecture:
            overrides = architecture_override(c, base)
            params.kv_overrides = overrides
        params.vocab_only, params.n_gpu_layers = vocab_only, -1 if self._gpu else 0
        errors.clear()
        self._model = c.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise InputError(f"{self.path}: llama.cpp cannot load it: {why(errors)}")
        self._vocab = c.llama_model_get_vocab(self._model)
        self.vocab_size = c.llama_vocab_n_tokens(self._vocab)
        if n_ctx is not None and n_ctx < 1:
            raise InputError(f"n_ctx is {n_ctx}; at least 1 is needed")
        self.n_ctx = n_ctx or self.context_length

    def _use_gpu(self, device: str) -> bool:
        if device not in ("cpu", "cuda", "mps", "auto"):
            raise InputError(f"unknown device {device!r}; use cpu, cuda, mps or auto")
        if device == "cpu":
            return False
        available = bool(self._c.llama_supports_gpu_offload())
        if not available and device != "auto":
            raise InputError("this llama-cpp-python is built without a GPU backend, so --device "
                             f"{device} cannot be used; install a GPU build or use --device cpu")
        return available

    def __enter__(self) -> LlamaCppBackend:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __del__(self):
        if not sys.is_finalizing():  # at exit the library may be gone before this object
            self.close()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        if self._model:
            self._free_context()
            self._c.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._ctx:
            self._c.llama_batch_free(self._batch)
            self._c.llama_free(self._ctx)
            self._ctx = self._batch = None

    @property
    def name(self) -> str:
        """File name and what llama.cpp calls the model."""
        buffer = ctypes.create_string_buffer(256)
        self._c.llama_model_desc(self._model, buffer, len(buffer))
        return f"{self.path.name} ({buffer.value.decode('utf-8', errors='replace')})"

    @property
    def version(self) -> str:
        """Version of the binding."""
        return f"llama-cpp-python {self._c.__version__}"

    # tokens

    @property
    def adds_bos(self) -> bool:
        """Whether this model wants a beginning-of-sequence token before a text."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, None if the model has none."""
        token = self._c.llama_vocab_bos(self._vocab)
        return token if token >= 0 else None

    def tokenize(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Ids of `text`. add_bos None: as the model wants; special: read `<|…|>` marks as control tokens."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid unicode: {error}") from None
        add_bos = self.adds_bos if add_bos is None else add_bos
        if add_bos and self.bos is None:
            raise InputError(f"{self.path}: the model has no beginning-of-sequence token to add")
        capacity = len(data) + 8
        while True:
            buffer = (ctypes.c_int32 * capacity)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), buffer, capacity, False, special)
            if count >= 0:
                return ([self.bos] if add_bos else []) + list(buffer[:count])
            if count == -2**31:
                raise InputError("the text is too long to tokenise at once")
            capacity = -count

    def detokenize(self, tokens, *, special: bool = True) -> str:
        """Text of token ids; special False leaves control tokens out."""
        ids = self._check_ids(tokens)
        array = (ctypes.c_int32 * max(ids.size, 1))(*ids.tolist())
        capacity = 16 * ids.size + 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            count = self._c.llama_detokenize(self._vocab, array, ids.size, buffer, capacity, False, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", errors="replace")
            capacity = -count

    def _check_ids(self, tokens) -> np.ndarray:
        return check_ids(tokens, self.vocab_size, self.path.name)

    # logits

    def _context(self, length: int):
        """A context that holds `length` tokens, with an empty KV cache."""
        c = self._c
        if self.vocab_only:
            raise InputError(f"{self.path}: opened with vocab_only, so it gives no logits")
        limit = min(self.n_ctx, self.context_length)
        if length > limit:
            raise InputError(f"{length} tokens do not fit the context of {limit} tokens of {self.path.name}; "
                             "use a shorter window or prompt")
        if not self._ctx or c.llama_n_ctx(self._ctx) < length:
            self._free_context()
            params = c.llama_context_default_params()
            params.n_ctx = min(-(-length // 256) * 256, -(-limit // 256) * 256)
            params.n_batch = params.n_ubatch = min(self.n_batch, params.n_ctx)
            params.n_threads = params.n_threads_batch = self.n_threads
            if not self._gpu:
                params.offload_kqv = params.op_offload = False
            if self._r4:
                self._r4.install(params)
            errors.clear()
            self._ctx = self.kv_cache.make_context(c, self._model, params, notes)
            if not self._ctx:
                raise InputError(f"{self.path}: llama.cpp cannot make a context of {length} tokens with keys in "
                                 f"{self.kv_cache.keys} and values in {self.kv_cache.values}: {why(errors)}")
            self._batch = c.llama_batch_init(params.n_batch, 0, 1)
            self._capacity = params.n_batch
        c.llama_memory_clear(c.llama_get_memory(self._ctx), False)
        return self._ctx

    def _decode(self, ids: np.ndarray, start: int, *, outputs: str) -> None:
        """Feed `ids` at positions from `start` on; logits for "all" of them or for the "last"."""
        batch, n = self._batch, len(ids)
        np.ctypeslib.as_array(batch.token, (n,))[:] = ids
        np.ctypeslib.as_array(batch.pos, (n,))[:] = np.arange(start, start + n)
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
        for i in range(n):
            batch.seq_id[i][0] = 0
        wanted = np.ctypeslib.as_array(batch.logits, (n,))
        wanted[:] = outputs == "all"
        wanted[-1] = 1
        batch.n_tokens = n
        errors.clear()
        if self._r4:
            self._r4.begin()
        code = self._c.llama_decode(self._ctx, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}: {why(errors)}")
        if self._r4:
            self._r4.check()

    def _last_logits(self) -> np.ndarray:
        pointer = self._c.llama_get_logits_ith(self._ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,))

    def logits(self, tokens) -> np.ndarray:
        """Logits float32 [n, vocab] of one sequence of token ids [n]. InputError if it does not fit."""
        ids = self._check_ids(tokens)
        if not ids.size:
            raise InputError("no tokens: logits need at least one")
        self._context(ids.size)
        out = np.empty((ids.size, self.vocab_size), np.float32)
        for start in range(0, ids.size, self._capacity):
            part = ids[start:start + self._capacity]
            self._decode(part, start, outputs="all")
            pointer = self._c.llama_get_logits(self._ctx)
            out[start:start + len(part)] = np.ctypeslib.as_array(pointer, (len(part), self.vocab_size))
        return out

    def iter_logits(self, tokens: np.ndarray, *, progress=None) -> Iterator[np.ndarray]:
        """Logits [n, vocab] of each window of `tokens` [b, n], one at a time.

        One window per `llama_decode`: several sequences in a batch brought nothing at 256 tokens on a CPU
        (143 tokens/s for one window, 144 for four at a time, SmolLM2-135M on two cores).
        """
        for window in tokens:
            yield self.logits(window)

    def logits_batch(self, tokens: np.ndarray) -> np.ndarray:
        """Logits float32 [b, n, vocab] of windows [b, n]; `iter_logits` needs b times less memory."""
        return np.stack(list(self.iter_logits(np.asarray(tokens))))

    # text and speed

    def chat(self, prompt: str, max_tokens: int = 128) -> str:
        """Greedy answer to one user message through the GGUF's own chat template."""
        template = self._c.llama_model_chat_template(self._model, None)
        if not template:
            raise InputError(f"{self.path}: the GGUF holds no chat template")
        formats = require("llama_cpp.llama_chat_format", "llamacpp", "chat")
        try:
            formatter = formats.Jinja2ChatFormatter(
                template.decode("utf-8"), eos_token=self._piece(self._c.llama_vocab_eos(self._vocab)),
                bos_token=self._piece(self._c.llama_vocab_bos(self._vocab)))
            text = formatter(messages=[{"role": "user", "content": prompt}]).prompt
        except Exception as error:  # a template is a program of the package's
            raise InputError(f"{self.path}: its chat template fails: {' '.join(str(error).split())}") from error
        ids = self.tokenize(text, add_bos=False, special=True)
        if self.adds_bos and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return self.detokenize(self.generate(ids, max_tokens), special=False).strip()

    def _piece(self, token: int) -> str:
        return self._c.llama_vocab_get_text(self._vocab, token).decode("utf-8") if token >= 0 else ""

    def generate(self, tokens, max_tokens: int) -> list[int]:
        """Greedy continuation of token ids, up to an end token or `max_tokens`."""
        ids = self._check_ids(tokens)
        self._context(ids.size + max_tokens)
        for start in range(0, ids.size, self._capacity):
            self._decode(ids[start:start + self._capacity], start, outputs="last")
        answer: list[int] = []
        while len(answer) < max_tokens:
            token = int(self._last_logits().argmax())
            if self._c.llama_vocab_is_eog(self._vocab, token):
                break
            answer.append(token)
            self._decode(np.array([token], np.int32), ids.size + len(answer) - 1, outputs="last")
        return answer

    def speed(self, prompt_tokens: int = 256, decode_tokens: int = 64, repeats: int = 3) -> dict[str, float]:
        """Median tokens per second for reading a prompt and for writing one token at a time."""
        limit = min(self.n_ctx, self.context_length)
        decode_tokens = max(1, min(decode_tokens, limit // 2))
        prompt_tokens = max(1, min(prompt_tokens, limit - decode_tokens))
        ids = np.random.default_rng(0).integers(0, self.vocab_size, prompt_tokens, dtype=np.int32)
        prefill, decode = [], []
        for _ in range(repeats):
            self._context(prompt_tokens + decode_tokens)
            began = time.perf_counter()
            for start in range(0, ids.size, self._capacity):
                self._decode(ids[start:start + self._capacity], start, outputs="last")
            self._last_logits()
            prefill.append(time.perf_counter() - began)
        for step in range(decode_tokens):
            began = time.perf_counter()
            token = int(self._last_logits().argmax())
            self._decode(np.array([token], np.int32), prompt_tokens + step, outputs="last")
            decode.append(time.perf_counter() - began)
        return {"prefill_tokens_per_s": prompt_tokens / float(np.median(prefill)),
                "decode_tokens_per_s": 1 / float(np.median(decode))}
