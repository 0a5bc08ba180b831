"""What a build is asked for: what becomes of the documents, and which share of the work one call does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from megatron_xy.data.chat.encode import ChatOverflow
from megatron_xy.data.corpus.documents import BadLinePolicy
from megatron_xy.data.corpus.row_contents import DEFAULT_SOURCE
from megatron_xy.data.manifest import RESERVED_NAMES, SOURCE_RULE, is_source_name
from megatron_xy.data.packing.pack import Overflow, Packing, check_buckets, check_policy
from megatron_xy.errors import ConfigError, UsageError

DEFAULT_BUCKETS = (2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class BuildOptions:
    """What becomes of the documents of a corpus. Raises UsageError (buckets, source), ConfigError (what else is wrong
    whatever the corpus and the tokenizer are)."""

    buckets: Sequence[int] = DEFAULT_BUCKETS
    source: str = DEFAULT_SOURCE  # of documents of which no field tells it
    source_field: str | None = None
    source_optional: bool = False  # a row without the source field is of `source`, and no bad line
    text_field: str = "text"
    append_eod: bool = False  # end every text with the end-of-document token; token inputs refuse it
    bad_lines: BadLinePolicy = "limit"  # all that are left out are counted and listed in OUTPUT/bad_lines.txt
    packing: Packing = "best_fit"
    overflow: Overflow = "split"
    deduplicate: bool = False  # of documents with the same text, over all inputs, the first one stays
    held_out: float = 0.0  # so much of the documents, by the hash of their text, becomes a data folder OUTPUT/held_out
    chat_template: str | None = None  # renders rows that hold conversations; None: such rows are no documents
    chat_overflow: ChatOverflow = "refuse"
    last_turn_only: bool = False  # of a conversation only the last answer is learned

    def __post_init__(self) -> None:
        if not is_source_name(self.source):
            taken = ", ".join(sorted(RESERVED_NAMES))
            raise UsageError(f"source ({self.source[:100]}) must be {SOURCE_RULE}, and none of {taken}")
        check_policy(self.packing, self.overflow, buckets=check_buckets(self.buckets))
        if self.chat_overflow not in get_args(ChatOverflow):
            raise ConfigError(
                f"chat_overflow ({self.chat_overflow}) must be one of {', '.join(get_args(ChatOverflow))}"
            )
        if self.chat_template is not None and self.packing == "concatenate":
            raise ConfigError("packing (concatenate) cuts documents anywhere; conversations need best_fit")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out ({self.held_out}) must be a fraction from 0 to below 1, such as 0.01")


@dataclass(frozen=True)
class Share:
    """One of `count` shares of the work of tokenising, numbered from 0."""

    index: int
    count: int

    @staticmethod
    def parse(text: str) -> Share:
        """I/N with I from 0 to N - 1, or from 1 to N: either way of counting covers all shares. Raises UsageError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(count) >= 1 and int(index) <= int(count)):
            raise UsageError(f"--shard ({text}) must be I/N, such as 0/8 to 7/8")
        return Share(int(index) % int(count), int(count))
