"""From a YAML file and overrides to a checked `RunConfig`, and back to YAML.

All problems come in one report, each with its line, value, rule and remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_xy.config.fields import FilePath
from megatron_xy.config.model_rules import model_verb_rules
from megatron_xy.config.problems import InvalidConfig, Problem
from megatron_xy.config.rules import head_of, run_rules
from megatron_xy.config.sections import RunConfig
from megatron_xy.config.validation import validate
from megatron_xy.errors import ConfigError, StorageError, UsageError
from megatron_xy.yaml_file import Lines, apply_overrides, read_yaml

MOST_RANKS = 1_000_000  # lists of ranks are made; a role's `ranks` name no higher ones


def load_config(path: Path, *, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Reads `path`, applies `section.key=value` overrides in order and returns the checked config.

    Raises InvalidConfig with every problem at once, ConfigError where `path` is no YAML file at all, UsageError for
    more than MOST_RANKS. With `world_size` the rules that need the number of ranks are among them; without,
    `check_world` checks these.
    """
    if world_size is not None and world_size > MOST_RANKS:
        raise UsageError(f"world size ({world_size}) must be at most {MOST_RANKS}; take fewer nodes or ranks")
    values, lines = read_yaml(path)
    problems = [Problem(where, text) for where, text in apply_overrides(values, lines, overrides)]
    _let_overrides_place_roles(values, overrides)
    config, refused = validate(values)
    problems += [Problem(lines.where(name, path), text) for name, text in refused.items()]
    for name, text in run_rules(config, world_size=world_size):
        if not any(_depends_on(name, text, key) for key in refused):
            problems.append(Problem(lines.where(name, path), text))
    if problems:
        raise InvalidConfig(problems)
    return config.model_copy(update={"model": config.model.model_copy(update={"head": head_of(config)})})


def load_model_options(origin: str, *, overrides: Sequence[str], world_size: int) -> RunConfig:
    """For a verb over the model in `origin` (ckpt:DIR or hf:DIR): a config of its `model.load`, `parallel`, `runtime`.

    overrides: of the sections parallel and runtime, whose keys are as in a RUN.yaml; the rest is defaults. Raises
    UsageError for an `origin` that is neither, InvalidConfig with every problem of the rest at once.
    """
    values: dict[str, Any] = {"model": {"load": origin}}
    lines = Lines()
    problems = [Problem(where, text) for where, text in apply_overrides(values, lines, overrides)]
    for name in sorted(values.keys() - {"model", "parallel", "runtime"}) + (
        ["model"] if len(values["model"]) > 1 else []
    ):
        problems.append(Problem(lines.where(name, Path(name)), f"{name}: this verb takes keys of parallel and runtime"))
    config, refused = validate({name: values[name] for name in ("model", "parallel", "runtime") if name in values})
    if "model.load" in refused:
        raise UsageError(refused["model.load"].replace("model.load", "the model", 1))
    problems += [Problem(lines.where(name, Path(name)), text) for name, text in refused.items()]
    if not refused:
        for name, text in model_verb_rules(config.parallel, world_size=world_size):
            problems.append(Problem(lines.where(name, Path(name)), text))
    if problems:
        raise InvalidConfig(problems)
    return config


def run_dir_of(path: Path, *, overrides: Sequence[str] = ()) -> Path | None:
    """The run folder that a config names, even where the rest of it is wrong; None if it names none or is not read."""
    try:
        values, lines = read_yaml(path)
    except (ConfigError, StorageError):
        return None
    apply_overrides(values, lines, overrides)
    value = values.get("run_dir", RunConfig.model_fields["run_dir"].default)
    try:
        return TypeAdapter(FilePath).validate_python(value)
    except ValidationError:
        return None


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML, defaults included: what RUN/run.yaml holds.

    But not those of PPO's model section, which each role completes from weights of its own.
    """
    values = json.loads(config.model_dump_json(exclude_none=False))
    if config.task == "ppo":
        values["model"] = config.model.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _let_overrides_place_roles(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """An override that gives a role ranks means them in place of the share that the file gives, and the reverse."""
    given = {}
    for override in overrides:
        if match := re.fullmatch(r"roles\.(\w+)\.(ranks|share)=(?!null$).+", override):
            given[match[1]] = match[2]
    for name, key in given.items():
        role = values["roles"].get(name) if isinstance(values.get("roles"), dict) else None
        if isinstance(role, dict):
            role.pop("share" if key == "ranks" else "ranks", None)


def _depends_on(name: str, text: str, refused: str) -> bool:
    """Whether a rule speaks of a key that was refused, and so of a default that stands in its place."""
    key = ".".join(refused.split(".")[:2])
    return name.startswith(f"{key}.") or re.search(rf"\b{re.escape(key.split('.')[-1])}\b", text) is not None
