"""What is usable here: runtimes, devices, extras."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from optrot_edge.runtime.imports import installed

# module, distribution, extra, what it is for
_PACKAGES = (
    ("numpy", "numpy", None, "everything"),
    ("gguf", "gguf", None, "GGUF files"),
    ("safetensors", "safetensors", None, "checkpoints"),
    ("llama_cpp", "llama-cpp-python", "llamacpp", "running and checking GGUF packages"),
    ("torch", "torch", "learn", "rotating, quantising, the float reference"),
    ("transformers", "transformers", "learn", "Hugging Face models"),
    ("triton", "triton", "learn", "GPU kernels (Linux)"),
    ("datasets", "datasets", "eval", "calibration and evaluation text from the hub"),
    ("lm_eval", "lm-eval", "zero-shot", "zero-shot tasks in comparisons"),
    ("mlx", "mlx", "mlx", "MLX packages"),
    ("mlx_lm", "mlx-lm", "mlx", "running and checking MLX packages"),
    ("onnx", "onnx", "onnx", "ONNX packages"),
    ("onnxruntime", "onnxruntime", "onnx", "running and checking ONNX packages"),
    ("onnxruntime_genai", "onnxruntime-genai", "onnx", "chat with ONNX packages, and their speed"),
)
# Instruction sets that llama.cpp's CPU kernels use.
_CPU_FEATURES = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8",
                 "asimd", "asimddp", "i8mm", "sve", "sme")


def doctor(probe: bool = False) -> list[dict]:
    """One row per runtime, library and device: `kind`, `name`, `usable`, `detail`, `install`.

    Nothing heavy is imported here: an installed package counts as usable. probe: import each in a child process
    instead, which finds broken installations and takes some seconds. `install` is empty when nothing is
    to do.
    """
    return [_package(*entry, probe) for entry in _PACKAGES] + [_cpu(), _cuda(), _mps(), *_providers()]


def _row(kind: str, name: str, usable: bool, detail: str, install: str = "") -> dict:
    return {"kind": kind, "name": name, "usable": usable, "detail": detail, "install": install}


def _package(module: str, distribution: str, extra: str | None, purpose: str, probe: bool) -> dict:
    kind = "runtime" if module in ("llama_cpp", "torch", "mlx_lm", "onnxruntime", "onnxruntime_genai") else "library"
    target = f'"optrot-edge[{extra}]"' if extra else distribution
    install = f"pip install {target}"
    if not installed(module):
        return _row(kind, distribution, False, f"not installed; for {purpose}", install)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    if probe:
        failure = _import_failure(module)
        if failure:
            return _row(kind, distribution, False, f"{version}, does not import: {failure}",
                        f"pip install --force-reinstall {distribution}")
    return _row(kind, distribution, True, f"{version}; for {purpose}")


def _import_failure(module: str) -> str:
    """Last line of the error that importing `module` gives, or nothing."""
    try:
        run = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True,
                             timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "no answer within 120 s"
    lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
    return lines[-1] if run.returncode else ""


def _providers() -> list[dict]:
    """What onnxruntime can run on: a row, asked in a child process, or none where it is not installed."""
    if not installed("onnxruntime"):
        return []
    code = "import onnxruntime; print(*onnxruntime.get_available_providers(), sep=', ')"
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return []
    lines = run.stdout.strip().splitlines()
    return [_row("device", "onnxruntime's providers", bool(lines), lines[-1] if lines else "it does not import")]


def _cpu() -> dict:
    try:
        flags = set(re.split(r"\s+", Path("/proc/cpuinfo").read_text()))
    except OSError:  # not Linux
        flags = set()
    features = [name for name in _CPU_FEATURES if name in flags]
    listed = " ".join(features) or "features unknown"
    return _row("device", "cpu", True, f"{platform.machine()}, {os.cpu_count()} cores, {listed}")


def _cuda() -> dict:
    """Ask the driver itself; torch would take seconds to import."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return _row("device", "cuda", False, "no NVIDIA driver")
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return _row("device", "cuda", False, "NVIDIA driver, but no usable GPU")
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), 0)
    return _row("device", "cuda", True, f"{count.value} GPU(s), first: {name.value.decode(errors='replace')}")


def _mps() -> dict:
    usable = sys.platform == "darwin" and platform.machine() == "arm64"
    return _row("device", "mps", usable, "Apple GPU" if usable else "not an Apple-silicon Mac")
