"""A checkpoint's calibration statistics as an importance matrix in llama.cpp's format, for llama-quantize --imatrix.

Layout, as llama-imatrix writes it (`tools/imatrix/imatrix.cpp`): a GGUF with `general.type` "imatrix",
`imatrix.datasets`, `imatrix.chunk_count`, `imatrix.chunk_size`, and per matrix float32 tensors `NAME.in_sum2` [in],
the sums of the squared inputs, and `NAME.counts` [1], over how many tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError, StorageError
from optrot_edge.exporters.expected_tensors import expected_tensors
from optrot_edge.exporters.gguf_entries import array, string, u32
from optrot_edge.exporters.gguf_general import method_entries
from optrot_edge.journal import commit


def export_imatrix(checkpoint: QuantizedCheckpoint, out: str | Path, *, overwrite: bool = False) -> dict:
    """Write what every matrix of `checkpoint` read during calibration, in the basis it is rotated to, to `out`.

    A tied head's inputs are named after the embedding, `token_embd.weight`. The file is written under a temporary name
    and renamed. Returns `path`, `matrices` and `tokens`. Raises InputError for a checkpoint made without calibration,
    and where `out` is taken or cannot be written.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another --save-imatrix or pass --overwrite")
    family, config, shapes = expected_tensors(checkpoint)
    read = [name for name, shape in shapes.items() if len(shape) == 2
            and (name != "embed_tokens.weight" or config.tie_word_embeddings)]
    sums = {family.gguf_name(name): checkpoint.input_sums(name) for name in read}
    recipe = checkpoint.manifest.get("recipe") or {}
    entries = {"general.type": string("imatrix"),
               "imatrix.datasets": array([str(recipe.get("calibration"))], GGUFValueType.STRING),
               "imatrix.chunk_count": u32(recipe.get("nsamples", 0)),
               "imatrix.chunk_size": u32(recipe.get("seqlen", 0)), **method_entries(checkpoint.manifest)}

    def write(partial: Path) -> None:
        writer = GGUFWriter(None, "none")
        writer.kv_data[0].clear()  # an imatrix has no architecture
        for key, entry in entries.items():
            writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
        for name, (squares, count) in sorted(sums.items()):
            writer.add_tensor(f"{name}.in_sum2", squares)
            writer.add_tensor(f"{name}.counts", np.array([count], np.float32))
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        commit(out, write)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return {"path": str(out), "matrices": len(sums), "tokens": int(max(count for _, count in sums.values()))}
