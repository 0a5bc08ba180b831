"""What torchrun writes to standard error, told apart from what its workers write, and the ranks that it saw end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TextIO


@dataclass(frozen=True)
class Failure:
    """A rank that torchrun saw end; exitcode is -N where signal N ended it."""

    rank: int
    exitcode: int
    pid: int


class Account:
    """Standard error of torchrun and its workers: the workers' lines pass, torchrun's are read and kept.

    torchrun ends with a traceback of its own whenever a rank leaves with another code than 0, a clean stop included.
    """

    _LOG_LINE = re.compile(r"[A-Z]\d{4} [\d:.]+ \d+ (\S*/)?torch/distributed/(elastic|launcher|run\.py)")
    _ITS_ERRORS = re.compile(r"torch\.distributed\.elastic\.\S*(ChildFailedError|SignalException)\b")
    _RANK = re.compile(r"\s+rank\s*: (\d+) \(local_rank")
    _EXIT_CODE = re.compile(r"\s+exitcode\s*: (-?\d+) \(pid: (\d+)\)")

    def __init__(self, source: IO[bytes], *, output: TextIO) -> None:
        self.failures: list[Failure] = []  # the root cause last
        self.own_lines: list[str] = []  # torchrun's; few, so that a full disk does not cost the workers their output
        self._source = source
        self._output = output
        self._traceback: list[str] = []  # held back until its last line says whose it is
        self._borders_left = 0  # of the box that follows a ChildFailedError
        self._rank = 0

    def read(self) -> None:
        """To the end of the pipe."""
        with self._source:
            for line in self._source:
                self._sort(line.decode("utf-8", errors="replace"))
            self._pass_on(self._traceback)

    def _sort(self, line: str) -> None:
        if self._borders_left:
            self._borders_left -= line.startswith("=====")
            self._read_failure(line)
            self.own_lines.append(line)
        elif self._traceback and line.startswith(" "):
            self._traceback.append(line)
        elif self._traceback and self._ITS_ERRORS.match(line):
            self._borders_left = 2 if "ChildFailedError" in line else 0
            self.own_lines += [*self._traceback, line]
            self._traceback = []
        elif line.startswith("Traceback (most recent call last):"):
            self._pass_on(self._traceback)
            self._traceback = [line]
        elif self._LOG_LINE.match(line):
            self.own_lines.append(line)
        else:
            self._pass_on([*self._traceback, line])
            self._traceback = []

    def _read_failure(self, line: str) -> None:
        if match := self._RANK.match(line):
            self._rank = int(match[1])
        elif match := self._EXIT_CODE.match(line):
            self.failures.append(Failure(self._rank, int(match[1]), int(match[2])))

    def _pass_on(self, lines: Sequence[str]) -> None:
        self._output.write("".join(lines))
        self._output.flush()
