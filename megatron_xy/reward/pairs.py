"""Preference pairs: jsonl files of rows with prompt, chosen and rejected -> token ids, each pair with its place.

    {"prompt": TEXT | messages, "chosen": TEXT, "rejected": TEXT, "grade"?: "A3".."B3", "source"?, "model"?}

Both answers end in the actor's own end token. Of a grade only the strength counts; A0 and B0, no clear preference,
are dropped. `model` names what generated the answers: one name, or {"chosen": NAME, "rejected": NAME}.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.config import RunConfig
from megatron_xy.data.chat import conversations
from megatron_xy.data.chat.conversations import BadConversation, Message
from megatron_xy.data.chat.renderer import Renderer
from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.corpus.rows import BadRow, read_rows
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.reward.split import clusters_of, split_by_cluster
from megatron_xy.storage import file_sha256

UNNAMED = "unnamed"  # source or model of a row that names none
UNGRADED = 1  # the strength of a row without a grade


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, as token ids i32; strength 1 to 3, of the preference."""

    where: str  # FILE:LINE
    text: str  # of the prompt
    prompt: NDArray[np.int32]
    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    strength: int
    source: str
    models: tuple[str, str]  # that generated chosen and rejected

    @property
    def num_tokens(self) -> int:
        """Of both answers, each with the prompt."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class PairData:
    """What a run learns from and what it is measured on."""

    training: list[Pair]
    held_out: list[Pair]
    fingerprints: dict[str, Any]  # of all that decides what is drawn and what is held out, by key
    notes: list[str]  # what was left out, in lines
    chat_template: str | None = None  # its text

    @property
    def sources(self) -> list[str]:
        """The names of all sources, sorted."""
        return sorted({pair.source for pair in (*self.training, *self.held_out)})


def load_pairs(config: RunConfig) -> PairData:
    """The pairs of a checked config of task reward, split by prompt.

    Raises ConfigError where a file is not there, DataError with FILE:LINE of bad rows, or where nothing is left.
    """
    data, reward = config.data, config.reward_section
    assert data.tokenizer is not None, "the config's rules ask for it"
    tokenizer = load_tokenizer(data.tokenizer)
    template = None if data.chat_template is None else load_chat_template(data.chat_template, tokenizer)
    renderer = Renderer(tokenizer, data.chat_template)
    if not renderer.stop_ids:
        raise DataError(f"data.tokenizer ({tokenizer.path}) has no end token, so no answer could end; name another one")
    reader = _Reader(config, renderer)
    pairs = [pair for path in data.paths for pair in reader.read(path, option="data.path")]
    notes = [f"{reader.num_dropped:,} pairs without a clear preference (A0, B0) are dropped"] * bool(reader.num_dropped)
    fingerprints: dict[str, Any] = {
        "data.path": [file_sha256(path) for path in data.paths],
        "data.tokenizer": tokenizer.sha256,
        "data.chat_template": template and hashlib.sha256(template.source.encode()).hexdigest(),
        "data.eval_path": None,
    }
    if data.eval_path is not None:
        held_out = reader.read(data.eval_path, option="data.eval_path")
        clusters = clusters_of([pair.text for pair in (*held_out, *pairs)])
        taken = set(clusters[: len(held_out)])
        num_before = len(pairs)
        pairs = [pair for pair, cluster in zip(pairs, clusters[len(held_out) :], strict=True) if cluster not in taken]
        if num_before != len(pairs):
            notes.append(f"{num_before - len(pairs):,} pairs are left out: their prompt, or one like it, is held out")
        fingerprints["data.eval_path"] = file_sha256(data.eval_path)
    else:
        fingerprints["reward.test_fraction"] = reward.test_fraction
        clusters = clusters_of([pair.text for pair in pairs])
        is_held_out = split_by_cluster(clusters, [pair.text for pair in pairs], fraction=reward.test_fraction)
        held_out = [pair for pair, is_out in zip(pairs, is_held_out, strict=True) if is_out]
        pairs = [pair for pair, is_out in zip(pairs, is_held_out, strict=True) if not is_out]
        if reward.test_fraction and not held_out:
            raise DataError(
                f"reward.test_fraction ({reward.test_fraction:g}) of {len(pairs)} pairs leaves no prompt to hold out "
                f"(prompts that are alike stay together); give more pairs, data.eval_path, or 0"
            )
    if not pairs:
        raise DataError("data.path holds no pairs to learn from; give some with a clear preference")
    models = sorted({name for pair in held_out or pairs for name in pair.models})  # whose scores are measured
    if reward.stored_scores_of not in (None, *models):
        raise ConfigError(
            f"reward.stored_scores_of ({reward.stored_scores_of}): no {'held-out ' * bool(held_out)}pair has an answer "
            f"of that model, only of {', '.join(models[:8]) or 'unnamed ones'}; name one of these, or leave it out"
        )
    return PairData(pairs, held_out, fingerprints, notes, None if template is None else template.source)


class _Reader:
    """Rows -> pairs, under a run's limits."""

    def __init__(self, config: RunConfig, renderer: Renderer) -> None:
        self.num_dropped = 0
        self._renderer = renderer
        self._longest = config.model.max_position_embeddings
        self._budget = config.training.micro_batch_tokens

    def read(self, path: Path, *, option: str) -> list[Pair]:
        """The pairs of a file that have a clear preference, in order. Raises ConfigError, DataError."""
        rows = read_rows(path, option=option, parse=self._parse)
        pairs = [replace(row.value, where=f"{path}:{row.line}") for row in rows if row.value is not None]
        self.num_dropped += len(rows) - len(pairs)
        return pairs

    def _parse(self, row: dict[str, Any]) -> Pair | None:
        """A pair without its place; None where there is no clear preference."""
        strength = _strength(row.get("grade"))
        prompt = parse_prompt(row)
        answers = [_answer(row, name) for name in ("chosen", "rejected")]
        source, models = _name(row.get("source"), "source"), _models(row.get("model"))
        if not strength:
            return None
        tokens = [prompt_tokens(self._renderer, prompt)]
        tokens += [answer_tokens(self._renderer, prompt, answer) for answer in answers]
        asked, chosen, rejected = (np.array(ids, dtype=np.int32) for ids in tokens)
        if np.array_equal(chosen, rejected):
            raise BadRow("chosen and rejected are the same: an identical pair has nothing to learn")
        pair = Pair(
            where="",
            text=prompt if isinstance(prompt, str) else _asked(prompt),
            prompt=asked,
            chosen=chosen,
            rejected=rejected,
            strength=strength,
            source=source,
            models=models,
        )
        longest = len(asked) + max(len(chosen), len(rejected))
        if longest > self._longest:
            raise BadRow(
                f"prompt and answer have {longest} tokens, must have at most model.max_position_embeddings "
                f"({self._longest}); shorten them, or leave the row out"
            )
        if pair.num_tokens > self._budget:
            raise BadRow(
                f"the pair has {pair.num_tokens} tokens, must have at most training.micro_batch_tokens "
                f"({self._budget}); raise it, or leave the row out"
            )
        return pair


