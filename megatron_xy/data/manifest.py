"""The manifest of a data folder: what `data build` wrote, as typed models read from and written to manifest.json.

It is written last: a folder without one holds no finished data set. Neither torch nor any tokenizer is imported.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import file_sha256, write_text

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Literal[1] = 1
SOURCE_PATTERN = r"[\w-][\w.-]{0,99}"  # Python's \w: letters and digits of any script, and _
SOURCE_BYTES = 200  # with what is put around it, a file's name may have 255
SOURCE_RULE = f"1 to 100 letters, digits and . _ -, no dot in front, in NFC, {SOURCE_BYTES} bytes of UTF-8 at most"
BAD_LINES_NAME = "bad_lines.txt"
HELD_OUT_NAME = "held_out"
RESERVED_NAMES = frozenset(
    {MANIFEST_NAME, BAD_LINES_NAME, "tokenizer.model", "tokenizer.json", "tokenizer_config.json", HELD_OUT_NAME}
)


class Entry(BaseModel):
    """Base of everything in a manifest: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Entry):
    """A further file of the data folder, by its name in it."""

    name: str
    size: int = Field(ge=1, description="bytes")
    sha256: str


class ShardEntry(Entry):
    """One .bin/.idx pair; `name` is its prefix relative to the data folder."""

    model_config = ConfigDict(regex_engine="python-re")

    name: str = Field(pattern=rf"\A{SOURCE_PATTERN}/bucket_[0-9]{{5,}}/shard_[0-9]{{5,}}\Z")
    samples: int = Field(ge=1)
    tokens: int = Field(ge=1)
    bin_bytes: int = Field(ge=1)
    idx_bytes: int = Field(ge=1)
    bin_sha256: str
    idx_sha256: str
    trace: FileEntry | None = Field(default=None, description="PREFIX.trace: where each piece comes from")
    mask: FileEntry | None = Field(default=None, description="PREFIX.mask: which tokens are learned; None: all")

    @property
    def pair(self) -> tuple[FileEntry, FileEntry]:
        """PREFIX.bin and PREFIX.idx."""
        return (
            FileEntry(name=f"{self.name}.bin", size=self.bin_bytes, sha256=self.bin_sha256),
            FileEntry(name=f"{self.name}.idx", size=self.idx_bytes, sha256=self.idx_sha256),
        )

    @property
    def files(self) -> list[FileEntry]:
        """All of its files."""
        return [*self.pair, *(entry for entry in (self.trace, self.mask) if entry is not None)]


class BucketEntry(Entry):
    """All samples of one source in one bucket, in the order of its shards."""

    samples: int = Field(ge=1)
    tokens: int = Field(ge=1, description="without padding")
    shards: list[ShardEntry]


class FixedLengthEntry(Entry):
    """What cutting the documents of a source, laid end to end, every so many tokens would give."""

    samples: int
    truncated_documents: int = Field(description="cut into two or more pieces")


class LengthsEntry(Entry):
    """The lengths of a source's documents in tokens: {first of a bin: documents}, {sample length: what it gives}."""

    longest: int
    histogram: dict[str, int]
    fixed_length: dict[str, FixedLengthEntry]

    @property
    def documents(self) -> int:
        """How many documents it covers."""
        return sum(self.histogram.values())


class SourceEntry(Entry):
    """One source; only buckets that hold samples are listed, keyed by their size in tokens."""

    documents: int = Field(ge=1)
    truncated_documents: int = Field(ge=0, description="cut into two or more pieces, or cut short")
    dropped_documents: int = Field(default=0, ge=0, description="longer than the largest bucket, under overflow = drop")
    tokens: int = Field(ge=1)
    tokens_lost: int = Field(default=0, ge=0, description="of dropped documents and of what was cut off")
    tokens_learned: int | None = Field(default=None, description="of conversations; None: texts, all are")
    buckets: dict[str, BucketEntry]
    lengths: LengthsEntry | None = Field(default=None, description="of all its documents, as they came")

    @property
    def samples(self) -> int:
        """Samples of all buckets."""
        return sum(bucket.samples for bucket in self.buckets.values())

    @property
    def packed_length(self) -> int:
        """Tokens of all samples, padding included."""
        return sum(int(size) * bucket.samples for size, bucket in self.buckets.items())


class TokenizerEntry(Entry):
    """The tokenizer the ids belong to; `file` lies in the data folder."""

    file: str
    sha256: str
    vocab_size: int = Field(ge=1)
    bos_id: int | None
    eos_id: int | None
    config: FileEntry | None = Field(default=None, description="tokenizer_config.json, which went with tokenizer.json")


class ChatEntry(Entry):
    """How conversations were taken; `template` is the text of the chat template."""

    name: str
    template: str
    overflow: Literal["refuse", "truncate_left", "split"]
    last_turn_only: bool


class EngineEntry(Entry):
    """What encoded the corpus, and what it was compared with while it did; each name with its version."""

    name: str
    reference: str
    conversion_sha256: str | None = Field(description="of the tokenizer.json that the engine was given")
    checked_documents: int = Field(default=0, ge=0, description="compared with the reference during the build")

    @property
    def is_fast(self) -> bool:
        """Whether another engine than the reference encodes."""
        return self.name != self.reference


