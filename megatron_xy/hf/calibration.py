"""What a quantisation is calibrated by, as token ids: samples of a `data build` folder, or rows of a jsonl file."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.data.chat import Chat
from megatron_xy.data.chat_template import OF_TOKENIZER, load_chat_template
from megatron_xy.data.conversations import BadConversation, parse_messages
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.rows import BadRow, read_rows
from megatron_xy.data.sampler import SampleId
from megatron_xy.data.tokenizer import load_tokenizer
from megatron_xy.errors import DataError


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids, and what a model card says of them."""

    rows: list[list[int]]
    told: str


def read_calibration(path: Path, *, model: Path, vocab_size: int, longest: int, number: int, seed: int) -> Calibration:
    """`number` samples of a data folder, whole ones, each source and bucket by its tokens; or rows of a jsonl file.

    model: the HF folder whose tokenizer encodes a jsonl file's texts; longest: tokens of a row, cut beyond. Raises
    ConfigError, DataError.
    """
    if path.is_dir():
        rows, told = _of_folder(PackedDataset([path]), number=number, seed=seed)
    else:
        rows = _of_rows(path, model=model)
        random.Random(seed).shuffle(rows)
        rows, told = rows[:number], path.name
    if (highest := max(max(row) for row in rows)) >= vocab_size:
        raise DataError(f"--calibration ({path}): holds token {highest}; the model knows 0..{vocab_size - 1}")
    rows = [row[:longest] for row in rows]
    return Calibration(rows, f"{len(rows)} samples, {sum(map(len, rows)):,} tokens, of {told}")


def _of_folder(dataset: PackedDataset, *, number: int, seed: int) -> tuple[list[list[int]], str]:
    draw = random.Random(seed)
    streams = dataset.streams
    weights = [stream.bucket * stream.num_samples for stream in streams]
    chosen = sorted(
        set(draw.choices(range(len(streams)), weights, k=number * 4)), key=lambda place: streams[place].source
    )
    shares = {
        place: max(1, round(number * weights[place] / sum(weights[other] for other in chosen))) for place in chosen
    }
    rows: list[list[int]] = []
    for place, share in shares.items():
        stream = streams[place]
        for index in draw.sample(range(stream.num_samples), min(share, stream.num_samples)):
            rows.append(dataset.sample(SampleId(stream.source, stream.bucket, index)).tokens.tolist())
    draw.shuffle(rows)
    return rows[:number], f"{', '.join(path.name for path in dataset.paths)} ({', '.join(dataset.sources)})"


def _of_rows(path: Path, *, model: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def parse(row: dict[str, Any]) -> list[int]:
        if isinstance(row.get("messages"), list):
            try:
                chat = Chat(tokenizer, load_chat_template(OF_TOKENIZER, tokenizer))
                return [int(token) for token in chat.conversation(parse_messages(row["messages"])).ids]
            except BadConversation as problem:
                raise BadRow(str(problem)) from None
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise BadRow('must be {"text": ...} or {"messages": [...]}')
        return [*begin, *tokenizer.encode(row["text"]).tolist()]

    return [row.value for row in read_rows(path, option="--calibration", parse=parse)]
