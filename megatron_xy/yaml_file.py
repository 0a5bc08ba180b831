"""A run's YAML file and the command line's overrides as plain values, each key with the line that it stands on.

From text to dicts, lists and scalars; what they mean is `config`'s. Only the plain part of YAML is taken: no tags,
anchors, aliases or merge keys, no key twice, so that what stands in a file is what a run gets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_xy.errors import ConfigError
from megatron_xy.storage import is_no_file, read_error

_OTHER_BASES = re.compile(r"[-+]?(0[0-9]+|[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?)")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without its numbers to bases 60 and 8: 10:12 is text, not 612, and 0100 a hundred, not 64."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """The tag of a node that names none."""
        if kind is yaml.ScalarNode and implicit[0] and _OTHER_BASES.fullmatch(value):
            return "tag:yaml.org,2002:str"  # of which a number's key makes the number that it looks like
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]


class Lines:
    """Where every key of a YAML file stands, by its dotted path."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def where(self, name: str, path: Path) -> str:
        """FILE:LINE of `name`, or of the nearest section around it that the file has."""
        parts = name.split(".")
        while parts:
            if (key := ".".join(parts)) in self.of:
                return self.of[key]
            parts.pop()
        return str(path)


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A YAML file as plain values and the line of every key. Tags, anchors, aliases and merge keys are refused.

    Raises ConfigError, StorageError where the storage does not give the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise read_error(path, error) from None
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    values, node = _parse_yaml(text, lambda line: f"{path}:{line}")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections such as `model:` and `training:`")
    lines = Lines()
    if isinstance(node, yaml.MappingNode):
        _collect_lines(node, "", path, lines)
    return values, lines


def apply_overrides(values: dict[str, Any], lines: Lines, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Sets every `section.key=value` in `values`, in order; the value is read as YAML.

    Returns (override, sentence) of each one that cannot be set.
    """
    problems = []
    for override in overrides:
        try:
            _apply_override(values, lines, override)
        except ConfigError as error:
            problems.append((_place(override), str(error)))
    return problems


def _parse_yaml(text: str, where: Callable[[int], str]) -> tuple[Any, yaml.Node | None]:
    """`text` as plain values and as YAML's own tree; `where` turns a line into the place that a ConfigError names."""
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise ConfigError(f"{where(line)}: YAML anchors, aliases and tags are not accepted; write it out")
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _check_keys(node, where)
        return _Loader(text).get_single_data(), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{where(mark.line + 1 if mark else 1)}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a NUL; a date such as 2024-13-01; 10,000 brackets
        raise ConfigError(f"{where(1)}: not valid YAML: {str(error).splitlines()[0]}") from None


def _check_keys(node: yaml.Node, where: Callable[[int], str]) -> None:
    """Every key is text, and stands once in its section."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, where)
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"{where(line)}: YAML merge keys (<<) are not accepted; write it out")
            if key.tag != "tag:yaml.org,2002:str":  # 1, yes, null, a date, a list
                shown = f"the key {name}" if isinstance(key, yaml.ScalarNode) else "a key"
                raise ConfigError(f"{where(line)}: {shown} must be text; put it in quotes")
            if name in names:
                raise ConfigError(f"{where(line)}: {name} is given twice; keep one of the two")
            names.add(name)
            _check_keys(value, where)


def _collect_lines(node: yaml.MappingNode, prefix: str, path: Path, lines: Lines) -> None:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        lines.of[name] = f"{path}:{key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            _collect_lines(value, f"{name}.", path, lines)


def _apply_override(values: dict[str, Any], lines: Lines, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", name):
        raise ConfigError("this is no override; write section.key=value, such as training.train_iters=200")
    value, _ = _parse_yaml(text, lambda line: "the value")
    parts = name.split(".")
    # Command lines like dashes, and no key of ours has one; names of sources, further down, may.
    *sections, key = [part.replace("-", "_") for part in parts[:2]] + parts[2:]
    target = values
    for depth, section in enumerate(sections, start=1):
        if target.get(section) is None:
            target[section] = {}
            lines.of.setdefault(".".join(sections[:depth]), _place(override))
        if not isinstance(target[section], dict):
            raise ConfigError(f"{'.'.join(sections[:depth])} is not a section")
        target = target[section]
    target[key] = value
    place = ".".join([*sections, key])
    for stale in [name for name in lines.of if name.startswith(f"{place}.")]:
        del lines.of[stale]
    lines.of[place] = _place(override)


def _place(override: str) -> str:
    return f"override {override if len(override) <= 100 else override[:97] + '...'}"
