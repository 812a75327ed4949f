"""What is particular to each package format: what it refuses before any work, its size, its exporter."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from math import prod
from pathlib import Path

from optrot_edge.checkpoint import QuantizedCheckpoint, chosen_by_auto
from optrot_edge.errors import InputError
from optrot_edge.formats import FLOAT_TYPES, GGUF_TYPES, bits_of, source_dtype
from optrot_edge.gridspec import fitting_type, grid_spec
from optrot_edge.inputs import Progress
from optrot_edge.journal import sha256
from optrot_edge.memory import parse_size
from optrot_edge.recipe import Recipe
from optrot_edge.rotating import GGUF, prepare_output
from optrot_edge.runtime.imports import require
from optrot_edge.tensor_types import all_shapes, parse_overrides, tensor_types
from optrot_edge.vocabulary_check import check_vocabulary

ONNX_LAYER = 2**14  # bytes of a layer's nodes, names and vectors in an ONNX graph
ENTRY = 600  # bytes of a matrix's names and places in safetensors, in the file's header, the index and config
CARD = 2**13  # of the rest that is neither tensors nor tokenizer


@dataclasses.dataclass(frozen=True)
class PackageOptions:
    """What shapes a package besides its checkpoint. Of a GGUF: `vocab_from`, a GGUF whose vocabulary it takes, and
    `split_max_size`, the largest its files may be, such as "2G" (None: one file). Of an ONNX package:
    `execution_provider` (None: cpu) and `accuracy_level` (None: 0)."""

    vocab_from: str | Path | None = None
    split_max_size: str | int | None = None
    execution_provider: str | None = None
    accuracy_level: int | None = None

    def check(self, format: str) -> None:
        """InputError for options of another format."""
        if self.vocab_from is not None and format != "gguf":
            raise InputError("--vocab-from is for GGUF; other packages take the model's own tokenizer")
        if self.split_max_size is not None:
            if format != "gguf":
                raise InputError("--split-max-size is for GGUF; other packages are folders")
            split_size(self.split_max_size)
        if format != "onnx":
            for name in ("execution_provider", "accuracy_level"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name.replace('_', '-')} is for --format onnx")

    @property
    def onnx(self) -> dict:
        """What `export_onnx` and `plan_onnx` take."""
        return {"execution_provider": self.execution_provider or "cpu", "accuracy_level": self.accuracy_level or 0}

    def recorded(self) -> dict:
        """The same in JSON, files by their content."""
        return dataclasses.asdict(self) | {"vocab_from": self.vocab_from and sha256(self.vocab_from)}


class GgufFormat:
    """One file for llama.cpp, or several parts of one."""

    is_file = True

    @staticmethod
    def prepare(out: Path, overwrite: bool) -> None:
        """Make the folder of `out`; InputError when it is taken."""
        from optrot_edge.exporters.gguf import check_free

        check_free(out, overwrite)
        prepare_output(out, overwrite, GGUF)

    @staticmethod
    def recipe(source, fields: dict, options: PackageOptions) -> Recipe:
        """The Recipe for an open model."""
        return Recipe(**fields)

    @staticmethod
    def refuse(source, recipe: Recipe, options: PackageOptions) -> None:
        """InputError, before an hour of work, for what the exporter would refuse after it."""
        from optrot_edge.exporters.gguf_plan import refuse_model, special_ids
        from optrot_edge.exporters.gguf_vocab import vocabulary

        given = [("--type", recipe.grid), ("--embedding-type", recipe.embedding_type),
                 ("--head-type", recipe.head_type),
                 *(("--tensor-type", kind) for kind in parse_overrides(recipe.tensor_type).values())]
        for option, kind in given:
            if kind is not None and kind not in GGUF_TYPES:
                raise InputError(f"{option} {kind}: GGUF stores {', '.join(GGUF_TYPES)}")
        which = set() if recipe.rotation == "none" else recipe.which
        if "r3" in which:
            raise InputError("--rotate r3: llama.cpp rotates a quantised K/V cache itself; leave r3 out for GGUF")
        refuse_model(source.family, source.config)
        if options.split_max_size is not None:
            limit = split_size(options.split_max_size)
            for name, kind, shape in _planned_types(source, recipe):
                if (size := prod(shape) * bits_of(kind) / 8) > limit:
                    raise InputError(f"--split-max-size: {name} alone takes {size:,.0f} bytes; {limit:,} are too few "
                                     "for a file that holds it")
        own = source.path if source.kind == "gguf" else None
        entries = vocabulary(source.path, source.config.vocab_size, vocab_from=options.vocab_from or own,
                             special_ids=special_ids(source.config))
        check_vocabulary(entries, source.path, borrowed=options.vocab_from is not None)

    @staticmethod
    def metadata_bytes(source, recipe: Recipe, options: PackageOptions) -> int:
        """Bytes of the package of an open model that are not tensors, at most."""
        from optrot_edge.exporters.gguf import metadata_bytes
        from optrot_edge.exporters.gguf_plan import plan_of_model

        with tempfile.TemporaryDirectory() as folder:
            source.save_tokenizer(folder)
            plan = plan_of_model(source.config, Path(folder), vocab_from=options.vocab_from,
                                 r4_block=recipe.r4_block if "r4" in recipe.which else None)
            return metadata_bytes(plan)

    @staticmethod
    def write(checkpoint: QuantizedCheckpoint, out: Path, overwrite: bool, options: PackageOptions,
              progress: Progress) -> dict:
        """Package an open checkpoint; returns the exporter's summary."""
        from optrot_edge.exporters.gguf import export_gguf

        check = partial(check_vocabulary, folder=checkpoint.path / "tokenizer", borrowed=options.vocab_from is not None)
        limit = None if options.split_max_size is None else split_size(options.split_max_size)
        return export_gguf(checkpoint, out, overwrite=overwrite, vocab_from=options.vocab_from, split_max_size=limit,
                           check=check, progress=_bar(progress))


