"""How a problem of a config is told: where it stands, all in one report, and the nearest values that are right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_xy.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: where it stands and what to do about it."""

    where: str
    text: str

    def __str__(self) -> str:
        return self.text if self.text.startswith(self.where) else f"{self.where}: {self.text}"


class InvalidConfig(ConfigError):
    """A config with one or more problems; prints all of them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  {problem}" for problem in self.problems))


def refuse(rules: Iterable[tuple[str, str]]) -> None:
    """Raises InvalidConfig with all (key, sentence), if there are any."""
    if problems := [Problem(key, text) for key, text in rules]:
        raise InvalidConfig(problems)


def as_written(value: Any) -> str:
    """A value as the file would have it, short."""
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value) if value is None or value == "" or isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` above 0 on either side of `value`, as text."""
    below = value // unit * unit
    return f"{below}, {below + unit}" if below else f"{below + unit}"


def nearest_divisors(value: int, whole: int) -> str:
    """The divisors of `whole` on either side of `value`, as text; above 10^12 of those that are quickly found."""
    smaller = [number for number in range(1, min(math.isqrt(whole), 10**6) + 1) if whole % number == 0]
    divisors = sorted({*smaller, *(whole // number for number in smaller)})
    below, above = [n for n in divisors if n < value][-1:], [n for n in divisors if n > value][:1]
    return ", ".join(map(str, below + above))
