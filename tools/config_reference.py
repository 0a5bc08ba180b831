"""docs/config.md: every key of a RUN.yaml with its type, default, range and meaning, as megatron_xy/config has them.

    python tools/config_reference.py [--output docs/config.md]

Without --output it is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_xy.config.fields import Section
from megatron_xy.config.sections import SECTIONS, Phase, RoleConfig, RunConfig
from megatron_xy.errors import with_exit_code
from megatron_xy.storage import write_text

HEAD = """\
# Every key of a RUN.yaml

`tools/config_reference.py` writes this page from the fields in `megatron_xy/config/sections.py`.

**A config** is a YAML file of the sections below; `examples/` has whole ones. What must be given: the model's shape,
or a `model.load` that has it; the data; for PPO the roles and prompts. A key that no section has is refused, and the
nearest one is named. `check RUN.yaml --world-size N` tells everything that is wrong, with its line, in a second.
`run.yaml` in the run folder has all keys as they were used.

**Units.** Keys in `_tokens` count tokens, keys in `_iters` and `_interval` steps, keys in `_seconds` seconds. `null`
stands for "not given".

**Overrides** follow the file on the command line: `section.key=value`, `key=value` for a key at the top level, and
further dots for what lies deeper (`data.weights.code=3`, `roles.actor.parallel.tensor_model_parallel_size=2`). The
value is read as YAML. Given twice, the last one counts. In the names of sections and keys `-` may stand for `_`.

**Phases** change a run on its way. `training.phases` is a list, and each item holds from its `from_iter` on. Weights
and batch size that it leaves out stay as they were. On resume, phases to come may be changed; those that have begun
may not, unless `checkpoint.allow_changes` says so.

**Roles.** The sections `model`, `parallel` and `optimizer` of a PPO role have the keys of those below. What a role
leaves out is the run's.
"""

KINDS = {str: "text", int: "integer", float: "number", bool: "true, false", Path: "path", Any: "any", Phase: "phase"}
BAR = "\\|"  # in a table's cell
BOUNDS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}  # by pydantic's names


@with_exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.output is None:
        print(page(), end="")
        return
    write_text(options.output, page())
    print(f"wrote {options.output}")


def page() -> str:
    """The whole page."""
    sections: dict[str, type[Section]] = {}
    for name, section in SECTIONS.items():
        if name == "ppo":
            sections["roles.ROLE"] = RoleConfig
        sections[name] = section
        if name == "training":
            sections["training.phases"] = Phase
    parts = [HEAD, "## At the top level\n\n" + _table(RunConfig)]
    for name, section in sections.items():
        parts.append(f"## {name}\n\n{' '.join((section.__doc__ or '').split())}\n\n{_table(section)}")
    return "\n".join(parts)


def _table(section: type[Section]) -> str:
    rows = ["| key | type, range | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if section is RunConfig and name in {*SECTIONS, "roles"}:
            continue
        kind = _type(field.annotation, field.metadata)
        told = (f"`{name}`", kind, _default(field), field.description or "")
        rows.append(f"| {' | '.join(text.replace('|', BAR) for text in told)} |")
    return "\n".join(rows) + "\n"


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in a reader's words; null is left to the column of defaults."""
    if bounds := list(_bounds(metadata)):
        return f"{_type(annotation)} {', '.join(bounds)}"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(parts[0], parts[1:])
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return f"{{{_type(parts[0])}: {_type(parts[1])}}}"
    if origin is tuple:
        return f"[{', '.join(map(_type, parts))}]"
    return KINDS.get(annotation) or "section"


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for bound in metadata:
        if isinstance(bound, FieldInfo):
            yield from _bounds(bound.metadata)
        elif (kind := type(bound).__name__) in BOUNDS:
            yield f"{BOUNDS[kind]} {getattr(bound, kind.lower()):g}"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "follows"
    if field.default is PydanticUndefined:
        return "must be given"
    if isinstance(field.default, Section):
        return "the run's"
    value = field.default if not isinstance(field.default, Path) else str(field.default)
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub('"', "", json.dumps(value))


if __name__ == "__main__":
    sys.exit(main())
