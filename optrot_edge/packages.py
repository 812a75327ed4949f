"""What is particular to each package format: what it refuses before any work, its size, its exporter."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from optrot_edge.checkpoint import QuantizedCheckpoint, check_replaceable, chosen_by_auto
from optrot_edge.errors import InputError
from optrot_edge.formats import GGUF_TYPES, source_dtype
from optrot_edge.inputs import Progress
from optrot_edge.recipe import Recipe
from optrot_edge.rotating import prepare_output
from optrot_edge.tensor_types import all_shapes, parse_overrides

MLX_ENTRY = 600  # bytes of a matrix's names and places in an MLX package, in the file's header, the index and config
MLX_CARD = 2**13  # of the rest that is neither tensors nor tokenizer


class GgufFormat:
    """One file for llama.cpp."""

    @staticmethod
    def prepare(out: Path, overwrite: bool) -> None:
        """Make the folder of `out`; InputError when it is taken."""
        prepare_output(out, overwrite)

    @staticmethod
    def recipe(source, fields: dict) -> Recipe:
        """The Recipe for an open model."""
        return Recipe(**fields)

    @staticmethod
    def refuse(source, recipe: Recipe, vocab_from: str | Path | None) -> None:
        """InputError, before an hour of work, for what the exporter would refuse after it."""
        from optrot_edge.exporters.gguf_vocab import vocabulary

        given = [("--type", recipe.grid), ("--embedding-type", recipe.embedding_type),
                 ("--head-type", recipe.head_type),
                 *(("--tensor-type", kind) for kind in parse_overrides(recipe.tensor_type).values())]
        for option, kind in given:
            if kind is not None and kind not in GGUF_TYPES:
                raise InputError(f"{option} {kind}: GGUF stores {', '.join(GGUF_TYPES)}")
        which = set() if recipe.rotation == "none" else recipe.which
        if "r4" in which:
            raise InputError("--rotate r4: stock llama.cpp has no R4 and would run the file wrongly; "
                             "use --rotate r1,r2 for GGUF")
        if "r3" in which:
            raise InputError("--rotate r3: llama.cpp rotates a quantised K/V cache itself; leave r3 out for GGUF")
        own = source.path if source.kind == "gguf" else None
        vocabulary(source.path, source.config.vocab_size, vocab_from=vocab_from or own)

    @staticmethod
    def metadata_bytes(source, vocab_from: str | Path | None) -> int:
        """Bytes of the package of an open model that are not tensors, at most."""
        from optrot_edge.exporters.gguf import metadata_bytes
        from optrot_edge.exporters.gguf_plan import plan_of_model

        with tempfile.TemporaryDirectory() as folder:
            source.save_tokenizer(folder)
            return metadata_bytes(plan_of_model(source.config, Path(folder), vocab_from=vocab_from))

    @staticmethod
    def write(checkpoint: QuantizedCheckpoint, out: Path, overwrite: bool, vocab_from, progress: Progress) -> dict:
        """Package an open checkpoint; returns the exporter's summary."""
        from optrot_edge.exporters.gguf import export_gguf

        return export_gguf(checkpoint, out, overwrite=overwrite, vocab_from=vocab_from, progress=_bar(progress))


class MlxFormat:
    """A folder for mlx-lm. Methods as GgufFormat's."""

    @staticmethod
    def prepare(out: Path, overwrite: bool) -> None:
        """InputError when `out` is taken."""
        from optrot_edge.exporters.mlx import is_package

        check_replaceable(out, overwrite, "MLX package", is_package)

    @staticmethod
    def recipe(source, fields: dict) -> Recipe:
        """The Recipe for an open model, in its own dtype where none is given."""
        if fields.get("dtype") is None:
            fields = fields | {"dtype": source_dtype(source.stored_dtype("embed_tokens.weight"))}
        return Recipe(**fields)

    @staticmethod
    def refuse(source, recipe: Recipe, vocab_from: str | Path | None) -> None:
        """InputError, before an hour of work, for what the exporter would refuse after it."""
        from optrot_edge.exporters.mlx_plan import model_config

        MlxFormat._refuse_vocab(vocab_from)
        model_config(source.family, source.config, [])
        with tempfile.TemporaryDirectory() as folder:
            MlxFormat._write_tokenizer(source, Path(folder))

    @staticmethod
    def metadata_bytes(source, vocab_from: str | Path | None) -> int:
        """Bytes of the package of an open model that are not tensors, at most."""
        with tempfile.TemporaryDirectory() as folder:
            out = MlxFormat._write_tokenizer(source, Path(folder))
            files = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return files + MLX_CARD + MLX_ENTRY * len(all_shapes(source.family, source.config))

    @staticmethod
    def _refuse_vocab(vocab_from: str | Path | None) -> None:
        if vocab_from is not None:
            raise InputError("--vocab-from is for GGUF; an MLX package takes the model's own tokenizer")

    @staticmethod
    def _write_tokenizer(source, folder: Path) -> Path:
        from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer

        source.save_tokenizer(folder / "source")
        (folder / "package").mkdir()
        write_hf_tokenizer(folder / "source", folder / "package", source.config)
        return folder / "package"

    @staticmethod
    def write(checkpoint: QuantizedCheckpoint, out: Path, overwrite: bool, vocab_from, progress: Progress) -> dict:
        """Package an open checkpoint; returns the exporter's summary."""
        from optrot_edge.exporters.mlx import export_mlx

        MlxFormat._refuse_vocab(vocab_from)
        return export_mlx(checkpoint, out, overwrite=overwrite, progress=_bar(progress))


PACKAGES = {"gguf": GgufFormat, "mlx": MlxFormat}


def _bar(progress: Progress):
    return lambda done, total, what: progress("write and verify", done, total, what)


def write_package(format: str, checkpoint: str | Path, out: Path, overwrite: bool, vocab_from,
                  progress: Progress) -> dict:
    """Package the checkpoint folder; the exporter's summary, and what `--rotation auto` chose."""
    opened = QuantizedCheckpoint(checkpoint)
    return PACKAGES[format].write(opened, out, overwrite, vocab_from, progress) | chosen_by_auto(opened.manifest)


def without_metadata(source, recipe: Recipe, vocab_from: str | Path | None) -> Recipe:
    """`recipe` with the target size of a package's tensors in the place of the package's."""
    if recipe.target_size is None:
        return recipe
    metadata = PACKAGES[recipe.format].metadata_bytes(source, vocab_from)
    if recipe.target_size <= metadata:
        raise InputError(f"--target-size {recipe.target_size:,}: vocabulary and names alone take {metadata:,} bytes")
    return dataclasses.replace(recipe, target_size=recipe.target_size - metadata)
