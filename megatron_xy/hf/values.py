"""The values of an HF folder's JSON objects, each of the type that it must have; what is of another is bad data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.errors import DataError


@dataclass(frozen=True)
class Values:
    """A JSON object of the file `path`; `within`: the key that it stands under there, a dot behind it.

    A key that is not there, or null, gives the default; without one it must be there. Raises DataError.
    """

    path: Path
    values: Mapping[str, Any]
    within: str = ""

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._value(name, default)
        if type(value) is not int or value < 1:
            raise self._wrong(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if type(value) is not bool:
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; none where it is left out."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise self._wrong(name, value, "a list of strings")
        return value

    def object(self, name: str) -> Values:
        """An object; an empty one where it is left out."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Values(self.path, value, f"{self.within}{name}.")

    def token_ids(self, *names: str) -> dict[str, int | list[int]]:
        """{name: a token id, or several}, those that are there."""
        found = {name: self.values[name] for name in names if name in self}
        for name, value in found.items():
            ids = value if isinstance(value, list) else [value]
            if not all(type(index) is int for index in ids):
                raise self._wrong(name, value, "a token id or a list of them")
        return found

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: Any, rule: str) -> DataError:
        told = "missing or null" if value is None else repr(value)
        told = told if len(told) <= 100 else f"{told[:97]}..."
        return DataError(f"{self.path}: {self.within}{name} ({told}) must be {rule}")
