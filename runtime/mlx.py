"""MLX through mlx-lm: logits, tokens, chat, speed."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.models.mlx_folder import MlxFolder
from optrot_edge.runtime.hf_backend import HfBackend
from optrot_edge.runtime.imports import require

KV_GROUP = 64  # mlx-lm's default
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


def _import_mlx_lm():
    """mlx.core, mlx_lm and its module `generate`, whose name in mlx_lm is a function's.

    Importing mlx_lm limits the process, and those it starts, to 2048 open files, and lets nothing raise that beyond
    4096: enough for all that is done here.
    """
    core = require("mlx.core", "mlx", "an MLX package")
    try:
        return core, *(require(name, "mlx", "an MLX package") for name in ("mlx_lm", "mlx_lm.generate"))
    except InputError:  # is a ValueError too
        raise
    except ValueError as error:
        raise InputError(f"mlx-lm does not start: {error}. It sets the limits of open files to 2048 and 4096, and may "
                         "not where the hard limit is lower; raise that one (ulimit -Hn)") from error


def _reason(error: Exception) -> str:
    """One line of an exception that mlx-lm, mlx or a package's model file raised."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, ValueError | RuntimeError) and text else f"{type(error).__name__}: {text}"
    return text if len(text) < 400 else text[:400] + " ..."


