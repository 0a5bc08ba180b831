"""What every section of a run's config shares: the kinds of values that a key takes, and that no other key is taken.

What YAML reads as a number, a flag or a path and nobody means as one is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

LARGEST_INTEGER = 2**63 - 1
LONGEST_NAME, LONGEST_PATH = 255, 3800  # bytes: Linux's NAME_MAX, and its PATH_MAX less what lies below a folder


def _plain_number(value: Any) -> Any:
    """Refuses what pydantic would read as a number and nobody means as one."""
    if isinstance(value, bool):
        raise ValueError("must not be true or false")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError("must fit in 64 bits")
    return value


def _plain_flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _path_text(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("must be a path; put it in quotes if it is one")
    if not str(value) or "\0" in str(value):
        raise ValueError("must be a path; it is empty or holds a NUL character")
    return possible_path(value)


def possible_path(value: Any) -> Any:
    """Refuses ~/DIR, which would be a folder named ~ (home folders differ between machines and in containers), and what
    no file system takes, or leaves no room for names below it."""
    path = str(value)
    if path.startswith("~"):
        raise ValueError("must not begin with ~, which only a shell knows; write the path out")
    parts = [part.encode(errors="replace") for part in path.split("/")]
    if max(map(len, parts)) > LONGEST_NAME or sum(map(len, parts)) + len(parts) > LONGEST_PATH:
        raise ValueError(
            f"must be a path of at most {LONGEST_PATH} bytes, {LONGEST_NAME} between slashes: the names of files in it "
            f"need room, too"
        )
    return value


FilePath = Annotated[Path, BeforeValidator(_path_text)]
Weight = Annotated[float, BeforeValidator(_plain_number)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers are numbers, flags are flags, and `model:` with nothing below it is a section without keys."""
        assert info.field_name is not None, "a field's validator knows its field"
        kind = cls.model_fields[info.field_name].annotation
        if value is None and _is_section(kind):
            return {}
        if any(_is_section(part) or get_origin(part) is dict for part in (kind, *get_args(kind))):
            return value  # pydantic says that it must be a section
        return _plain_flag(value) if kind is bool else _plain_number(value)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
