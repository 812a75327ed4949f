"""Loading llama.cpp's library and trying a file in it without risk to this process."""

from __future__ import annotations

import collections
import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

from optrot_edge.errors import InputError
from optrot_edge.runtime.imports import require

# Loads everything but the weights and builds the compute graph. Run in a child process, because
# llama.cpp answers some inconsistent files with abort().
_PROBE = """
import sys, llama_cpp as c
from ctypes import c_void_p
sink = c.llama_log_callback(lambda level, text, data: sys.stderr.buffer.write(text) if level == 4 else None)
c.llama_log_set(sink, c_void_p(0))
path, vocab_only, context = sys.argv[1].encode(), sys.argv[2] == "1", int(sys.argv[3])
p = c.llama_model_default_params()
if sys.argv[4]:
    from optrot_edge.runtime.llama_r4 import architecture_override
    overrides = architecture_override(c, sys.argv[4])
    p.kv_overrides = overrides
p.vocab_only, p.no_alloc, p.n_gpu_layers = vocab_only, not vocab_only, 0
if not vocab_only:
    p.load_mode = 0  # the weights stay on disk
model = c.llama_model_load_from_file(path, p)
if not model:
    sys.exit(3)
if not vocab_only:
    q = c.llama_context_default_params()
    q.n_ctx = context
    sys.exit(0 if c.llama_init_from_model(model, q) else 4)
"""
_probed: set[tuple] = set()

errors: collections.deque[str] = collections.deque(maxlen=20)
notes: collections.deque[str] = collections.deque(maxlen=20)  # what llama.cpp says of a context's cache
_log_callback = None  # must outlive every call into llama.cpp


def load_library():
    """The `llama_cpp` module with its log silenced; errors are kept for messages. Raises InputError."""
    global _log_callback
    llama = require("llama_cpp", "llamacpp", "running a GGUF")
    if _log_callback is None:
        def keep(level, text, data):
            if level == 4:  # GGML_LOG_LEVEL_ERROR
                errors.append(text.decode("utf-8", errors="replace").strip())
            elif b"attn_rot_" in text:
                notes.append(text.decode("utf-8", errors="replace"))

        _log_callback = llama.llama_log_callback(keep)
        llama.llama_log_set(_log_callback, ctypes.c_void_p(0))
        llama.llama_backend_init()
    return llama


def why(lines) -> str:
    """llama.cpp's first error line that says more than that loading failed."""
    lines = [re.sub(r"\S*/([\w-]+\.\w+:\d+: )", r"\1", line) for line in lines if line]
    telling = [line for line in lines if "failed to load" not in line and "error loading" not in line]
    named = [line.partition("error loading model: ")[2] for line in lines if "error loading model: " in line]
    return (named or telling or lines or ["no reason given"])[0]


def probe(path: Path, vocab_only: bool, architecture: str = "") -> None:
    """Load the file, as one of `architecture` if that is given, in a child process first; InputError if that fails or
    dies."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, vocab_only)
    if key in _probed:
        return
    command = [sys.executable, "-c", _PROBE, str(path), str(int(vocab_only)), "256", architecture]
    try:
        run = subprocess.run(command, capture_output=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"{path}: llama.cpp did not finish loading it within 300 s") from None
    if run.returncode:
        lines = run.stderr.decode("utf-8", errors="replace").splitlines()
        raise InputError(f"{path}: llama.cpp cannot load it: {why(lines)}")
    _probed.add(key)


def available_threads() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
