"""What a quantisation is calibrated by, as token ids: samples of a `data build` folder, or rows of a jsonl file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_xy.data.chat.conversations import BadConversation, parse_messages
from megatron_xy.data.chat.encode import Chat
from megatron_xy.data.chat.template import ChatTemplate, template_of_tokenizer
from megatron_xy.data.corpus.rows import BadRow, read_rows
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.errors import DataError
from megatron_xy.hf.tokenizer import check_tokenizers

Say = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids, and what a model card says of them."""

    rows: list[list[int]]
    told: str


def read_calibration(
    path: Path,
    *,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    vocab_size: int,
    longest: int,
    number: int,
    seed: int,
    say: Say,
) -> Calibration:
    """`number` samples of a data folder, whole ones, each source and bucket by its tokens; or rows of a jsonl file.

    tokenizer: the model's; chat_template: of a jsonl file's conversations, the tokenizer's own if None; longest: tokens
    of a row, cut beyond. `say` hears where there are fewer than `number`. Raises ConfigError, DataError.
    """
    if path.is_dir():
        check_tokenizers(path, tokenizer.path, say=say)
        rows, told = _of_folder(PackedDataset([path]), number=number, seed=seed)
    else:
        rows = _of_rows(path, tokenizer=tokenizer, chat_template=chat_template)
        random.Random(seed).shuffle(rows)
        rows, told = rows[:number], path.name
    if not rows:
        raise DataError(f"--calibration ({path}): holds no samples; name a folder or a file that does")
    if (highest := max(max(row) for row in rows)) >= vocab_size:
        raise DataError(
            f"--calibration ({path}): holds token {highest}; the model knows 0..{vocab_size - 1}; "
            f"name data of the model's own tokenizer"
        )
    if len(rows) < number:
        say(f"warning: --calibration ({path}): holds {len(rows)} samples, fewer than --num-samples ({number})")
    rows = [row[:longest] for row in rows]
    return Calibration(rows, f"{len(rows)} samples, {sum(map(len, rows)):,} tokens, of {told}")


def _of_folder(dataset: PackedDataset, *, number: int, seed: int) -> tuple[list[list[int]], str]:
    draw = random.Random(seed)
    streams = dataset.streams
    left = {stream: stream.num_samples for stream in streams}
    shares: Counter[Any] = Counter()
    while left and (missing := number - shares.total()):  # what a stream has not, the others give
        drawn = draw.choices(list(left), [stream.bucket * stream.num_samples for stream in left], k=missing)
        for stream, count in Counter(drawn).items():
            shares[stream] += min(count, left[stream])
            left[stream] -= min(count, left[stream])
        left = {stream: count for stream, count in left.items() if count}
    chosen = [
        SampleId(stream.source, stream.bucket, index)
        for stream in streams
        for index in draw.sample(range(stream.num_samples), shares[stream])
    ]
    draw.shuffle(chosen)
    rows = [dataset.sample(sample).tokens.tolist() for sample in chosen]
    return rows, f"{', '.join(path.name for path in dataset.paths)} ({', '.join(dataset.sources)})"


def _of_rows(path: Path, *, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> list[list[int]]:
    @cache
    def chat() -> Chat:
        return Chat(tokenizer, chat_template or template_of_tokenizer(tokenizer))

    def parse(row: dict[str, Any]) -> list[int]:
        if not (tokens := encoded(row)):
            raise BadRow("the tokenizer makes no token of it")
        return tokens

    def encoded(row: dict[str, Any]) -> list[int]:
        if isinstance(row.get("messages"), list):
            try:
                return [int(token) for token in chat().conversation(parse_messages(row["messages"])).ids]
            except BadConversation as problem:
                raise BadRow(str(problem)) from None
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise BadRow('must be {"text": ...} or {"messages": [...]}')
        return tokenizer.text_prompt(row["text"])

    return [row.value for row in read_rows(path, option="--calibration", parse=parse)]