class FolderFormat:
    """What formats have in common whose packages are folders. Methods as GgufFormat's."""

    name: str
    is_file = False

    @classmethod
    def prepare(cls, out: Path, overwrite: bool) -> None:
        """InputError when `out` is taken."""
        from optrot_edge.exporters.folder_package import check_place

        check_place(out, overwrite, cls.name)

    @staticmethod
    def recipe(source, fields: dict, options: PackageOptions) -> Recipe:
        """The Recipe for an open model."""
        return Recipe(**fields)


class MlxFormat(FolderFormat):
    """A folder for mlx-lm."""

    name = "mlx"

    @staticmethod
    def plan(checkpoint: QuantizedCheckpoint, options: PackageOptions):
        """The exporter's plan of an open checkpoint."""
        from optrot_edge.exporters.mlx_plan import plan_mlx

        return plan_mlx(checkpoint)

    @staticmethod
    def recipe(source, fields: dict, options: PackageOptions) -> Recipe:
        """The Recipe for an open model, in its own dtype where none is given."""
        if fields.get("dtype") is None:
            fields = fields | {"dtype": source_dtype(source.stored_dtype("embed_tokens.weight"))}
        return Recipe(**fields)

    @staticmethod
    def refuse(source, recipe: Recipe, options: PackageOptions) -> None:
        """InputError, before an hour of work, for what the exporter would refuse after it."""
        from optrot_edge.exporters.mlx_plan import model_config

        model_config(source.family, source.config, [])
        _tokenizer_bytes(source)

    @staticmethod
    def metadata_bytes(source, recipe: Recipe, options: PackageOptions) -> int:
        """Bytes of the package of an open model that are not tensors, at most."""
        return _tokenizer_bytes(source) + CARD + ENTRY * len(all_shapes(source.family, source.config))

    @staticmethod
    def write(checkpoint: QuantizedCheckpoint, out: Path, overwrite: bool, options: PackageOptions,
              progress: Progress) -> dict:
        """Package an open checkpoint; returns the exporter's summary."""
        from optrot_edge.exporters.mlx import export_mlx

        return export_mlx(checkpoint, out, overwrite=overwrite, progress=_bar(progress))


class OnnxFormat(FolderFormat):
    """A folder for onnxruntime, onnxruntime-genai and transformers.js."""

    name = "onnx"

    @staticmethod
    def plan(checkpoint: QuantizedCheckpoint, options: PackageOptions):
        """The exporter's plan of an open checkpoint."""
        from optrot_edge.exporters.onnx_plan import plan_onnx

        return plan_onnx(checkpoint, **options.onnx)

    @staticmethod
    def recipe(source, fields: dict, options: PackageOptions) -> Recipe:
        """The Recipe for an open model, in what the execution provider computes in where no dtype is given."""
        from optrot_edge.exporters.onnx_plan import usual_dtype

        if fields.get("dtype") is None:
            fields = fields | {"dtype": usual_dtype(options.onnx["execution_provider"])}
        return Recipe(**fields)

    @staticmethod
    def refuse(source, recipe: Recipe, options: PackageOptions) -> None:
        """InputError, before an hour of work, for what the exporter would refuse after it."""
        from optrot_edge.exporters.onnx_plan import check_target

        check_target(dtype=recipe.dtype, **options.onnx)
        for module in ("onnx", "onnx_ir", "onnxruntime_genai"):
            require(module, "onnx", "writing ONNX packages")
        _tokenizer_bytes(source)

    @staticmethod
    def metadata_bytes(source, recipe: Recipe, options: PackageOptions) -> int:
        """Bytes of the package of an open model that are not tensors, at most."""
        config = source.config
        tables = config.max_position_embeddings * config.head_dim * 4
        return _tokenizer_bytes(source) + CARD + tables + ONNX_LAYER * (config.num_hidden_layers + 4)

    @staticmethod
    def write(checkpoint: QuantizedCheckpoint, out: Path, overwrite: bool, options: PackageOptions,
              progress: Progress) -> dict:
        """Package an open checkpoint; returns the exporter's summary."""
        require("onnxruntime_genai", "onnx", "writing ONNX packages")
        from optrot_edge.exporters.onnx import export_onnx

        return export_onnx(checkpoint, out, overwrite=overwrite, progress=_bar(progress), **options.onnx)


