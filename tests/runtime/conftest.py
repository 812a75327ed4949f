"""Shared tiny packages."""

import pytest

from tests.runtime.byte_llama import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny llama GGUF."""
    chat = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", chat=chat)


@pytest.fixture(scope="session")
def noisy(tmp_path_factory):
    """The same model with every weight disturbed by a tenth of its scale."""
    return write_tiny(tmp_path_factory.mktemp("noisy") / "noisy.gguf", noise=0.1)
