"""Names of benchmarks -> lm-eval's tasks with their data, all of it there before a model is loaded.

Data come from a local folder or from the hub's cache, never from the network.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_xy.benchmarks.financeiq import NAME as FINANCEIQ
from megatron_xy.benchmarks.financeiq import financeiq
from megatron_xy.errors import ConfigError, UsageError

SEED = 1234  # of drawn examples: lm-eval's own
Say = Callable[[str], None]


def load_tasks(names: Sequence[str], *, data_dir: Path | None, num_fewshot: int | None, say: Say) -> dict[str, Any]:
    """lm-eval's TaskDict of all tasks named.

    num_fewshot: examples before a question; None: each task's own. Raises UsageError for an unknown name, ConfigError
    for data that are not there, saying how to get them.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"--data-dir ({data_dir}): there is no such folder")
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


def _loaded(manager: TaskManager, task: Any, *, data_dir: Path | None) -> dict[str, Any]:
    if not isinstance(task, str):
        return dict(manager.load([task]))
    # A data set OWNER/NAME is first looked for as a folder of that name, from where the process stands.
    with contextlib.chdir(data_dir) if data_dir is not None else contextlib.nullcontext():
        try:
            return dict(manager.load([task]))
        except (OSError, ValueError) as error:  # what datasets raises where it finds none, or not this part of it
            data_sets = sorted(_data_sets(manager, task))
            commands = " ".join(
                f"`hf download --repo-type dataset {name} --local-dir DIR/{name}`" for name in data_sets
            )
            raise ConfigError(
                f"task {task}: its data set {', '.join(data_sets)} is neither in --data-dir nor in the hub's cache; "
                f"where there is a network, {commands} gets it, then --data-dir DIR. datasets says: {error}"
            ) from error


def _data_sets(manager: TaskManager, name: str) -> set[str]:
    """The data sets of a task, or of all below a group or tag."""
    entry = manager.task_index[name]
    if entry.kind is Kind.TAG:
        return set().union(*(_data_sets(manager, task) for task in entry.tags))
    config = load_yaml(entry.yaml_path, resolve_func=False, recursive=True)
    if entry.kind is not Kind.GROUP:
        return {str(config.get("dataset_path"))}
    members = (
        member if isinstance(member, str) else member.get("task", member.get("group")) for member in config["task"]
    )
    return set().union(*(_data_sets(manager, member) for member in members if member in manager.task_index))


def _set_examples(task: Task, num_fewshot: int | None) -> None:
    """As lm-eval does: a task that is to have none keeps none."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=SEED)
