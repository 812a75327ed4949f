"""The types of llama.cpp's KV cache, and the rotation that llama.cpp gives a quantised one."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from optrot_edge.errors import InputError

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # llama.cpp's --cache-type-k
_FLOATS = KV_TYPES[:3]
_SWITCH = "LLAMA_ATTN_ROT_DISABLE"  # read by llama.cpp when it makes a cache (src/llama-kv-cache.cpp)


@dataclass
class KvCache:
    """What a context's cache is made of.

    keys, values: names of `KV_TYPES`; flash attention, which llama.cpp uses where it can, rounds f32 to f16. rotation:
    leave llama.cpp's own on, a block Hadamard transform of the keys and values that are quantised, where head_dim is a
    multiple of 64. rotated: which of "keys" and "values" llama.cpp says it rotates in the last context made; None
    before, or from a release that does not say.
    """

    keys: str = "f16"
    values: str = "f16"
    rotation: bool = True
    rotated: list[str] | None = None

    @classmethod
    def parse(cls, kv_type: str | None, rotation: bool) -> KvCache:
        """From "q8_0", or "q8_0,q4_0" for keys and values; None is llama.cpp's default, f16. Raises InputError."""
        names = ("f16" if kv_type is None else kv_type).lower().split(",")
        if len(names) > 2 or not set(names) <= set(KV_TYPES):
            raise InputError(f"--kv-type {kv_type}: give one of {', '.join(KV_TYPES)}, or two, as q8_0,q4_0, for keys "
                             "and values")
        if not rotation and set(names) <= set(_FLOATS):
            raise InputError("--no-kv-rotation needs a quantised --kv-type, such as q4_0: llama.cpp rotates no other")
        return cls(names[0], names[-1], rotation)

    def make_context(self, c, model, params, notes):
        """llama.cpp's context for `params`, with this cache; None if it cannot be had. notes: llama.cpp's log.

        A quantised V cache needs flash attention, which llama.cpp then turns on by itself.
        """
        import gguf

        params.type_k, params.type_v = (gguf.GGMLQuantizationType[name.upper()] for name in (self.keys, self.values))
        notes.clear()
        with contextlib.nullcontext() if self.rotation else _without_rotation():
            context = c.llama_init_from_model(model, params)
        said = dict(re.findall(r"attn_rot_([kv]) = (\d)", "\n".join(notes)))
        self.rotated = [name for key, name in (("k", "keys"), ("v", "values")) if said[key] == "1"] if said else None
        return context


@contextlib.contextmanager
def _without_rotation():
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[_SWITCH]
        if before is not None:
            os.environ[_SWITCH] = before
