"""Zero-shot accuracies of the torch reference, by the tasks of EleutherAI's lm-evaluation-harness (`lm_eval`)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.runtime.imports import require

METRICS = ("acc_norm", "acc")  # of a task's the first one is reported: by length where it has that
BATCH = 65536  # tokens whose hidden states are in memory at once; every layer is read once for them


@dataclass(frozen=True)
class ZeroShotTask:
    """The first `limit` items of one of the harness's tasks, all for None. `digest`: SHA-256 of these and of how they
    are asked."""

    task: object
    limit: int | None
    digest: str


def load_tasks(names: list[str], limit: int | None = None) -> tuple[dict[str, ZeroShotTask], dict[str, str]]:
    """Tasks by name, and by name why those are left out that cannot be loaded.

    names: of tasks that the harness has, or their YAML files. limit: items of each, the first ones. Raises InputError
    for what is neither, for groups, for tasks that are not answered by the likeliest of given texts, for two of one
    name, and without the harness.
    """
    manager, tasks, left_out = _manager(), {}, {}
    for name in dict.fromkeys(names):
        known = name in manager.all_subtasks or (name.endswith(".yaml") and Path(name).is_file())
        if not known and name in manager.all_tasks:
            raise InputError(f"--tasks {name} stands for several tasks; name those that are to be measured")
        if not known:
            raise InputError(f"--tasks {name}: no task of lm-eval {version('lm_eval')}, nor a task's .yaml file "
                             "(`lm_eval ls tasks` lists them)")
        try:
            (found, task), = manager.load([name])["tasks"].items()
        except Exception as error:  # the hub's, the network's, the disk's, or of a script that the task brings
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if task.OUTPUT_TYPE != "multiple_choice" or not set(METRICS) & set(task.aggregation()):
            raise InputError(f"--tasks {name} is no multiple choice; only such tasks are measured")
        if found in tasks:
            raise InputError(f"--tasks {name}: another task is called {found} too; rename one of them")
        task.set_config(key="num_fewshot", value=0)
        tasks[found] = ZeroShotTask(task, limit, _digest(task, limit))
    return tasks, left_out


@functools.cache
def _manager():
    """The harness's index of its tasks, which takes seconds to make."""
    return require("lm_eval.tasks", "zero-shot", "--tasks").TaskManager()


def _digest(task, limit: int | None) -> str:
    asked = {name: value for name, value in task.dump_config().items() if not name.startswith("dataset_")}
    items = list(itertools.islice(task.eval_docs, limit))
    text = json.dumps([version("lm_eval"), asked, items], sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def score_tasks(runner, tokenizer, tasks: dict[str, ZeroShotTask], *, progress=None) -> dict[str, dict]:
    """By task its `accuracy` in [0, 1], the `se` of that, the `metric` ("acc_norm" or "acc"), the number of `items` and
    the task's `digest`.

    runner: a TorchBackend. tokenizer: the original's, see `open_tokenizer`. tasks: of `load_tasks`; in each the choice
    with the largest log-likelihood after the context is the answer. progress: called with (done, total) of the texts to
    score of a task.
    """
    evaluator = require("lm_eval.evaluator", "zero-shot", "--tasks")
    model = _harness_model(runner, tokenizer, progress)
    scores = {}
    for name, chosen in tasks.items():
        with contextlib.redirect_stderr(io.StringIO()):  # the harness's own bars, which would run through ours
            found = evaluator.evaluate(model, {"tasks": {name: chosen.task}}, limit=chosen.limit, log_samples=False)
        said, items = found["results"][name], found["n-samples"][name]["effective"]
        metric = next(metric for metric in METRICS if f"{metric},none" in said)
        scores[name] = {"metric": metric, "accuracy": float(said[f"{metric},none"]),
                        "se": float(said[f"{metric}_stderr,none"]) if items > 1 else None, "items": int(items),
                        "digest": chosen.digest}
    return scores


def _harness_model(runner, tokenizer, progress):
    """`runner` as the harness's tasks use a model."""
    base, stderr = require("lm_eval.api.model", "zero-shot", "--tasks").TemplateLM, sys.stderr

    class Model(base):
        @property
        def eot_token_id(self):
            if tokenizer.bos is None:
                raise InputError(f"{runner.name} has no token that begins a text, which a task's empty context needs")
            return tokenizer.bos

        def tok_encode(self, string, add_special_tokens=None, **_):
            begin = [tokenizer.bos] if tokenizer.adds_bos and add_special_tokens is not False else []
            return begin + tokenizer.tokenize(string)

        def loglikelihood(self, requests, disable_tqdm=True):
            with contextlib.redirect_stderr(stderr):
                return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests, **_):
            return continuation_scores(runner, [(context, text) for _, context, text in requests], progress)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise InputError("only multiple choices are scored")

        generate_until = loglikelihood_rolling

    return Model()


def continuation_scores(runner, pairs: list[tuple[list[int], list[int]]], progress=None) -> list[tuple[float, bool]]:
    """By pair of token ids (context, continuation) the continuation's log-likelihood in nats, and whether it is what
    greedy decoding gives. Contexts lose their beginning where both do not fit the runner's context; a continuation
    that alone does not is an InputError."""
    inputs = []
    for context, continuation in pairs:
        if not continuation or not context:
            raise InputError(f"a task asks for the likelihood of {len(continuation)} tokens after {len(context)}; both "
                             "need at least one")
        if len(continuation) > runner.context_length:
            raise InputError(f"a task's answer of {len(continuation)} tokens does not fit the model's context of "
                             f"{runner.context_length}")
        inputs.append((context + continuation)[-runner.context_length - 1:][:-1])
    scores: list = [None] * len(pairs)
    order, done = sorted(range(len(pairs)), key=lambda index: -len(inputs[index])), 0
    while done < len(order):
        longest = len(inputs[order[done]])
        batch = order[done:done + max(1, BATCH // longest)]
        tokens = np.zeros((len(batch), longest), dtype=np.int64)  # a causal model's scores do not see what follows
        for row, index in enumerate(batch):
            tokens[row, :len(inputs[index])] = inputs[index]
        for index, logits in zip(batch, runner.iter_logits(tokens), strict=True):
            scores[index] = _score(logits[:len(inputs[index])], pairs[index][1])
            done += 1
            if progress:
                progress(done, len(order))
    return scores


def _score(logits: np.ndarray, continuation: list[int]) -> tuple[float, bool]:
    """Of one text, whose last logits [n, vocab] predict its continuation."""
    logits = logits[-len(continuation):].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(continuation)), continuation] - np.log(np.exp(logits).sum(axis=1))
    return float(chosen.sum()), bool((logits.argmax(axis=1) == continuation).all())
