"""`data show`: packed samples as text, with the borders of their documents and what the loss leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.text import Text

from megatron_xy.data.dataset import PackedDataset, Sample
from megatron_xy.data.draws.sampler import SampleId, Stream
from megatron_xy.data.encoding.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.data.manifest import read_manifest
from megatron_xy.errors import ConfigError

PIECE_STYLES = ("green", "cyan")  # in turn
BAR = " ┃ "
MASKED_STYLE = "reverse"  # the last token of a text's piece: it has no next token to learn
PROMPT_STYLE = "dim"  # what is not learned of a conversation
# Of C0 and C1, what would ring, move or paint in a terminal: rich leaves some of them in, ESC among them.
CONTROL_CHARACTERS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})

Run = tuple[str, bool]


@dataclass(frozen=True)
class ShownSample:
    """A sample's heading and the text of its pieces in runs, each with whether it is learned.

    A token of a conversation is learned where the loss asks for it; one of a text, where it asks for the next one.
    """

    heading: str
    pieces: list[list[Run]]
    is_conversation: bool

    @property
    def plain(self) -> str:
        """The text as it was decoded, control characters included, with bars between pieces."""
        return BAR.join("".join(text for text, _ in piece) for piece in self.pieces)

    @property
    def learned(self) -> list[list[str]]:
        """The texts that are learned of each piece."""
        return [[text for text, is_learned in piece if is_learned] for piece in self.pieces]

    @property
    def coloured(self) -> Text:
        """For a terminal, without control characters: a colour a piece, bars between; what is not learned dim or, of
        texts, reversed."""
        text = Text()
        left_out = PROMPT_STYLE if self.is_conversation else MASKED_STYLE
        for number, piece in enumerate(self.pieces):
            style = PIECE_STYLES[number % len(PIECE_STYLES)]
            text.append(BAR if number else "", style="bold red")
            for run, is_learned in piece:
                text.append(run.translate(CONTROL_CHARACTERS), style=style if is_learned else f"{style} {left_out}")
        return text


def shown_samples(
    directory: Path, *, source: str | None, bucket: int | None, index: int, count: int
) -> Iterator[ShownSample]:
    """`count` samples from number `index` on, of each chosen source and bucket.

    Raises ConfigError where there is no such source, bucket or sample.
    """
    dataset = PackedDataset([directory])
    tokenizer = load_tokenizer(directory / read_manifest(directory).tokenizer.file)
    for stream in _chosen(dataset, source=source, bucket=bucket):
        if index >= stream.num_samples:
            raise ConfigError(
                f"--index ({index}): source {stream.source} has {stream.num_samples} sample(s) in bucket "
                f"{stream.bucket}; give a smaller one"
            )
        for number in range(index, min(index + count, stream.num_samples)):
            sample = dataset.sample(SampleId(stream.source, stream.bucket, number))
            padding = stream.bucket - len(sample.tokens)
            heading = (
                f"source {stream.source}, bucket {stream.bucket}, sample {number}: "
                f"{len(sample.piece_lengths)} piece(s), {len(sample.tokens)} tokens, {padding} padding"
            )
            if sample.learned is not None:
                heading += f", {int(sample.learned.sum())} learned"
            yield ShownSample(heading, _decoded(sample, tokenizer), is_conversation=sample.learned is not None)


def _decoded(sample: Sample, tokenizer: Tokenizer) -> list[list[Run]]:
    """The runs of each piece."""
    ends = np.cumsum(sample.piece_lengths)
    marks = sample.learned
    if marks is None:
        marks = np.ones(len(sample.tokens), dtype=np.bool_)
        marks[ends - 1] = False
    pieces = zip(np.split(sample.tokens, ends[:-1]), np.split(marks, ends[:-1]), strict=True)
    return [tokenizer.decode_runs(tokens, of_piece) for tokens, of_piece in pieces]


def _chosen(dataset: PackedDataset, *, source: str | None, bucket: int | None) -> list[Stream]:
    chosen = [
        stream
        for stream in dataset.streams
        if source in (None, stream.source) and bucket in (None, stream.bucket) and stream.num_samples
    ]
    if not chosen:
        raise ConfigError(
            f"no samples of source {source or 'any'} in bucket {bucket or 'any'}; "
            f"there are sources {', '.join(dataset.sources)} and buckets {', '.join(map(str, dataset.buckets))}"
        )
    return chosen
