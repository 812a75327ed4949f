"""Zero-shot accuracies: the harness's tasks on the torch reference, against what transformers' logits say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from optrot_edge.errors import InputError
from optrot_edge.runtime import zero_shot
from optrot_edge.runtime.text import open_tokenizer
from optrot_edge.runtime.torch_reference import TorchBackend
from optrot_edge.runtime.zero_shot import continuation_scores, load_tasks, score_tasks
from tests.road import save_model
from tests.zero_shot_task import ITEMS, save_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny model whose choices are far apart; do not write into it."""
    return save_model(tmp_path_factory.mktemp("zero_shot") / "tiny", "llama")


@pytest.fixture(scope="module")
def logits_of(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].double()

    return logits


def by_hand(logits_of, context: list[int], text: list[int]) -> tuple[float, bool]:
    said = logits_of(context + text)[len(context) - 1:-1]
    chosen = said.log_softmax(-1)[range(len(text)), text]
    return float(chosen.sum()), bool((said.argmax(-1) == torch.tensor(text)).all())


@pytest.mark.parametrize("batch", [8, 65536])
def test_scores_are_those_of_transformers(batch, folder, logits_of, monkeypatch):
    """Padding and batches change nothing; a greedy continuation is told from others."""
    monkeypatch.setattr(zero_shot, "BATCH", batch)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 500, size=n).tolist(), rng.integers(0, 500, size=m).tolist())
             for n, m in ((1, 1), (7, 3), (2, 9), (12, 1))]
    greedy = [int(logits_of(pairs[1][0])[-1].argmax())]
    pairs.append((pairs[1][0], greedy))
    with TorchBackend(folder) as runner:
        found = continuation_scores(runner, pairs)
    for pair, (score, is_greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = by_hand(logits_of, *pair)
        assert score == pytest.approx(expected, abs=1e-4) and is_greedy == expected_greedy
    assert found[-1][1] and not found[1][1]


def test_a_long_context_loses_its_beginning(folder, logits_of):
    with TorchBackend(folder) as runner:
        runner.context_length = 6
        (cut, _), = continuation_scores(runner, [(list(range(1, 20)), [3, 4])])
        with pytest.raises(InputError, match="answer of 7 tokens does not fit the model's context of 6"):
            continuation_scores(runner, [([1], [2] * 7)])
        for empty in (([1], []), ([], [2])):
            with pytest.raises(InputError, match="both need at least one"):
                continuation_scores(runner, [empty])
    assert cut == pytest.approx(by_hand(logits_of, list(range(15, 20)), [3, 4])[0], abs=1e-4)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_accuracy_is_the_share_of_likeliest_choices(metric, adds_bos, folder, logits_of, tmp_path):
    """Per character where the task normalises; spaces at a context's end go with the choice, and an empty context is
    the beginning of a text."""
    tokenizer = open_tokenizer(folder)
    tokenizer = type("Tokenizer", (), {"tokenize": tokenizer.tokenize, "bos": 1, "adds_bos": adds_bos})()
    begin, right = [1] * adds_bos, []
    for item in ITEMS:
        start, values = begin if item["ctx"] else [1], []
        for text in item["endings"]:
            first = start + tokenizer.tokenize(item["ctx"].rstrip())
            ids = start + tokenizer.tokenize(f"{item['ctx']} {text}")
            values.append(by_hand(logits_of, first, ids[len(first):])[0] / (len(text) if metric == "acc_norm" else 1))
        right.append(int(np.argmax(values)) == item["gold"])
    tasks, left_out = load_tasks([save_task(tmp_path, "mine", metric)])
    assert left_out == {} and list(tasks) == ["mine"] and 0 < sum(right) < len(right)
    with TorchBackend(folder) as runner:
        found = score_tasks(runner, tokenizer, tasks)["mine"]
        first = score_tasks(runner, tokenizer, load_tasks([str(tmp_path / "mine.yaml")], 2)[0])["mine"]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert (found["metric"], found["items"]) == (metric, len(ITEMS))
    assert found["se"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(ITEMS)))
    assert first["accuracy"] == np.mean(right[:2]) and first["items"] == 2


def test_what_cannot_be_had_is_left_out(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    mine = save_task(tmp_path, "mine")
    gone = save_task(tmp_path, "gone")
    (tmp_path / "gone.jsonl").unlink()
    tasks, left_out = load_tasks([mine, gone, "hellaswag"])
    assert list(tasks) == ["mine"] and set(left_out) == {gone, "hellaswag"}
    assert "Error" in left_out["hellaswag"] and "gone.jsonl" in left_out[gone]


def test_refusals(tmp_path):
    for name, says in (("helaswag", "no task of lm-eval"), (str(tmp_path / "no.yaml"), "no task of lm-eval"),
                       ("mmlu", "stands for several tasks"),
                       (save_task(tmp_path, "free", output_type="generate_until"), "is no multiple choice")):
        with pytest.raises(InputError, match=says):
            load_tasks([name])
    (tmp_path / "other").mkdir()
    same = [save_task(folder, "same") for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(InputError, match="another task is called same too"):
        load_tasks(same)
    assert list(load_tasks(same[:1] * 2)[0]) == ["same"]
