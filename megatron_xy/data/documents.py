"""Corpus files -> documents, in a fixed order: .jsonl and .jsonl.gz (a document a line), .txt (a document a file).

A file is scanned once for its checksum and cut at line borders into parts of bounded size; each part can then be
read by itself, anywhere, with true line numbers. The cut depends on the file's bytes alone.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_xy.data.manifest import is_source_name
from megatron_xy.errors import ConfigError, DataError

BadLinePolicy = Literal["fail", "skip"]

SUPPORTED = (".jsonl", ".jsonl.gz", ".txt")
DEFAULT_SOURCE = "default"
NUM_BAD_LINES_SHOWN = 20
SCAN_BLOCK = 8 * 1024 * 1024  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    """One text and where it stands; `line` counts from 1."""

    text: str
    source: str
    path: str
    line: int


@dataclass(frozen=True)
class Part:
    """Bytes start..stop of a corpus file, whole lines from line `first_line` on. A .gz or .txt file is one part."""

    path: str
    start: int
    stop: int
    first_line: int


@dataclass(frozen=True)
class ScannedFile:
    """A corpus file with its size in bytes, its checksum and its parts in order."""

    path: str
    size: int
    sha256: str
    parts: list[Part]


@dataclass
class LineReport:
    """What reading left out: counts, and the first bad lines as `FILE:LINE: reason`."""

    skipped_empty: int = 0
    bad_lines: int = 0
    shown: list[str] = field(default_factory=list)

    def bad(self, path: str, line: int, reason: str) -> None:
        """Note one bad line."""
        self.bad_lines += 1
        if len(self.shown) < NUM_BAD_LINES_SHOWN:
            self.shown.append(f"{path}:{line}: {reason}")

    def add(self, other: LineReport) -> None:
        """Take in the report of a later part."""
        self.skipped_empty += other.skipped_empty
        self.bad_lines += other.bad_lines
        self.shown = (self.shown + other.shown)[:NUM_BAD_LINES_SHOWN]

    def raise_if_bad(self) -> None:
        """DataError with the first bad lines and their number, if there is one."""
        if self.bad_lines:
            more = self.bad_lines - len(self.shown)
            lines = self.shown + ([f"... and {more} more"] if more else [])
            raise DataError(
                "\n".join(lines) + f"\n{self.bad_lines} bad line(s); mend them, or leave them out with bad_lines = skip"
            )


def find_inputs(inputs: Sequence[Path | str]) -> list[Path]:
    """The corpus files that `inputs` (files, folders, globs) name: in the order given, sorted within each.

    Hidden files of a folder are passed over. Raises ConfigError: missing, nothing matches, a kind that is not
    supported, a file named twice.
    """
    files: list[Path] = []
    for given in inputs:
        files += _expand(str(given))
    refused = [str(file) for file in files if not file.name.endswith(SUPPORTED)]
    if refused:
        raise ConfigError(
            f"input ({', '.join(refused[:5])}{', ...' if len(refused) > 5 else ''}): only {', '.join(SUPPORTED)} "
            "can be read; convert them, or leave them out with a glob such as DIR/*.jsonl"
        )
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise ConfigError(f"input ({file}) is named twice; name each file once")
        seen.add(file.resolve())
    if not files:
        raise ConfigError("input names no file; give files, folders or globs")
    return files


def scan_file(path: Path, *, part_bytes: int, advance: Callable[[int], None] = lambda size: None) -> ScannedFile:
    """Checksum and parts of one corpus file, in one pass; parts of a .jsonl have about `part_bytes` bytes.

    `advance` is told how many bytes were read since the last call.
    """
    digest, parts, size, lines = hashlib.sha256(), list[Part](), 0, 0
    divisible = path.name.endswith(".jsonl")
    start, first_line = 0, 1
    with path.open("rb") as stream:
        while block := stream.read(min(SCAN_BLOCK, part_bytes)):
            if divisible and size + len(block) - start >= part_bytes and not block.endswith(b"\n"):
                block += stream.readline()
            digest.update(block)
            size += len(block)
            lines += block.count(b"\n")
            if divisible and size - start >= part_bytes:
                parts.append(Part(str(path), start, size, first_line))
                start, first_line = size, lines + 1
            advance(len(block))
    if size > start or not parts:
        parts.append(Part(str(path), start, size, first_line))
    return ScannedFile(str(path), size, digest.hexdigest(), parts)


def read_documents(
    inputs: Sequence[Path | str],
    *,
    text_field: str = "text",
    source_field: str | None = None,
    bad_lines: BadLinePolicy = "fail",
) -> Iterator[Document]:
    """All documents of `inputs` in order. Raises DataError at the end of a file that has bad lines, under "fail"."""
    for path in find_inputs(inputs):
        report = LineReport()
        whole = Part(str(path), 0, path.stat().st_size, 1)
        yield from read_part(whole, text_field=text_field, source_field=source_field, report=report)
        if bad_lines == "fail":
            report.raise_if_bad()


def read_part(
    part: Part,
    *,
    text_field: str,
    source_field: str | None,
    report: LineReport,
    advance: Callable[[int], None] = lambda size: None,
) -> Iterator[Document]:
    """The documents of one part; empty texts and bad lines go into `report`. Memory: one line, or one .txt file.

    `advance` is told how many bytes of the file were used up since the last call. Raises DataError where the file
    itself is damaged (a cut or broken .gz, a file that changed since it was scanned).
    """
    if part.path.endswith(".txt"):
        yield from _read_text_file(part, report)
        advance(part.stop - part.start)
        return
    for line, raw in _lines(part, advance):
        if not raw.strip():
            continue
        try:
            text, source = _parse(raw, text_field=text_field, source_field=source_field)
        except _BadLine as error:
            report.bad(part.path, line, str(error))
            continue
        if text:
            yield Document(text, source, part.path, line)
        else:
            report.skipped_empty += 1


class _BadLine(Exception):
    """Why a line is no document."""


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in below if not any(name.startswith(".") for name in file.relative_to(path).parts)]
        if not files:
            raise ConfigError(f"input ({given}): the folder holds no file")
        return files
    if glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
        files = [file for match in matches if (file := Path(match)).is_file()]
        if not files:
            raise ConfigError(f"input ({given}): no file matches")
        return files
    raise ConfigError(f"input ({given}) does not exist; give files, folders or globs")


def _lines(part: Part, advance: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of every line of a .jsonl or .jsonl.gz part."""
    zipped = part.path.endswith(".gz")
    line, told = part.first_line, part.start
    with Path(part.path).open("rb") as stream:
        stream.seek(part.start)
        position = part.start
        lines = gzip.GzipFile(fileobj=stream) if zipped else stream
        try:
            while zipped or position < part.stop:
                raw = lines.readline()
                if not raw:
                    break
                position = stream.tell() if zipped else position + len(raw)
                yield line, raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
                line += 1
                if position - told >= 65536:
                    advance(position - told)
                    told = position
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{part.path}: damaged after line {line - 1}: {error}; copy it again") from error
    if not zipped and position != part.stop:
        raise DataError(f"{part.path} changed while it was read; leave the corpus alone and run again")
    advance(part.stop - told)


