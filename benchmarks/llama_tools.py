"""llama.cpp's own command line tools, built from the sdist of the installed llama-cpp-python.

The wheel of llama-cpp-python carries llama.cpp as a library only. Its sdist carries the whole source,
so `llama-quantize`, `llama-imatrix` and `llama-perplexity` can be built from exactly the revision
that the Python bindings run. Static, Release, no server, no TLS, no tests; about ten minutes on two
cores, once per version and user: the three programs are kept in a cache folder
(`$XDG_CACHE_HOME/optrot-edge/llama.cpp-VERSION`, `~/.cache` by default).

    python benchmarks/llama_tools.py [--sdist FILE_OR_FOLDER] [--jobs N] [--converter]

Needs cmake and a C++17 compiler; pip fetches the sdist unless `--sdist` names one already here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from optrot_edge.errors import InputError

PACKAGE = "llama-cpp-python"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "OFF", "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF", "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF", "LLAMA_BUILD_UI": "OFF", "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_COMMON": "ON",
}


@dataclass(frozen=True)
class LlamaTools:
    """Paths of the three programs and the llama-cpp-python version they were built from."""

    quantize: Path
    imatrix: Path
    perplexity: Path
    version: str


def installed_version() -> str:
    """Version of the installed llama-cpp-python; InputError when it is absent."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{PACKAGE} is not installed; run `pip install '.[llamacpp]'`") from None


def cache_folder(version: str) -> Path:
    """Where the tools of that version live."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "optrot-edge" / f"llama.cpp-{version}"


def get_tools(*, sdist: str | Path | None = None, jobs: int | None = None) -> LlamaTools:
    """The tools of the installed version, built first when they are not there yet.

    `sdist` is a downloaded `llama_cpp_python-*.tar.gz` or a folder it was unpacked into. Raises
    InputError when the package, cmake or the sdist is missing, or when the build fails.
    """
    version = installed_version()
    folder = cache_folder(version)
    tools = LlamaTools(*(folder / "bin" / _executable(name) for name in TOOLS), version)
    if not all(path.is_file() for path in (tools.quantize, tools.imatrix, tools.perplexity)):
        _build(folder, version, sdist, jobs or os.cpu_count() or 1)
    return tools


def get_converter(*, sdist: str | Path | None = None) -> Path:
    """Folder with llama.cpp's `conversion` and `gguf-py` of the installed version, fetched first when it is not there
    yet; nothing is compiled. Raises InputError as `get_tools` does."""
    version = installed_version()
    folder = cache_folder(version) / "converter"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            source, staging = _source(Path(work), version, sdist), Path(work, "staging")
            for name in ("conversion", "gguf-py"):
                shutil.copytree(source / name, staging / name)
            staging.rename(folder)
    return folder


def _executable(name: str) -> str:
    return name + (".exe" if sys.platform == "win32" else "")


def _build(folder: Path, version: str, sdist, jobs: int) -> None:
    """Compile in a work folder; `bin` appears by one rename, so it is whole or absent."""
    if shutil.which("cmake") is None:
        raise InputError("cmake is not installed; llama.cpp's tools need it and a C++17 compiler")
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    source = _source(work, version, sdist)
    build = work / "build"
    log = folder / "build.log"
    defines = [f"-D{key}={value}" for key, value in OPTIONS.items()]
    print(f"building {', '.join(TOOLS)} of {PACKAGE} {version} (log: {log})", flush=True)
    with log.open("w") as output:
        for command in (["cmake", "-S", source, "-B", build, *defines],
                        ["cmake", "--build", build, "--config", "Release", "-j", str(jobs),
                         "--target", *TOOLS]):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
                raise InputError(f"building llama.cpp's tools failed; read {log}")
    found = {path.name: path for path in (build / "bin").rglob("*") if path.is_file()}
    staging = Path(tempfile.mkdtemp(prefix="bin-", dir=folder))
    for name in map(_executable, TOOLS):
        shutil.copy2(found[name], staging / name)
    shutil.rmtree(folder / "bin", ignore_errors=True)
    staging.rename(folder / "bin")
    shutil.rmtree(work)


def _source(work: Path, version: str, sdist) -> Path:
    """Folder of llama.cpp's source, fetched and unpacked when need be."""
    if sdist is None:
        sdist = _download(work, version)
    sdist = Path(sdist)
    if sdist.is_dir():
        roots = [sdist, *sdist.glob("llama_cpp_python-*")]
    elif sdist.is_file():
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        roots = list(work.glob("llama_cpp_python-*"))
    else:
        raise InputError(f"{sdist}: no such sdist; leave --sdist out to let pip fetch it")
    for root in roots:
        source = root / "vendor" / "llama.cpp"
        if (source / "CMakeLists.txt").is_file() and version in root.resolve().name:
            return source
    raise InputError(f"{sdist}: no vendor/llama.cpp of version {version} in it")


def _download(work: Path, version: str) -> Path:
    """The sdist as a .tar.gz in `work`; kept there until the build is finished."""
    name = f"llama_cpp_python-{version}.tar.gz"
    if not (work / name).is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE,
                   "--dest", str(work), f"{PACKAGE}=={version}"]
        if subprocess.run(command).returncode or not (work / name).is_file():
            raise InputError(f"pip could not fetch the sdist of {PACKAGE} {version}; pass --sdist FILE")
    return work / name


def main() -> None:
    """Build the tools and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", help="sdist (.tar.gz) or its unpacked folder, instead of a download")
    parser.add_argument("--jobs", type=int, help="compiler processes (default: one per core)")
    parser.add_argument("--converter", action="store_true", help="only fetch the converter, which is Python")
    arguments = parser.parse_args()
    try:
        if arguments.converter:
            return print(get_converter(sdist=arguments.sdist))
        tools = get_tools(sdist=arguments.sdist, jobs=arguments.jobs)
    except InputError as error:
        sys.exit(f"error: {error}")
    for path in (tools.quantize, tools.imatrix, tools.perplexity):
        print(path)


if __name__ == "__main__":
    main()
