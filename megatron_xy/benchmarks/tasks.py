"""Names of benchmarks -> lm-eval's tasks with their data, all of it there before a model is loaded.

Data come from a local folder or from the hub's cache, never from the network.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_xy.benchmarks.financeiq import NAME as FINANCEIQ
from megatron_xy.benchmarks.financeiq import financeiq
from megatron_xy.benchmarks.questions import find_category, read_questions
from megatron_xy.errors import ConfigError, UsageError

SEED = 1234  # of drawn examples: lm-eval's own
# Data sets that are, or were, published as CSV files, with their columns of question and answer. What is published
# with a script, as CMMLU is, datasets 4 and newer do not open.
PUBLISHED_AS_CSV = {"ceval/ceval-exam": ("question", "answer"), "haonan-li/cmmlu": ("Question", "Answer")}
Say = Callable[[str], None]


def load_tasks(names: Sequence[str], *, data_dir: Path | None, num_fewshot: int | None, say: Say) -> dict[str, Any]:
    """lm-eval's TaskDict of all tasks named.

    num_fewshot: examples before a question; None: each task's own. Raises UsageError for an unknown name, ConfigError
    for data that are not there, saying how to get them.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"--data-dir ({data_dir}): there is no such folder; name the one that holds the data sets")
    manager = TaskManager(include_defaults=any(name != FINANCEIQ for name in names))
    wanted: list[Any] = []
    for name in names:
        if name == FINANCEIQ:
            wanted.append(financeiq(data_dir, num_fewshot=num_fewshot, say=say))
            continue
        if name not in manager.all_tasks:
            alike = difflib.get_close_matches(name, [FINANCEIQ, *manager.all_tasks], n=3)
            hint = f"; did you mean {', '.join(alike)}?" if alike else "; `lm-eval ls tasks` names all"
            raise UsageError(f"--tasks {name}: there is no such task{hint}")
        wanted.append(name)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for task in wanted:
        found = _loaded(manager, task, data_dir=data_dir)
        for part in loaded:
            loaded[part] |= found[part]
    for name, task in loaded["tasks"].items():
        _set_examples(task, None if name.startswith(f"{FINANCEIQ}_") else num_fewshot)
    return loaded


def tasks_of(manager: TaskManager, name: str) -> set[str]:
    """The task of that name, or all below a group or tag."""
    entry = manager.task_index[name]
    if entry.kind is Kind.TAG:
        return set().union(*(tasks_of(manager, task) for task in entry.tags))
    if entry.kind is not Kind.GROUP:
        return {name}
    members = (
        member if isinstance(member, str) else member.get("task", member.get("group"))
        for member in _config(manager, name)["task"]
    )
    return set().union(*(tasks_of(manager, member) for member in members if member in manager.task_index))


def _loaded(manager: TaskManager, task: Any, *, data_dir: Path | None) -> dict[str, Any]:
    if not isinstance(task, str):
        return dict(manager.load([task]))
    configs = {name: _config(manager, name) for name in tasks_of(manager, task)}
    if data_dir is not None:
        for name, config in configs.items():
            if splits := _splits_as_published(data_dir, config):
                _let_take(manager, name, splits)
    # A data set OWNER/NAME is first looked for as a folder of that name, from where the process stands.
    with contextlib.chdir(data_dir) if data_dir is not None else contextlib.nullcontext():
        try:
            return dict(manager.load([task]))
        # What datasets raises where it finds none, or not this part of it, or one that it does not read any more.
        except (OSError, ValueError, RuntimeError) as error:
            data_sets = sorted({str(config.get("dataset_path")) for config in configs.values()})
            commands = " ".join(
                f"`hf download --repo-type dataset {name} --local-dir DIR/{name}`" for name in data_sets
            )
            raise ConfigError(
                f"task {task}: its data set {', '.join(data_sets)} comes neither from --data-dir nor the hub's cache; "
                f"where there is a network, {commands} gets it, then --data-dir DIR. datasets says: {error}"
            ) from error


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    entry = manager.task_index[name]
    return dict(load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else entry.cfg or {})


def _splits_as_published(data_dir: Path, config: dict[str, Any]) -> dict[str, Dataset]:
    """The splits that the task takes, where its data set lies in --data-dir as CSV files; empty where it does not."""
    columns = PUBLISHED_AS_CSV.get(str(config.get("dataset_path")))
    if columns is None:
        return {}
    folder, category = data_dir / config["dataset_path"], str(config["dataset_name"])
    question, answer = columns
    splits = {config[key] for key in ("validation_split", "test_split", "fewshot_split") if key in config}
    files = {split: find_category(folder, category, split=split) for split in sorted(splits)}
    return {
        split: Dataset.from_list(read_questions(file, question=question, answer=answer))
        for split, file in files.items()
        if file is not None
    }


def _let_take(manager: TaskManager, name: str, splits: dict[str, Dataset]) -> None:
    """Makes a task of lm-eval's take its data from `splits`, in whatever group it is loaded."""
    entry = manager.task_index[name]
    config = load_yaml(entry.yaml_path, resolve_func=True)
    manager.task_index[name] = replace(entry, yaml_path=None, cfg={**config, "custom_dataset": lambda **_: splits})


def _set_examples(task: Task, num_fewshot: int | None) -> None:
    """As lm-eval does: a task that is to have none keeps none."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=SEED)
