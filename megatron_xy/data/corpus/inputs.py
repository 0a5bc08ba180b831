"""Input arguments -> corpus files in a fixed order, their checksums, and the parts that can be read apart.

A file is scanned once for its checksum and cut at line borders into parts of bounded size. The cut depends on the
file's bytes alone.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_xy.data.corpus.documents import (
    Document,
    LineReport,
    Part,
    ScannedFile,
    file_stamp,
    parquet_reader,
    read_part,
    reading_unchanged,
)
from megatron_xy.data.corpus.row_contents import RowFields
from megatron_xy.data.indexed import IndexedReader, bin_path, idx_path
from megatron_xy.errors import ConfigError

SUPPORTED = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet", ".bin")
PART_BYTES = 8 * 1024 * 1024
MOST_SHARDS = 10_000  # beyond 80 GB of text the parts grow instead
SCAN_BLOCK = 1024 * 1024  # bytes: they stay in the processor's cache while they are looked at


def find_inputs(inputs: Sequence[Path | str]) -> list[Path]:
    """The corpus files that `inputs` (files, folders, globs) name: in the order given, sorted within each.

    A Megatron dataset may be named by its prefix or either file; it is listed as its .bin. Hidden files of a folder are
    passed over, links are followed. Raises ConfigError: missing, nothing matches, a link to nothing or in a circle, a
    kind that is not supported, a file named twice, a name that is not UTF-8.
    """
    files: list[Path] = []
    for given in inputs:
        files += _join_pairs(_expand(str(given)))
    if strange := [ascii(str(file)) for file in files if not _is_utf8(file)]:
        raise ConfigError(
            f"input ({', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}): the manifest lists files by name, "
            "in UTF-8; rename them, or the folder that they are in"
        )
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


def is_prefix(path: Path | str) -> bool:
    """Whether an input is Megatron's .bin (with its .idx beside it), which holds tokens instead of text."""
    return str(path).endswith(".bin")


def input_size(path: Path) -> int:
    """Bytes of one input, for a Megatron dataset those of both files."""
    return path.stat().st_size + (idx_path(path.with_suffix("")).stat().st_size if is_prefix(path) else 0)


def scan_file(
    path: Path, *, part_bytes: int, file: int = 0, advance: Callable[[int], None] = lambda size: None
) -> ScannedFile:
    """Checksum and parts of one corpus file, in one pass; parts have about `part_bytes` bytes where it can be cut.

    `advance` is told how many bytes were read since the last call. Raises DataError where a Parquet file or a Megatron
    index is damaged, or the file changed meanwhile.
    """
    stamp = file_stamp(path)
    with reading_unchanged(Part(str(path), 0, 0, 1, stamp=stamp)):
        scanned = _scan(path, part_bytes=part_bytes, file=file, advance=advance)
    return replace(scanned, parts=[replace(part, stamp=stamp) for part in scanned.parts])