class MlxBackend(HfBackend):
    """One MLX folder in mlx-lm.

    path: the folder, written by an exporter or by `mlx_lm.convert`, quantised or not. n_ctx: longest sequence in
    tokens, None for the model's own context (unlimited where its config.json states none). n_batch: tokens per step of
    a prompt. device: "cpu", "mps" (Apple GPU), "cuda", or "auto" for MLX's default. trust_remote_code: run the model
    file that the folder brings. kv_bits: 4 or 8, keep keys and values in that many bits (groups of 64), from the first
    token on. Raises InputError when the folder cannot be loaded.
    """

    runtime = "mlx"

    def __init__(self, path: str | Path, n_ctx: int | None = None, *, n_batch: int = 512, device: str = "cpu",
                 trust_remote_code: bool = False, kv_bits: int | None = None):
        self._model = None
        if n_ctx is not None and n_ctx < 1:
            raise InputError(f"n_ctx is {n_ctx}; at least 1 is needed")
        if kv_bits not in (None, 4, 8):
            raise InputError(f"kv_bits is {kv_bits}; 4 or 8 can be had")
        self.path, self.n_batch, self.kv_bits, self.trust_remote_code = Path(path), n_batch, kv_bits, trust_remote_code
        folder = MlxFolder(self.path)  # names a missing shard or a newer format, which mlx-lm does not
        self._refuse_gptq(folder.config)
        self._mx, self._mlx_lm, self._generation = _import_mlx_lm()
        self._device = self._choose(device)
        self._model, self.config = self._load(folder.config)
        lengths = [folder.text_config[key] for key in _CONTEXT if isinstance(folder.text_config.get(key), int)]
        self.context_length = lengths[0] if lengths else np.iinfo(np.int32).max
        self.n_ctx = n_ctx or self.context_length
        self.vocab_size = self._try()
        self._warn_of_rope()

    def _refuse_gptq(self, config: dict) -> None:
        stated = config.get("quantization_config")
        if "quantization" not in config and isinstance(stated, dict) and stated.get("quant_method") == "gptq":
            raise InputError(f"{self.path}: a GPTQ folder, which mlx-lm reads with AWQ's order of bits and so runs "
                             "wrongly; export the model to MLX instead")

    def _choose(self, device: str):
        mx = self._mx
        if device not in ("cpu", "mps", "cuda", "auto"):
            raise InputError(f"unknown device {device!r}; use cpu, mps, cuda or auto")
        if device == "auto":
            return mx.default_device()
        usable = {"cpu": True, "mps": mx.metal.is_available(), "cuda": mx.cuda.is_available()}
        if not usable[device]:
            raise InputError(f"MLX has no {device} device here; use --device cpu")
        return mx.cpu if device == "cpu" else mx.gpu

    def _load(self, config: dict):
        load_model = self._mlx_lm.utils.load_model
        try:
            with self._mx.stream(self._device):
                return load_model(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # whatever it is, also out of the package's own file: it does not load
            if config.get("model_file") is not None and not self.trust_remote_code:
                raise InputError(f"{self.path} brings its own model code, {config['model_file']}: read that, and if "
                                 f"you trust it, pass --trust-remote-code. mlx-lm says: {_reason(error)}") from error
            raise InputError(f"{self.path}: mlx-lm cannot load it: {_reason(error)}") from error

    def _try(self) -> int:
        """The width of the logits. Shapes and types are checked before anything is computed, so this costs nothing."""
        width = self._width(quantised=False, failure="mlx-lm cannot run it")
        if self.kv_bits is not None:
            self._width(quantised=True, failure=f"--kv-bits {self.kv_bits} cannot be had with this model")
        return width

    def _width(self, quantised: bool, failure: str) -> int:
        try:
            with self._mx.stream(self._device):
                return self._model(self._mx.array([[0]]), cache=self._new_cache(quantised)).shape[-1]
        except Exception as error:  # of mlx, mlx-lm or the package's own file
            raise InputError(f"{self.path}: {failure}: {_reason(error)}") from error

    def _new_cache(self, quantised: bool = True) -> list:
        """An empty cache, of integers where `kv_bits` asks for it (mlx-lm's own caches)."""
        cache = self._mlx_lm.models.cache.make_prompt_cache(self._model)
        if self.kv_bits is None or not quantised:
            return cache
        if not any(hasattr(part, "to_quantized") for part in cache):
            raise ValueError("it has no cache that can be quantised")
        return [part.to_quantized(group_size=KV_GROUP, bits=self.kv_bits) if hasattr(part, "to_quantized") else part
                for part in cache]

    def _warn_of_rope(self) -> None:
        """mlx-lm's older model files do not read transformers 5's rope_parameters, and say nothing."""
        stated, args = self.config.get("rope_parameters"), getattr(self._model, "args", None)
        if not isinstance(stated, dict) or hasattr(args, "rope_parameters"):
            return
        theta, used = stated.get("rope_theta"), getattr(args, "rope_theta", None)
        scaled = stated.get("rope_type", "default") != "default" and getattr(args, "rope_scaling", stated) is None
        if (theta is not None and used is not None and theta != used) or scaled:
            warnings.warn(f"{self.path.name}: config.json states RoPE under rope_parameters alone, which mlx-lm's "
                          f"{self.config.get('model_type')} does not read (it takes theta {used} and no scaling), so "
                          "its logits are not the model's; write rope_theta and rope_scaling into config.json too",
                          stacklevel=3)

    def __enter__(self) -> MlxBackend:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        if self._model is not None:
            self._model = None
            self._mx.clear_cache()

    @property
    def name(self) -> str:
        """Folder name, model type and the types of its quantised matrices."""
        quantised = [module for _, module in self._model.named_modules() if hasattr(module, "bits")]
        kinds = {f"{module.bits}-bit g{module.group_size}" for module in quantised}
        cache = [f"{self.kv_bits}-bit keys and values"] if self.kv_bits else []
        about = [str(self.config.get("model_type")), *sorted(kinds), *cache]
        return f"{self.path.resolve().name} ({', '.join(about)})"

    @property
    def version(self) -> str:
        """Versions of mlx-lm and mlx."""
        return f"mlx-lm {self._mlx_lm.__version__} (mlx {self._mx.__version__})"

    # logits

    def logits(self, tokens) -> np.ndarray:
        """Logits float32 [n, vocab] of one sequence of token ids [n]. InputError if it does not fit."""
        mx, ids = self._mx, self._check_ids(tokens)
        if not ids.size:
            raise InputError("no tokens: logits need at least one")
        self._check_length(ids.size)
        out = np.empty((ids.size, self.vocab_size), np.float32)
        with mx.stream(self._device):
            cache = self._new_cache()
            for start in range(0, ids.size, self.n_batch):
                part = ids[start:start + self.n_batch]
                rows = self._model(mx.array(part)[None], cache=cache)[0].astype(mx.float32)
                out[start:start + len(part)] = np.array(rows)
        return out

    # text and speed

    @functools.cached_property
    def _wrapper(self):
        """mlx-lm's own tokenizer: chat template and end tokens."""
        try:
            return self._mlx_lm.utils.load_tokenizer(
                self.path, {"trust_remote_code": self.trust_remote_code}, self.config.get("eos_token_id"))
        except Exception as error:  # transformers raises many kinds for an unusable tokenizer
            raise InputError(f"{self.path}: mlx-lm cannot load its tokenizer: {_reason(error)}") from error

    def chat(self, prompt: str, max_tokens: int = 128) -> str:
        """Greedy answer to one user message through the tokenizer's own chat template."""
        if not self._wrapper.has_chat_template:
            raise InputError(f"{self.path}: the tokenizer has no chat template")
        try:
            ids = self._wrapper.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        except Exception as error:  # a template is a program of the package's
            raise InputError(f"{self.path}: its chat template fails: {_reason(error)}") from error
        return self.detokenize(self.generate(ids, max_tokens), special=False).strip()

    def generate(self, tokens, max_tokens: int) -> list[int]:
        """Greedy continuation of token ids, up to an end token or `max_tokens`."""
        answer: list[int] = []
        for token in self._steps(tokens, max_tokens):
            if token in self._wrapper.eos_token_ids:
                break
            answer.append(token)
        return answer

    def _steps(self, tokens, count: int) -> Iterator[int]:
        """The `count` most likely next tokens one after another, by mlx-lm's own loop."""
        mx, ids = self._mx, self._check_ids(tokens)
        if not ids.size:
            raise InputError("no tokens: a prompt needs at least one")
        self._check_length(ids.size + count)
        stream = mx.default_stream(self._device)
        with self._generation.wired_limit(self._model, [stream]):
            for token, _ in self._generation.generate_step(
                    mx.array(ids), self._model, stream, max_tokens=count, prompt_cache=self._new_cache(),
                    prefill_step_size=self.n_batch):
                yield token

    def speed(self, prompt_tokens: int = 256, decode_tokens: int = 64, repeats: int = 3) -> dict[str, float]:
        """Median tokens per second for reading a prompt and for writing one token at a time."""
        limit = min(self.n_ctx, self.context_length)
        decode_tokens = max(1, min(decode_tokens, limit // 2 - 1))
        prompt_tokens = max(1, min(prompt_tokens, limit - decode_tokens - 1))
        ids = np.random.default_rng(0).integers(0, self.vocab_size, prompt_tokens, dtype=np.int32)
        prefill = []
        for left in reversed(range(repeats)):
            self._mx.synchronize(self._mx.default_stream(self._device))  # of a step too many that mlx-lm began
            times = [time.perf_counter()]
            for _ in self._steps(ids, 1 if left else decode_tokens + 1):
                times.append(time.perf_counter())
            prefill.append(times[1] - times[0])
        return {"prefill_tokens_per_s": prompt_tokens / float(np.median(prefill)),
                "decode_tokens_per_s": 1 / float(np.median(np.diff(times[1:])))}
