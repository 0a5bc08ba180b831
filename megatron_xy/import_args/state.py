"""What a shell knows at a place in a script, and what is to be told of how it was read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_xy.errors import DataError
from megatron_xy.import_args.syntax import Node

UNKNOWN_MARK = "\x02"  # in place of what only a run would tell, which may be several words, or none
SEVERAL_UNKNOWN = [UNKNOWN_MARK] * 2  # an array, of which a new first element leaves the rest
MOST_TOLD = 80  # characters of a command
MOST_TEXT = 1_000_000  # characters in a variable
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")  # in 64 bits
NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


@dataclass
class _Doubt:
    """What may not run, or not as often as it is read."""

    note: str
    has_programs: bool  # whether it is told for a program too


@dataclass
class State:
    """Scalars have one element, unset variables none; one that is not in `values` may be in the environment."""

    values: dict[str, list[str]] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    functions: dict[str, Node] = field(default_factory=dict)
    arguments: list[str] | None = None  # $1 and so on
    notes: list[str] = field(default_factory=list)
    doubts: list[_Doubt] = field(default_factory=list)

    def get(self, name: str) -> list[str] | None:
        """A variable's elements; None where it is not known whether it is set."""
        arguments = self.arguments
        if name in ("@", "*", "#") or NUMBER.fullmatch(name):
            if arguments is None or name == "0":
                return None
            return arguments if name in "@*" else count(arguments) if name == "#" else element(arguments, int(name) - 1)
        return self.values.get(name)

    def set(self, name: str, values: list[str]) -> None:
        """Raises DataError for more than MOST_TEXT, which no launch script means."""
        if sum(map(len, values)) > MOST_TEXT:
            raise DataError(f"{name} has more than {MOST_TEXT} characters, which import-args does not read")
        self.matters()
        self.values[name] = values

    def assign(self, name: str, text: str) -> None:
        """A scalar, or an array's first element."""
        self.set(name, [text, *self.values.get(name, [])[1:]])

    def set_arguments(self, values: list[str]) -> None:
        """$1 and so on."""
        self.matters()
        self.arguments = values

    def note(self, note: str) -> None:
        """To be told, once."""
        if note not in self.notes:
            self.notes.append(note)

    def matters(self, *, is_program: bool = False) -> None:
        """Something is read that counts: the doubts about it are told."""
        for doubt in self.doubts:
            if doubt.has_programs or not is_program:
                self.note(doubt.note)

    @contextmanager
    def doubt(self, note: str, *, has_programs: bool = True) -> Iterator[None]:
        """Around what may not run, or not as often as it is read."""
        self.doubts.append(_Doubt(note, has_programs))
        try:
            yield
        finally:
            self.doubts.pop()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what happens in a shell of its own."""
        before = self.kept()
        try:
            yield
        finally:
            self.restore(before)

    def kept(self) -> State:
        """As it is now."""
        return State(dict(self.values), set(self.exported), dict(self.functions), self.arguments)

    def restore(self, kept: State) -> None:
        """As it was, but for the notes."""
        self.values, self.exported, self.functions = kept.values, kept.exported, kept.functions
        self.arguments = kept.arguments

    @contextmanager
    def borrowed(self, names: Iterable[str]) -> Iterator[None]:
        """Around a command for which alone these variables are set, and exported."""
        before = {name: self.values.get(name) for name in names}
        exported = set(self.exported)
        self.exported |= before.keys()
        try:
            yield
        finally:
            self.give_back(before)
            self.exported = exported

    def give_back(self, before: dict[str, list[str] | None]) -> None:
        """Variables as they were."""
        for name, values in before.items():
            self.values.pop(name, None)
            if values is not None:
                self.values[name] = values


def has_unknown(values: Iterable[str]) -> bool:
    """Whether a part of them is not known."""
    return any(UNKNOWN_MARK in value for value in values)


def count(values: list[str]) -> list[str]:
    """[how many there are]"""
    return [UNKNOWN_MARK if has_unknown(values) else str(len(values))]


def element(values: list[str], place: int) -> list[str]:
    """[the one at `place`], or []; behind one that is not known, which may be several, none is known.

    Nor is one from the end where there is one in all: it may be a scalar, of which bash has no such elements.
    """
    if has_unknown(values[place:] if place < 0 else values[:place]) or (place < 0 and len(values) == 1):
        return [UNKNOWN_MARK]
    return values[place : place + 1 or None]


def shortened(text: str) -> str:
    """A command, to be told."""
    return text if len(text) <= MOST_TOLD else text[:MOST_TOLD] + "..."