def part_bytes_for(total_bytes: int) -> int:
    """How many bytes a part has in a corpus of `total_bytes`."""
    return max(PART_BYTES, total_bytes // MOST_SHARDS)


def group_parts(files: Sequence[ScannedFile], *, part_bytes: int) -> list[tuple[Part, ...]]:
    """All parts in order, small neighbours together until they have `part_bytes`: what becomes one token shard each.

    Texts and Megatron datasets never come together.
    """
    groups: list[tuple[Part, ...]] = []
    for _, run in itertools.groupby(files, key=lambda file: is_prefix(file.path)):
        group, size = list[Part](), 0
        for part in (part for file in run for part in file.parts):
            group.append(part)
            size += part.stop - part.start
            if size >= part_bytes:
                groups.append(tuple(group))
                group, size = [], 0
        groups += [tuple(group)] if group else []
    return groups


def find_texts(inputs: Sequence[Path | str]) -> list[Path]:
    """As `find_inputs`. Raises ConfigError for Megatron's .bin/.idx, which hold no text."""
    files = find_inputs(inputs)
    for path in files:
        if is_prefix(path):
            raise ConfigError(f"input ({path}) holds tokens, not text; name text files here")
    return files


def read_documents(
    inputs: Sequence[Path | str],
    *,
    text_field: str = "text",
    source_field: str | None = None,
) -> Iterator[Document]:
    """All documents of `inputs` in order. Raises DataError in the end where too many lines are bad; ConfigError for
    Megatron's .bin/.idx, which hold no text.
    """
    total = LineReport()
    for path in find_texts(inputs):
        whole = Part(str(path), 0, path.stat().st_size, 1, stamp=file_stamp(path))
        yield from read_part(whole, RowFields(text_field, source_field), report=total)
    total.raise_if_too_bad()


def _scan(path: Path, *, part_bytes: int, file: int, advance: Callable[[int], None]) -> ScannedFile:
    digest, parts, size, lines = hashlib.sha256(), list[Part](), 0, 0
    divisible = path.name.endswith(".jsonl")
    start, first_line = 0, 1
    with path.open("rb") as stream:
        while block := stream.read(min(SCAN_BLOCK, part_bytes)):
            if divisible and size + len(block) - start >= part_bytes and not block.endswith(b"\n"):
                block += stream.readline()
            digest.update(block)
            size += len(block)
            if divisible:
                lines += int(np.count_nonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")))
                if size - start >= part_bytes:
                    parts.append(Part(str(path), start, size, first_line, file))
                    start, first_line = size, lines + 1
            advance(len(block))
    if divisible:
        parts += [Part(str(path), start, size, first_line, file)] if size > start or not parts else []
        return ScannedFile(str(path), size, digest.hexdigest(), parts, lines + 1)
    if is_prefix(path):
        digest.update(idx_path(path.with_suffix("")).read_bytes())
        parts = _document_parts(path, part_bytes=part_bytes, file=file)
        return ScannedFile(str(path), input_size(path), digest.hexdigest(), parts, 0)
    if path.name.endswith(".parquet"):
        groups = parquet_reader().row_groups(path)
        parts = _row_group_parts(path, groups, size=size, part_bytes=part_bytes, file=file)
        return ScannedFile(str(path), size, digest.hexdigest(), parts, sum(rows for rows, _ in groups))
    most_lines = 1 if path.name.endswith(".txt") else None
    return ScannedFile(str(path), size, digest.hexdigest(), [Part(str(path), 0, size, 1, file)], most_lines)


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if path.is_dir():
        files = sorted(_files_below(path))
        if not files:
            raise ConfigError(f"input ({given}): the folder holds no file; name one with documents")
        return files
    if path.exists() or path.is_symlink():
        return [_file(path)]
    if glob.has_magic(given):
        matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - Path.glob refuses absolute patterns
        files = [_file(path) for path in map(Path, matches) if not path.is_dir()]
        if not files:
            raise ConfigError(
                f"input ({given}): no file matches; mend the pattern, or quote it where the shell reads it"
            )
        return files
    if bin_path(path).is_file() or idx_path(path).is_file():
        return [bin_path(path)]
    raise ConfigError(f"input ({given}) does not exist; give files, folders or globs")


def _files_below(folder: Path, *, inside: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files below a folder but for hidden ones, those of linked folders too. Raises ConfigError."""
    here = folder.resolve()
    if here in inside:
        raise ConfigError(f"input ({folder}) is a link to a folder that it lies in; remove it, or name files")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, inside=inside | {here})
        else:
            yield _file(path)


def _file(path: Path) -> Path:
    """The path of a file. Raises ConfigError where it is none, so that nothing is left out unsaid."""
    if path.is_file():
        return path
    if path.exists():
        raise ConfigError(f"input ({path}) is neither a file nor a folder; copy what it gives into a file")
    raise ConfigError(f"input ({path}) is a link to what is not there; mend it, or remove it")


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:  # bytes that do not decode stand in a path as lone surrogates
        return False
    return True


def _join_pairs(files: list[Path]) -> list[Path]:
    """Each .bin/.idx pair once, as its .bin. Raises ConfigError where one of the two is missing."""
    joined: list[Path] = []
    for file in files:
        if file.suffix not in (".bin", ".idx"):
            joined.append(file)
            continue
        pair = file.with_suffix(".bin"), file.with_suffix(".idx")
        for path in pair:
            if not path.is_file():
                raise ConfigError(f"input ({file}): {path.name} is missing beside it; a Megatron dataset is both files")
        if pair[0] not in joined:
            joined.append(pair[0])
    return joined


def _document_parts(path: Path, *, part_bytes: int, file: int) -> list[Part]:
    """A Megatron dataset cut at document borders."""
    reader = IndexedReader(path.with_suffix(""))
    borders = reader.tokens_before()[reader.document_indices] * reader.dtype.itemsize
    parts: list[Part] = []
    first = 0
    while first < reader.num_documents:
        last = int(np.searchsorted(borders, borders[first] + part_bytes, side="left"))
        last = min(max(last, first + 1), reader.num_documents)
        last = int(np.searchsorted(borders, borders[last], side="right")) - 1  # documents without a token end a part
        parts.append(Part(str(path), int(borders[first]), int(borders[last]), first + 1, file))
        first = last
    return parts


def _row_group_parts(
    path: Path, groups: Sequence[tuple[int, int]], *, size: int, part_bytes: int, file: int
) -> list[Part]:
    """A Parquet file cut at row groups; its bytes are counted as the groups', one after another."""
    parts: list[Part] = []
    start, stop, first_line, line = 0, 0, 1, 1
    for rows, group_bytes in groups:
        stop, line = stop + group_bytes, line + rows
        if stop - start >= part_bytes:
            parts.append(Part(str(path), start, stop, first_line, file))
            start, first_line = stop, line
    if stop > start or not parts:
        parts.append(Part(str(path), start, stop, first_line, file))
    return [*parts[:-1], replace(parts[-1], stop=max(size, stop))]  # with the footer
