"""Benchmarks: names and how they are put -> lm-eval's tasks with their data -> its metrics of whatever model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as run_lm_eval

from megatron_xy.benchmarks.financeiq import NAME as FINANCEIQ
from megatron_xy.benchmarks.financeiq import metrics_of
from megatron_xy.benchmarks.tasks import SEED, load_tasks
from megatron_xy.errors import UsageError

BOOTSTRAPS = 1000  # for standard errors of metrics that have no formula
DIGEST_LENGTH = 12
_NO_METRICS = ("alias", "name", "sample_len", "sample_count")
Say = Callable[[str], None]
Metrics = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Benchmarks:
    """What is asked, of whatever model: the tasks, loaded, and how they are put."""

    names: list[str]
    loaded: dict[str, Any]
    num_fewshot: int | None
    limit: int | None
    apply_chat_template: bool

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What an evaluation is known by, besides the model and its tokenizer; data: a digest of all that is asked."""
        digest = hashlib.sha256()
        for entry in _asked(self.loaded["tasks"]):
            digest.update(json.dumps(entry, sort_keys=True, default=lambda value: type(value).__name__).encode())
        return {
            "tasks": self.names,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "apply_chat_template": self.apply_chat_template,
            "data": digest.hexdigest()[:DIGEST_LENGTH],
        }

    def title(self, name: str) -> str:
        """A benchmark's name with the number of examples that its tasks have before a question."""
        group = self.loaded["groups"].get(name)
        tasks = self.loaded["tasks"]  # of a tag, which is not told of, all
        own = group.get_all_tasks() if group is not None else [tasks[name]] if name in tasks else tasks.values()
        shots = sorted({int(task.get_config("num_fewshot") or 0) for task in own})
        return f"{name} {shots[0]}-shot" if len(shots) == 1 else f"{name} {shots[0]}- to {shots[-1]}-shot"

    def ask(self, model: LM) -> Metrics:
        """{task: {metric: value}}, in lm-eval's names; of financeiq {"acc": ..., "acc_CATEGORY": ...}.

        model: a backend of lm-eval. It answers as often as it is asked to, each time the same questions.
        """
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        found = run_lm_eval(
            lm=model,
            task_dict=self.loaded,
            limit=self.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template,
        )
        return _metrics(found, self.names)


def load_benchmarks(
    tasks: str,
    *,
    data_dir: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
    say: Say,
) -> Benchmarks:
    """The benchmarks with all their data.

    Raises UsageError for names that are none, ConfigError for data that are not there, DataError.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it tells of every task
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise UsageError(f"--tasks ({tasks}): must name one or more, such as {FINANCEIQ},ceval-valid")
    loaded = load_tasks(names, data_dir=data_dir, num_fewshot=num_fewshot, say=say)
    return Benchmarks(names, loaded, num_fewshot, limit, apply_chat_template)


def rows_of(metrics: Metrics) -> list[str]:
    """A line a metric, for people."""
    width = max(len(name) for of_task in metrics.values() for name in of_task)
    return [
        f"{task}  {name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{task}  {name:<{width}}  {value}"
        for task, of_task in metrics.items()
        for name, value in of_task.items()
    ]


def _asked(tasks: dict[str, Any]) -> Iterator[Any]:
    """Each task's name and version, its questions, and those that its examples are drawn from."""
    for name, task in sorted(tasks.items()):
        yield [name, task.VERSION, task.get_config("num_fewshot")]
        yield from task.eval_docs
        if task.get_config("num_fewshot"):
            yield from task.fewshot_docs()


def _metrics(found: dict[str, Any], names: Sequence[str]) -> Metrics:
    results: dict[str, dict[str, Any]] = {**found["results"], **found.get("groups", {})}
    metrics: Metrics = {}
    for name, values in results.items():
        if not name.startswith(FINANCEIQ):
            metrics[name] = {
                metric.removesuffix(",none"): value for metric, value in values.items() if metric not in _NO_METRICS
            }
    if FINANCEIQ in names:
        counts = {name: n["effective"] for name, n in found["n-samples"].items() if name.startswith(f"{FINANCEIQ}_")}
        metrics[FINANCEIQ] = metrics_of(results, counts)
    return metrics
