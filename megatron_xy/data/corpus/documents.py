"""Parts of corpus files -> documents: jsonl, plain or compressed (one a line), txt (one a file), Parquet (one a row).

Each part (inputs.py cuts them) can be read by itself, anywhere, with true line numbers; what is no document is counted
and listed in a report. A document is a text or, in jsonl, a conversation.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from megatron_xy.data.chat.conversations import Conversation
from megatron_xy.data.corpus.compressed import COMPRESSED, numbered_lines
from megatron_xy.data.corpus.row_contents import BadLine, Contents, RowFields, RowOrBad, checked, parse
from megatron_xy.data.corpus.selection import EVERY_DOCUMENT, Duplicates, Selection, is_held_out
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.rows_files import BYTE_ORDER_MARK, FILES_OF_ROWS

# What bad lines lead to. limit: they are left out, and an error where more than BAD_LINES_LIMIT of all lines are bad;
# fail: an error at the end of the file that has one; skip: they are left out, however many.
BadLinePolicy = Literal["limit", "fail", "skip"]

JSON_LINES = FILES_OF_ROWS

BAD_LINES_LIMIT = 0.001
MOST_BAD_LINES_LISTED = 10_000  # of a part (8 MB) each; more are counted only
READ_BUFFER = 128 * 1024  # bytes


class Document(NamedTuple):
    """One text and where it stands; `line` counts from 1, `file` is the number of the input, from 0.

    Of a conversation, `text` is what stands for it where texts are hashed.
    """

    text: str
    source: str
    path: str
    line: int
    file: int = 0
    conversation: Conversation | None = None


@dataclass(frozen=True)
class Part:
    """Bytes start..stop of a corpus file, whole lines from line `first_line` on. A compressed or .txt file is one part.

    In Parquet a row counts as a line, and the bytes are those of row groups; in Megatron's format documents and .bin.
    """

    path: str
    start: int
    stop: int
    first_line: int
    file: int = 0  # number of the input, from 0
    selection: Selection = EVERY_DOCUMENT
    stamp: tuple[int, ...] = ()  # `file_stamp` of the file when it was scanned; (): not known


@dataclass(frozen=True)
class ScannedFile:
    """A corpus file with its size in bytes, its checksum, its parts in order, and at most how many lines it has."""

    path: str
    size: int
    sha256: str
    parts: list[Part]
    most_lines: int | None  # None: not known before it is read


@dataclass
class LineReport:
    """What reading left out: counts, and the bad lines as `FILE:LINE: reason`, in order."""

    lines: int = 0  # with content, good and bad
    skipped_empty: int = 0
    duplicates: int = 0
    held_out: int = 0  # left for the held-out data
    bad_lines: int = 0
    listed: list[str] = field(default_factory=list)

    def bad(self, path: str, line: int, reason: str) -> None:
        """Note one bad line."""
        self.bad_lines += 1
        if len(self.listed) < MOST_BAD_LINES_LISTED:
            self.listed.append(f"{path}:{line}: {reason}")

    def add(self, other: LineReport) -> None:
        """Take in the report of a later part."""
        self.lines += other.lines
        self.skipped_empty += other.skipped_empty
        self.duplicates += other.duplicates
        self.held_out += other.held_out
        self.bad_lines += other.bad_lines
        self.listed = (self.listed + other.listed)[:MOST_BAD_LINES_LISTED]

    def raise_if_bad(self, *, remedy: str = "mend them, or leave them out with `data build --bad-lines skip`") -> None:
        """DataError with the bad lines, their number and the remedy, if there is one."""
        if self.bad_lines:
            raise DataError(f"{self._list()}\n{self.bad_lines} bad line(s); {remedy}")

    def raise_if_too_bad(self, *, most_lines: int | None = None) -> None:
        """DataError with the bad lines where they are more than BAD_LINES_LIMIT of `most_lines`, or else of all read.

        With `most_lines` (at most so many lines are there in all) it can be told before all are read.
        """
        lines = self.lines if most_lines is None else most_lines
        if self.bad_lines > BAD_LINES_LIMIT * lines:
            raise DataError(
                f"{self._list()}\n{self.bad_lines} bad line(s) of at most {lines}, more than {BAD_LINES_LIMIT:.1%}; "
                "mend them, name the right fields, or leave them out with `data build --bad-lines skip`"
            )

    def _list(self) -> str:
        more = self.bad_lines - len(self.listed)
        return "\n".join(self.listed + ([f"... and {more} more"] if more else []))


def read_part(
    part: Part,
    fields: RowFields,
    *,
    report: LineReport,
    advance: Callable[[int], None] = lambda size: None,
) -> Iterator[Document]:
    """The documents of one part; empty texts and bad lines go into `report`. Memory: one line, or one .txt file.

    `advance` is told how many bytes of the file were used up since the last call. Raises DataError where the file
    itself is damaged (cut or broken), changed since it was scanned, or has not the columns (Parquet).
    """
    if part.path.endswith(".txt"):
        rows = _read_text_file(part, fields.default_source)
    elif part.path.endswith(".parquet"):
        rows = _read_row_groups(part, fields._replace(conversations=False))
    else:
        rows = _read_lines(part, advance, fields)
    duplicates, takes_all = _duplicates(part), part.selection == EVERY_DOCUMENT
    with reading_unchanged(part):
        for line, row in rows:
            report.lines += 1
            if isinstance(row, BadLine):
                report.bad(part.path, line, str(row))
            elif not row.text:
                report.skipped_empty += 1
            elif takes_all or _takes(part.selection, row.text, line, duplicates=duplicates, report=report):
                yield Document(row.text, row.source, part.path, line, part.file, row.conversation)
    if not part.path.endswith(JSON_LINES):
        advance(part.stop - part.start)


def file_stamp(path: Path) -> tuple[int, ...]:
    """What tells that an input was written to: size and time of change, of both files of a Megatron dataset.

    Raises DataError where it is gone.
    """
    try:
        found = [file.stat() for file in ((path, path.with_suffix(".idx")) if path.suffix == ".bin" else (path,))]
    except FileNotFoundError as error:
        raise changed(path) from error
    return tuple(number for each in found for number in (each.st_size, each.st_mtime_ns))


@contextmanager
def reading_unchanged(part: Part) -> Iterator[None]:
    """Around a block that reads a part. Raises DataError where the file is not, or no longer, as it was scanned."""
    path = Path(part.path)

    def check() -> None:
        if part.stamp and file_stamp(path) != part.stamp:
            raise changed(path)

    check()
    try:
        yield
    except Exception:
        check()  # the reason of what went wrong
        raise
    check()


def changed(path: Path | str) -> DataError:
    """For an input that is not what was scanned."""
    return DataError(f"{path} changed while it was read; leave the corpus alone and run again")


def parquet_reader() -> ModuleType:
    """The reader of Parquet files; imported here because pyarrow is an extra."""
    try:
        return importlib.import_module("megatron_xy.data.corpus.parquet")
    except ModuleNotFoundError as error:
        raise ConfigError(f"input: .parquet needs {error.name}; pip install 'megatron-xy[parquet]'") from error


def _duplicates(part: Part) -> Duplicates | None:
    if part.selection.duplicates is None:
        return None
    # A line of plain text has a byte at least; compressed files are one part.
    most_lines = part.stop - part.start if part.path.endswith(".jsonl") else None
    folder = Path(part.selection.duplicates)
    return Duplicates(folder, file=part.file, first_line=part.first_line, most_lines=most_lines)


def _takes(selection: Selection, text: str, line: int, *, duplicates: Duplicates | None, report: LineReport) -> bool:
    """Whether a document is taken; why not is counted."""
    duplicate = duplicates is not None and duplicates.has(line)
    fraction = selection.held_out_fraction
    if fraction and is_held_out(text, fraction=fraction) != selection.held_out:
        report.held_out += not (duplicate or selection.held_out)
        return False
    report.duplicates += duplicate
    return not duplicate


def _read_row_groups(part: Part, fields: RowFields) -> Iterator[tuple[int, RowOrBad]]:
    """(row number, its contents) of the row groups of a part."""
    parquet, path = parquet_reader(), Path(part.path)
    stop, line, chosen = 0, 1, []
    for index, (rows, group_bytes) in enumerate(parquet.row_groups(path)):
        if part.first_line <= line and stop < part.stop:
            chosen.append(index)
        stop, line = stop + group_bytes, line + rows
    names = [fields.text] if fields.source is None else [fields.text, fields.source]
    for line, values in enumerate(parquet.read_rows(path, columns=names, groups=chosen), start=part.first_line):
        try:
            yield line, checked(dict(zip(names, values, strict=True)), fields)
        except BadLine as error:
            yield line, error


def _read_lines(part: Part, advance: Callable[[int], None], fields: RowFields) -> Iterator[tuple[int, RowOrBad]]:
    """(line number, its contents) of every line that has some, of a jsonl file, plain or compressed."""
    is_plain = not part.path.endswith(COMPRESSED)
    position = told = part.start
    with io.BufferedReader(Path(part.path).open("rb", buffering=0), READ_BUFFER) as stream:
        stream.seek(part.start)
        for line, raw in numbered_lines(Path(part.path), stream, first_line=part.first_line):
            position = position + len(raw) if is_plain else stream.tell()
            if line == 1:
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            if raw and not raw.isspace():
                try:
                    yield line, parse(raw, fields)
                except BadLine as error:
                    yield line, error
            if position - told >= 65536:
                advance(position - told)
                told = position
            if is_plain and position >= part.stop:
                break
    if is_plain and position != part.stop:
        raise changed(part.path)
    advance(part.stop - told)


def _read_text_file(part: Part, source: str) -> Iterator[tuple[int, RowOrBad]]:
    raw = Path(part.path).read_bytes().removeprefix(BYTE_ORDER_MARK)
    try:
        yield 1, Contents(raw.decode("utf-8"), source)
    except UnicodeDecodeError as error:
        yield raw.count(b"\n", 0, error.start) + 1, BadLine("invalid UTF-8")