class GptqFormat(FolderFormat):
    """A folder for GPTQModel, transformers, vLLM and onnxruntime-genai's builder."""

    name = "gptq"

    @staticmethod
    def plan(checkpoint: QuantizedCheckpoint, options: PackageOptions):
        """The exporter's plan of an open checkpoint."""
        from optrot_edge.exporters.gptq_plan import plan_gptq

        return plan_gptq(checkpoint)

    @staticmethod
    def refuse(source, recipe: Recipe, options: PackageOptions) -> None:
        """InputError, before an hour of work, for what the exporter would refuse after it."""
        from optrot_edge.exporters.gptq_blocks import check_grid, check_shape
        from optrot_edge.exporters.gptq_plan import refuse_model

        which = set() if recipe.rotation == "none" else recipe.which
        refuse_model(source.family, source.config, *(name in which for name in ("r3", "r4")))
        if recipe.embedding_type != "f16":
            raise InputError(f"--embedding-type {recipe.embedding_type}: GPTQ's format has float embeddings only; use "
                             "f16")
        if source.config.tie_word_embeddings and recipe.head_type != "f16":
            raise InputError(f"--head-type {recipe.head_type}: this model's head is tied to its embedding, and GPTQ's "
                             "format has float embeddings only; use f16")
        grids = [(name, grid_spec(kind), shape) for name, kind, shape in _planned_types(source, recipe)
                 if kind not in FLOAT_TYPES]
        for name, spec, shape in grids:
            check_grid(spec, name)
            check_shape(shape, spec, name)
        if not grids and not recipe.has_target:
            raise InputError(f"--type {recipe.type}: a GPTQ folder needs quantised matrices; choose a type such as "
                             "int4-g128-sym-f16")
        _tokenizer_bytes(source)

    @staticmethod
    def metadata_bytes(source, recipe: Recipe, options: PackageOptions) -> int:
        """Bytes of the package of an open model that are not tensors, at most."""
        indices = 4 * sum(shape[-1] for shape in all_shapes(source.family, source.config).values() if len(shape) == 2)
        return _tokenizer_bytes(source) + CARD + indices + ENTRY * len(all_shapes(source.family, source.config))

    @staticmethod
    def write(checkpoint: QuantizedCheckpoint, out: Path, overwrite: bool, options: PackageOptions,
              progress: Progress) -> dict:
        """Package an open checkpoint; returns the exporter's summary."""
        from optrot_edge.exporters.gptq import export_gptq

        return export_gptq(checkpoint, out, overwrite=overwrite, progress=_bar(progress))


def _planned_types(source, recipe: Recipe) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, type, shape) of the matrices of an open model whose types the recipe says."""
    shapes = all_shapes(source.family, source.config)
    return [(name, fitting_type(kind, shapes[name][-1]), shapes[name])
            for name, kind in tensor_types(source.family, source.config, recipe).items() if kind]


def _tokenizer_bytes(source) -> int:
    """Bytes of an open model's tokenizer as Hugging Face files; InputError where it cannot be had."""
    from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        source.save_tokenizer(Path(folder, "source"))
        out = Path(folder, "package")
        out.mkdir()
        try:
            write_hf_tokenizer(Path(folder, "source"), out, source.config)
        except InputError as error:  # which names the copy
            raise InputError(str(error).replace(str(Path(folder, "source")), str(source.path))) from None
        return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


PACKAGES = {"gguf": GgufFormat, "mlx": MlxFormat, "onnx": OnnxFormat, "gptq": GptqFormat}


def split_size(text: str | int) -> int:
    """Bytes of "2G", "500M" (decimal, as llama.cpp's gguf-split has them) or of any size that `parse_size` knows."""
    text = str(text).strip()
    return parse_size(text + "B" if text[-1:] in tuple("MGmg") else text)


def _bar(progress: Progress):
    return lambda done, total, what: progress("write and verify", done, total, what)


def write_package(format: str, checkpoint: str | Path, out: Path, overwrite: bool, options: PackageOptions,
                  progress: Progress) -> dict:
    """Package the checkpoint folder; the exporter's summary, and what `--rotation auto` chose."""
    opened = QuantizedCheckpoint(checkpoint)
    return PACKAGES[format].write(opened, out, overwrite, options, progress) | chosen_by_auto(opened.manifest)


def without_metadata(source, recipe: Recipe, options: PackageOptions) -> Recipe:
    """`recipe` with the target size of a package's tensors in the place of the package's."""
    if recipe.target_size is None:
        return recipe
    metadata = PACKAGES[recipe.format].metadata_bytes(source, recipe, options)
    if recipe.target_size <= metadata:
        raise InputError(f"--target-size {recipe.target_size:,}: vocabulary and names alone take {metadata:,} bytes")
    return dataclasses.replace(recipe, target_size=recipe.target_size - metadata)
