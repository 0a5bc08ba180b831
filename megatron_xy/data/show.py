"""`data show`: packed samples as text, with the borders of their documents and what the loss leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from megatron_xy.data.dataset import PackedDataset, Sample
from megatron_xy.data.manifest import read_manifest
from megatron_xy.data.sampler import SampleId, Stream
from megatron_xy.data.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.errors import ConfigError

PIECE_STYLES = ("green", "cyan")  # in turn
BAR = " ┃ "
MASKED_STYLE = "reverse"  # the last token of a piece: it has no next token to learn


@dataclass(frozen=True)
class ShownSample:
    """A sample's heading and the text of its pieces: what is learnt of each, and its last token, which is not."""

    heading: str
    pieces: list[tuple[str, str]]

    @property
    def plain(self) -> str:
        """The text as it was decoded, control characters included, with bars between pieces."""
        return BAR.join(learnt + masked for learnt, masked in self.pieces)

    @property
    def coloured(self) -> Text:
        """For a terminal, without control characters: a colour a piece, bars between, the masked tokens reversed."""
        text = Text()
        for number, (learnt, masked) in enumerate(self.pieces):
            style = PIECE_STYLES[number % len(PIECE_STYLES)]
            text.append(BAR if number else "", style="bold red")
            text.append(learnt, style=style)
            text.append(masked, style=f"{style} {MASKED_STYLE}")
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
                f"{stream.bucket}"
            )
        for number in range(index, min(index + count, stream.num_samples)):
            sample = dataset.sample(SampleId(stream.source, stream.bucket, number))
            padding = stream.bucket - len(sample.tokens)
            heading = (
                f"source {stream.source}, bucket {stream.bucket}, sample {number}: "
                f"{len(sample.piece_lengths)} piece(s), {len(sample.tokens)} tokens, {padding} padding"
            )
            yield ShownSample(heading, _decoded(sample, tokenizer))


def _decoded(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(text of all tokens but the last, what the last one adds) of each piece."""
    pieces = []
    start = 0
    for length in sample.piece_lengths.tolist():
        tokens = sample.tokens[start : start + length]
        learnt, whole = tokenizer.decode(tokens[:-1]), tokenizer.decode(tokens)
        # An end token adds no text of its own.
        pieces.append((learnt, whole.removeprefix(learnt) or "</s>"))
        start += length
    return pieces


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