def parse_prompt(row: dict[str, Any]) -> str | list[Message]:
    """A row's prompt: a text, or messages. Raises BadRow."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, list):
        raise BadRow("prompt is missing, empty or neither a string nor messages")
    try:
        asked = conversations.parse_prompt(row)
    except BadConversation as error:
        raise BadRow(f"prompt: {error}") from error
    if asked.tools:
        raise BadRow("tools stand beside the prompt, and pairs are learned without any; leave them out")
    return asked.messages


def prompt_tokens(renderer: Renderer, prompt: str | list[Message]) -> list[int]:
    """Token ids of a prompt. Raises BadRow."""
    try:
        tokens = renderer.prompt(prompt)
    except BadConversation as error:
        raise BadRow(f"prompt: {error}") from error
    if not tokens:
        raise BadRow("prompt has no tokens")
    return tokens


def answer_tokens(renderer: Renderer, prompt: str | list[Message], answer: str) -> list[int]:
    """Token ids of an answer to the prompt, its end token included. Raises BadRow."""
    try:
        return renderer.answer(prompt, answer)
    except BadConversation as error:
        raise BadRow(str(error)) from error


def _answer(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise BadRow(f"{name} is missing or no string")
    if not value.strip():
        raise BadRow(f"{name} is an empty answer")
    return value


def _asked(prompt: Sequence[Message]) -> str:
    """By what prompts are compared: a system text that all of them share makes no two alike."""
    turns = [turn for turn in prompt if turn["role"] != "system"] or prompt
    return "\n".join(str(turn["content"] or "") for turn in turns)


def _strength(grade: Any) -> int:
    """3 to 1; 0 where there is no clear preference."""
    if grade is None:
        return UNGRADED
    if not isinstance(grade, str) or not re.fullmatch("[AB][0-3]", grade):
        raise BadRow(f"grade ({str(grade)[:20]}) must be one of A3, A2, A1, A0, B0, B1, B2, B3")
    return int(grade[1])


def _models(value: Any) -> tuple[str, str]:
    if isinstance(value, dict):
        return _name(value.get("chosen"), "model.chosen"), _name(value.get("rejected"), "model.rejected")
    return _name(value, "model"), _name(value, "model")


def _name(value: Any, field: str) -> str:
    if value is None:
        return UNNAMED
    if not isinstance(value, str) or not value:
        raise BadRow(f"{field} is no name")
    return value


def first_difference(chosen: Sequence[int] | NDArray[np.int32], rejected: Sequence[int] | NDArray[np.int32]) -> int:
    """The first position at which two answers differ; the shorter one's length where it begins the longer one."""
    common = min(len(chosen), len(rejected))
    differs = np.flatnonzero(np.asarray(chosen)[:common] != np.asarray(rejected)[:common])
    return int(differs[0]) if len(differs) else common