class InputEntry(Entry):
    """One corpus file, as it was when it was read."""

    path: str
    size: int = Field(ge=0)
    sha256: str


class Statistics(Entry):
    """Over the whole data set. padding_ratio: padding / all tokens of all samples; truncation_ratio: documents cut /
    documents; concatenation_ratio: documents / samples (arXiv 2407.07495)."""

    documents: int
    tokens: int
    samples: int
    padding_ratio: float
    truncation_ratio: float
    concatenation_ratio: float
    dropped_documents: int = Field(default=0, description="longer than the largest bucket, under overflow = drop")
    tokens_lost: int = Field(default=0, description="of dropped documents and of what was cut off")
    skipped_empty: int = Field(description="documents without a token")
    bad_lines: int = Field(description="lines left out because they are no document")
    duplicates: int = Field(default=0, description="documents left out because their text stands earlier")
    held_out_documents: int = Field(default=0, description="documents left for the held-out data")
    lines: int = Field(default=0, description="lines read, good and bad, without blank ones")


class Manifest(Entry):
    """A whole manifest.json."""

    format_version: Literal[1] = FORMAT_VERSION
    fingerprint: str = Field(description="sha256 over inputs, tokenizer and options: equal means the same result")
    buckets: list[int] = Field(min_length=1)
    append_eod: bool
    text_field: str
    source_field: str | None
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    overflow: Literal["split", "drop", "truncate", "truncate_left"] = "split"
    chat: ChatEntry | None = Field(default=None, description="None: no conversations were taken")
    tokenizer: TokenizerEntry
    engine: EngineEntry | None = Field(default=None, description="what encoded the text; None where none was encoded")
    dtype: Literal["uint16", "int32"]
    inputs: list[InputEntry]
    sources: dict[str, SourceEntry]
    statistics: Statistics
    bad_lines: FileEntry | None = Field(default=None, description="the list of the lines left out, if there are any")

    @property
    def shards(self) -> Iterator[tuple[str, int, ShardEntry]]:
        """(source, bucket, shard) of every shard."""
        for name, source in self.sources.items():
            for size, bucket in source.buckets.items():
                for shard in bucket.shards:
                    yield name, int(size), shard

    @model_validator(mode="after")
    def _sums_agree(self) -> Manifest:
        for name, source in self.sources.items():
            if not is_source_name(name):
                raise ValueError(f"{name!r} is no name of a source")
            shards = [shard for bucket in source.buckets.values() for shard in bucket.shards]
            if any((shard.mask is None) != (source.tokens_learned is None) for shard in shards):
                raise ValueError(f"some shards of source {name} have a mask, and some have none")
            if not set(source.buckets) <= {str(bucket) for bucket in self.buckets}:
                raise ValueError(f"source {name} has buckets {list(source.buckets)} outside {self.buckets}")
            for size, bucket in source.buckets.items():
                counted = sum(shard.samples for shard in bucket.shards), sum(shard.tokens for shard in bucket.shards)
                if counted != (bucket.samples, bucket.tokens):
                    raise ValueError(f"the shards of source {name}, bucket {size} do not add up")
            if sum(bucket.tokens for bucket in source.buckets.values()) != source.tokens:
                raise ValueError(f"the tokens of source {name} do not add up")
            if source.lengths is not None and source.lengths.documents != source.documents + source.dropped_documents:
                raise ValueError(f"the documents of source {name} do not add up")
        for count in ("documents", "samples", "tokens"):
            if sum(getattr(source, count) for source in self.sources.values()) != getattr(self.statistics, count):
                raise ValueError(f"the {count} of the sources do not add up")
        return self


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a data folder. Raises ConfigError (no such folder) or DataError (none in it, or a broken one)."""
    if not directory.is_dir():
        why = "is a file, no folder" if directory.exists() else "is not there"
        raise ConfigError(f"{directory} {why}; name a folder that `data build` wrote")
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{directory} holds no {MANIFEST_NAME}: not a data folder, or a build that has not finished; run `data "
            f"build` to its end"
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DataError(f"{path} is damaged or of another version: {where}: {first['msg']}; build it again") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json whole or not at all. Raises StorageError."""
    write_text(directory / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")


def is_source_name(name: str) -> bool:
    """Whether a source may carry this name: it becomes a folder beside the manifest and the tokenizer."""
    is_name = re.fullmatch(SOURCE_PATTERN, name) is not None and name not in RESERVED_NAMES
    return is_name and len(name.encode()) <= SOURCE_BYTES and unicodedata.is_normalized("NFC", name)


def file_entry(path: Path, *, name: str) -> FileEntry:
    """The entry under `name` of a file, which is read for it."""
    return FileEntry(name=name, size=path.stat().st_size, sha256=file_sha256(path))


def bucket_folder(bucket: int) -> str:
    """bucket_02048"""
    return f"bucket_{bucket:05d}"
