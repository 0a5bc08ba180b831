"""`data show`: packed samples as text, with the borders of their documents and what the loss leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from megatron_xy.data.dataset import PackedDataset, Sample
from megatron_xy.data.manifest import read_manifest
from megatron_xy.data.sampler import SampleId, Stream
from megatron_xy.data.tokenizer import Tokenizer, load_tokenizer
from megatron_xy.errors import ConfigError

PIECE_STYLES = ("green", "cyan")  # in turn
MASKED_STYLE = "reverse"  # the last token of a piece: it has no next token to learn


def shown_samples(
    directory: Path, *, source: str | None, bucket: int | None, index: int, count: int
) -> Iterator[tuple[str, Text]]:
    """(heading, coloured text) of `count` samples from number `index` on, of each chosen source and bucket.

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
            yield heading, coloured(sample, tokenizer)


def coloured(sample: Sample, tokenizer: Tokenizer) -> Text:
    """The sample's text: a colour a piece, a bar between pieces, the masked last token of each piece reversed."""
    text = Text()
    start = 0
    for number, length in enumerate(sample.piece_lengths.tolist()):
        tokens = sample.tokens[start : start + length]
        style = PIECE_STYLES[number % len(PIECE_STYLES)]
        learnt = tokenizer.decode(tokens[:-1])
        whole = tokenizer.decode(tokens)
        text.append(learnt, style=style)
        # What the last token adds; an end token adds no text of its own.
        text.append(whole.removeprefix(learnt) or "</s>", style=f"{style} {MASKED_STYLE}")
        text.append(" ┃ " if start + length < len(sample.tokens) else "", style="bold red")
        start += length
    return text


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
