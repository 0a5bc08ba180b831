"""Prompts of a PPO run: a jsonl file -> token rows, and which of them each step draws.

The order is a function of (seed, position): nothing is carried along, and a resumed run draws what it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xy.data.chat.conversations import BadConversation, parse_prompt
from megatron_xy.data.chat.renderer import Renderer
from megatron_xy.data.corpus.rows import BadRow, Row, read_rows
from megatron_xy.data.draws.permutation import shuffled
from megatron_xy.errors import DataError


@dataclass(frozen=True)
class DrawnPrompt:
    """One prompt of a step: its row in the file, and how often the file had been gone through before."""

    row: int
    epoch: int


class PromptFile:
    """The rows of a jsonl file that hold a `prompt`: text, taken as it stands after the begin token, or messages.

    Raises ConfigError where the file is not there, DataError for rows that are no prompts, all of them named.
    """

    def __init__(self, path: Path, *, seed: int) -> None:
        self.path, self._seed = path, seed
        self.rows = _read(path, option="ppo.prompts", wanted="prompt", kinds=(str, list))

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, first: int, count: int) -> list[DrawnPrompt]:
        """The prompts at places first to first + count - 1 of the run; each row once an epoch, shuffled anew."""
        size = len(self.rows)
        drawn = []
        for position in range(first, first + count):
            epoch, place = divmod(position, size)
            (row,) = shuffled([place], size=size, key=f"prompts/{self._seed}/{epoch}")
            drawn.append(DrawnPrompt(row, epoch))
        return drawn

    def tokens(self, row: int, renderer: Renderer) -> list[int]:
        """A row's prompt as token ids. Raises DataError where the template cannot render it."""
        value = self.rows[row].value
        try:
            if isinstance(value["prompt"], str):
                return renderer.prompt(value["prompt"])
            asked = parse_prompt(value)
            return renderer.prompt(asked.messages, tools=asked.tools)
        except BadConversation as error:
            raise DataError(f"{self.path}:{self.rows[row].line}: {error}") from error

    def check_lengths(self, renderer: Renderer, *, most: int, reason: str) -> None:
        """Raises DataError that names the first row of more than `most` tokens, or of none."""
        for row in range(len(self.rows)):
            length = len(self.tokens(row, renderer))
            if not 0 < length <= most:
                raise DataError(
                    f"{self.path}:{self.rows[row].line}: the prompt has {length} tokens, must have 1 to {most} "
                    f"({reason}); shorten it, or leave the row out"
                )


class GivenResponses:
    """Answers from a file in place of generated ones, in the order in which prompts are drawn.

    Rows hold `response_tokens`, the end token included. Raises as PromptFile does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = _read(path, option="ppo.responses", wanted="response_tokens", kinds=(list,))

    def check(self, *, num_drawn: int, most: int, vocab_size: int) -> None:
        """Raises DataError where an answer cannot be one, or where there are fewer than are drawn."""
        for row in self.rows:
            answer, where = row.value["response_tokens"], f"{self.path}:{row.line}"
            if len(answer) > most:
                raise DataError(
                    f"{where}: response_tokens has {len(answer)} tokens, must have 1 to {most} "
                    f"(ppo.max_response_length); shorten it, or raise the limit"
                )
            if not all(type(token) is int and 0 <= token < vocab_size for token in answer):
                raise DataError(f"{where}: response_tokens must be token ids from 0 to {vocab_size - 1}")
        self.of(0, num_drawn)

    def of(self, first: int, count: int) -> list[list[int]]:
        """The answers at places first to first + count - 1. Raises DataError where there are none so far behind."""
        if first + count > len(self.rows):
            raise DataError(
                f"{self.path} holds {len(self.rows)} answers, and place {first + count} is drawn; give as many as the "
                f"run draws (training.train_iters x ppo.rollout_batch_size)"
            )
        return [self.rows[place].value["response_tokens"] for place in range(first, first + count)]


def _read(path: Path, *, option: str, wanted: str, kinds: tuple[type, ...]) -> list[Row[dict[str, Any]]]:
    """The rows that hold `wanted`."""

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        value = row.get(wanted)
        if not isinstance(value, kinds) or not value:
            hint = "; an answer that says nothing is the end token alone" if wanted == "response_tokens" else ""
            raise BadRow(f"{wanted} is missing, empty or of a wrong type{hint}")
        return row

    return read_rows(path, option=option, parse=parse)


def padded(rows: Sequence[Sequence[int]], *, width: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of token ids side by side, 0 behind each: int64 [rows, width]."""
    table = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table