def _parse(raw: bytes, *, text_field: str, source_field: str | None) -> tuple[str, str]:
    """(text, source) of one line of JSON. Raises _BadLine."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine(f"invalid UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise _BadLine("JSON is nested too deeply") from error
    except ValueError as error:
        raise _BadLine(f"invalid JSON: {error}") from error
    if not isinstance(row, dict):
        raise _BadLine(f"a JSON object is wanted, not {_json_type(row)}")
    text = _string(row, text_field)
    if source_field is None:
        return text, DEFAULT_SOURCE
    source = _string(row, source_field)
    if not is_source_name(source):
        raise _BadLine(f"source {source[:100]!r} cannot name a folder: 1 to 100 of A-Z a-z 0-9 . _ -, no dot in front")
    return text, source


def _string(row: dict[str, Any], name: str) -> str:
    """The string in field `name`. Raises _BadLine."""
    if name not in row:
        raise _BadLine(f"no field {name!r}")
    value = row[name]
    if not isinstance(value, str):
        raise _BadLine(f"field {name!r} is {_json_type(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadLine(f"field {name!r} has a lone surrogate at character {error.start}") from error
    return value


def _json_type(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _read_text_file(part: Part, report: LineReport) -> Iterator[Document]:
    raw = Path(part.path).read_bytes().removeprefix(BYTE_ORDER_MARK)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        report.bad(part.path, raw.count(b"\n", 0, error.start) + 1, "invalid UTF-8")
        return
    if text:
        yield Document(text, DEFAULT_SOURCE, part.path, 1)
    else:
        report.skipped_empty += 1
