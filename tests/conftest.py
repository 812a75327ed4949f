"""Settings and tiny models shared by every test of the session."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests import llama_tools  # noqa: F401 (knows the user's cache folder from now on)

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Without an NVIDIA device Triton's kernels run in its interpreter, on CPU tensors. The variable is
# read when a kernel is defined, so it is set before anything imports triton.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in jobs that a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test finds what another session, or the user, has kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(case, shards=False)`: folder of a saved tiny model, made once; do not write into it."""
    from tests.tiny_models import save_tiny

    folders = {}

    def folder(case: str, shards: bool = False):
        key = (case, shards)
        if key not in folders:
            folders[key] = save_tiny(tmp_path_factory.mktemp(case) / "model", case, shards=shards)
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """`model(case)`: folder of a tiny model with its tokenizer, made once; do not write into it."""
    from tests.road import save_model

    folders = {}

    def folder(case: str):
        if case not in folders:
            folders[case] = save_model(tmp_path_factory.mktemp(case) / "model", case)
        return folders[case]

    return folder


@pytest.fixture(scope="session")
def mlx(tmp_path_factory):
    """`mlx(case, **options)`: the tiny float model and its MLX folder, made once; do not write into them.

    `options` are mlx_lm.convert's.
    """
    from tests.mlx_models import convert, save_float

    made = {}

    def folders(case: str, **options):
        key = (case, *sorted(options.items()))
        if key not in made:
            root = tmp_path_factory.mktemp(case)
            source = folders(case)[0] if options else save_float(root / "float", case)
            made[key] = source, convert(source, root / "mlx", **options)
        return made[key]

    return folders


@pytest.fixture(scope="session")
def genai(tmp_path_factory):
    """`genai(case, precision, provider, **options)`: the tiny float model and onnxruntime-genai's ONNX folder of it,
    made once; do not write into them. `options` are the builder's extra options."""
    from tests.onnx_models import build
    from tests.road import save_model

    made = {}

    def folders(case: str, precision: str = "fp32", provider: str = "cpu", **options):
        key = (case, precision, provider, *sorted(options.items()))
        if (case,) not in made:
            made[case,] = save_model(tmp_path_factory.mktemp(case) / "float", case)
        if key not in made:
            made[key] = build(made[case,], tmp_path_factory.mktemp(case) / "onnx", precision, provider, **options)
        return made[case,], made[key]

    return folders


@pytest.fixture
def copied(tmp_path):
    """`copied(folder)`: a copy that a test may spoil."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copied" / folder.name, dirs_exist_ok=True))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """One of everything that commands take (see `make_files`); do not write into it."""
    from tests.cli_runner import make_files

    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Path of a text to calibrate on."""
    from tests.road import write_text

    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))
