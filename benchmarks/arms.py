"""Making and scoring one arm of the GGUF benchmark: stock llama-quantize's files and this project's."""

from __future__ import annotations

import argparse
import functools
import hashlib
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import torch
from llama_tools import LlamaTools, get_tools
from scoring import Reference, llama_logits, standard_error, torch_logits
from shipping import VARIANTS, is_tied, ship
from testbed import build_testbed, sha256
from texts import calibration_text, evaluation_windows, load_text

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

SHIPPED = ("stock", "none", "hadamard", "optrot")


@dataclass(frozen=True)
class Arm:
    """One file to make and score."""

    type: str
    method: str
    seed: int | None = None

    @property
    def id(self) -> str:
        """Key in the results."""
        return f"{self.type}/{self.method}" + ("" if self.seed is None else f"/{self.seed}")

    @property
    def stock(self) -> bool:
        """Made by llama-quantize."""
        return self.method.startswith("stock")

    @property
    def permuted(self) -> bool:
        """Made from the permuted control."""
        return self.method.endswith("-permuted")


class Bench:
    """Models, texts, tools and scores of one run; everything it writes is under `work`."""

    def __init__(self, arguments: argparse.Namespace):
        self.options, self.work = arguments, arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(arguments.threads)
        self.rotations = tempfile.TemporaryDirectory(prefix="rotations-", dir=self.work)
        self.tools: LlamaTools = get_tools(sdist=arguments.sdist)
        self.model = build_testbed(self.work / "testbed", seed=arguments.testbed_seed)
        text = load_text(arguments.text)
        with LlamaCppBackend(self.model, vocab_only=True) as backend:
            self.windows = evaluation_windows(backend, text.evaluation, arguments.windows, arguments.seqlen)
            calibration = calibration_text(backend, text.calibration, arguments.nsamples, arguments.seqlen)
        digest = hashlib.sha256(calibration.encode()).hexdigest()
        self.calibration = self.work / f"calibration-{digest[:12]}.txt"
        self.calibration.write_text(calibration, encoding="utf-8")
        self.settings = {
            "testbed": self.model.name, "testbed_sha256": sha256(self.model),
            "text": text.source, "text_sha256": text.sha256,
            "calibration_sha256": digest,
            "windows": arguments.windows, "seqlen": arguments.seqlen, "nsamples": arguments.nsamples,
            "recipe": arguments.recipe}

    @functools.cached_property
    def reference(self) -> Reference:
        """The float model's scores; computed when the first arm needs them."""
        return Reference(self.model, self.windows, self.work)

    def source(self, arm: Arm) -> Path:
        """The float model that `arm` quantises."""
        return build_testbed(self.work / "testbed", seed=self.options.testbed_seed, permuted=arm.permuted)

    def measure(self, arm: Arm) -> dict:
        """Make the arm's file, score it, and the shipped forms of it; the row for the results."""
        with tempfile.TemporaryDirectory(prefix="arm-", dir=self.work) as folder:
            return self._measure(arm, Path(folder))

    def _measure(self, arm: Arm, folder: Path) -> dict:
        started = time.perf_counter()
        if arm.stock:
            path = self.run_stock(arm, folder, ("f16",))
        else:
            rotation = arm.method.removesuffix("-permuted")
            path = self.run_ours(self.source(arm), arm.type, rotation, arm.seed or 0, folder)
        made = time.perf_counter()
        row = asdict(arm) | {"bytes": path.stat().st_size, "bits_per_weight_body": body_bits(path),
                             "torch": self.reference.score(torch_logits(path, self.windows))}
        if not self.options.no_llama:
            row["llama"] = self.reference.score(llama_logits(path, self.windows, self.options.threads))
        scored = time.perf_counter()
        if arm.seed in (None, self.options.seeds[0]) and arm.method in SHIPPED:
            row["shipping"] = self.shipping(arm, path, folder)
        row["seconds"] = {"make": round(made - started, 1), "score": round(scored - made, 1),
                          "shipping": round(time.perf_counter() - scored, 1)}
        return row

    def run_stock(self, arm: Arm, folder: Path, embedding: tuple[str, ...]) -> Path:
        """llama-quantize with the imatrix of the model it reads."""
        out = folder / "stock.gguf"
        command = [self.tools.quantize, "--imatrix", self.imatrix(arm),
                   "--token-embedding-type", embedding[0], "--output-tensor-type", embedding[-1],
                   *(["--pure"] if arm.method == "stock-pure" else []),
                   self.source(arm), out, arm.type.upper(), str(self.options.threads)]
        run_logged(command, self.work / "llama-quantize.log")
        return out

    def imatrix(self, arm: Arm) -> Path:
        """llama-imatrix on the calibration text, once per model, text and shape."""
        shape = f"{self.options.nsamples}x{self.options.seqlen}"
        out = self.work / f"imatrix-{self.source(arm).stem}-{self.calibration.stem}-{shape}.gguf"
        if not out.exists():
            partial = out.with_suffix(".partial.gguf")  # another suffix would be written in the old format
            length = str(self.options.seqlen)
            run_logged([self.tools.imatrix, "-m", self.source(arm), "-f", self.calibration, "-o", partial,
                        "-c", length, "-b", length, "--chunks", str(self.options.nsamples), "--no-ppl",
                        "-ngl", "0", "-t", str(self.options.threads)], self.work / "llama-imatrix.log")
            partial.rename(out)
        return out

    def run_ours(self, model: Path, kind: str, rotation: str, seed: int, folder: Path) -> Path:
        """This project's road: rotate (once per rotation and seed, for all types), quantise, export."""
        checkpoint, out = folder / "checkpoint", folder / "ours.gguf"
        if rotation != "none":
            saved = Path(self.rotations.name) / f"{rotation}-{seed}.safetensors"
            if not saved.exists():
                pipeline.rotate(model, saved, rotation=rotation, seed=seed, **self.options.recipe)
            rotation = str(saved)
        pipeline.quantize(model, checkpoint, type=kind, rotation=rotation, seed=seed,
                          calibration=str(self.calibration), nsamples=self.options.nsamples,
                          seqlen=self.options.seqlen, embedding_type="f16", head_type="f16",
                          asymmetric="none", refits=0,  # plain GPTQ: see quantizer_ablation.py for the rest
                          overwrite=True, **self.options.recipe)
        pipeline.export(checkpoint, out, format="gguf", overwrite=True)
        return out

    def shipping(self, arm: Arm, path: Path, folder: Path) -> list[dict]:
        """Bytes and KL of the arm with embedding and head quantised."""
        rows = []
        for types in VARIANTS[is_tied(path)]:
            out = folder / "ship.gguf"
            shipped = self.run_stock(arm, folder, types) if arm.stock else ship(path, types, out)
            score = self.reference.score(torch_logits(shipped, self.windows))
            size = shipped.stat().st_size
            rows.append({"embedding": types[0], "head": types[1] if len(types) > 1 else "tied", "bytes": size,
                         "bits_per_weight": 8 * size / parameters(self.model), "kl": score["kl"],
                         "kl_standard_error": standard_error(score["kl_windows"]),
                         "kl_windows": score["kl_windows"], "ppl": score["ppl"], "top1": score["top1"]})
        return rows

    def checks(self) -> dict:
        """The frame itself: what llama.cpp and the permutation cost on the float model."""
        permuted = build_testbed(self.work / "testbed", seed=self.options.testbed_seed, permuted=True)
        found = {"permuted_float_kl": self.reference.score(torch_logits(permuted, self.windows))["kl"]}
        if not self.options.no_llama:
            score = self.reference.score(llama_logits(self.model, self.windows, self.options.threads))
            found |= {"float_kl_llama": score["kl"], "float_ppl": score["ppl"]}
        if max(found["permuted_float_kl"], found.get("float_kl_llama", 0)) > 1e-3:
            raise RuntimeError(f"the reference is not reproduced: {found}")
        return found


def parameters(model: Path) -> int:
    """Weights of the float model, each counted once."""
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(model).tensors)


def body_bits(model: Path) -> float:
    """Stored bits per weight of the decoder layers' linears."""
    linears = [t for t in gguf.GGUFReader(model).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in linears) / sum(int(t.n_elements) for t in linears)


def run_logged(command: list, log: Path) -> None:
    """Run a tool with its output in `log`; InputError when it fails."""
    with log.open("w") as output:
        done = subprocess.run([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT)
        if done.returncode:
            raise InputError(f"{Path(command[0]).name} failed; read {log}")
