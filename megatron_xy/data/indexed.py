"""Megatron's `.bin`/`.idx` on disk: from token arrays to the two files (writer), and back (reader).

Layout, little endian, no padding. `.bin`: token arrays back to back. `.idx`: magic, u64 version, u8 dtype code,
u64 S sequences, u64 D = documents + 1, S i32 lengths (tokens), S i64 offsets (bytes into `.bin`), D i64 document
indices (0, then the sequence index after each document). See megatron/core/datasets/indexed_dataset.py.
In a packed dataset one Megatron document is one sample, and its sequences are the pieces of text in it.
"""

from __future__ import annotations

import os
import struct
import weakref
from array import array
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_xy.errors import ConfigError, DataError
from megatron_xy.storage import read_error, replace, storage_errors, temporary_name

Tokens = NDArray[Any]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, S, D
# Megatron's codes 6 and 7 (floating point) cannot hold token ids and are refused.
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL_VOCAB_SIZE = 65500  # below it Megatron stores ids in 16 bits
CHECKED_PLACES = 16  # of an index at opening; each may cost a read of a block or two
VERIFY_ROWS = 4 * 1024 * 1024  # rows that `verify` holds in memory at a time


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The type in which Megatron stores ids of a vocabulary of `vocab_size`: u16 below 65500, else i32."""
    return DTYPES[8] if vocab_size < SMALL_VOCAB_SIZE else DTYPES[4]


def bin_path(prefix: Path) -> Path:
    """PREFIX.bin"""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """PREFIX.idx"""
    return prefix.with_name(prefix.name + ".idx")


class GrowingFile:
    """A flat file that stands under a temporary name until it is finished. Raises StorageError."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(temporary_name(path.name))
        self._stream: BinaryIO | None = None
        self.num_items = 0

    def open(self) -> None:
        """Begins the file."""
        with storage_errors(self._path):
            self._stream = self._temporary.open("wb", buffering=1024 * 1024)

    def write(self, items: NDArray[Any]) -> None:
        """Appends a flat array."""
        assert self._stream is not None, "the writer is used inside its with block"
        with storage_errors(self._path):
            self._stream.write(np.ascontiguousarray(items).data)
        self.num_items += len(items)

    def close(self) -> None:
        """Ends the file: all of it is written, and nothing but its name is to come."""
        assert self._stream is not None, "the writer is used inside its with block"
        with storage_errors(self._path):
            self._stream.close()

    def finish(self) -> None:
        """Ends the file and gives it its name."""
        self.close()
        replace(self._temporary, self._path)

    def take_back(self) -> None:
        """Removes what has not got its name."""
        if self._stream is not None:
            with suppress(OSError):  # a full disk refuses the last buffered bytes too; the first refusal is reported
                self._stream.close()
        self._temporary.unlink(missing_ok=True)


class IndexedWriter:
    """Streams documents into PREFIX.bin and PREFIX.idx; a context manager.

    Both files stand under temporary names until the block ends; after an exception nothing is left. Memory: 4 bytes
    a sequence and 8 a document. Raises StorageError where the file system refuses.
    """

    def __init__(self, prefix: Path | str, *, dtype: DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        assert self.dtype in CODES, f"{self.dtype} has no code in Megatron's format"
        self._sequence_lengths = array("i")
        self._document_indices = array("q", [0])
        self._bin, self._idx = GrowingFile(bin_path(self.prefix)), GrowingFile(idx_path(self.prefix))
        self._files = [self._bin]  # that grow with the documents

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._bin.num_items

    def __enter__(self) -> Self:
        with storage_errors(self.prefix):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
        for file in self._files:
            file.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in (*self._files, self._idx):
                file.take_back()

    def add_documents(
        self, tokens: Tokens, *, lengths: NDArray[np.integer[Any]], num_pieces: NDArray[np.integer[Any]] | None = None
    ) -> None:
        """Append many documents at once: `tokens` [sum of lengths], `lengths` [sequences], `num_pieces` [documents].

        `num_pieces` says how many sequences each document has: one, if it is left out.
        """
        assert int(lengths.sum()) == len(tokens), "the sequences' lengths must add up to the tokens given"
        ends = np.arange(1, len(lengths) + 1) if num_pieces is None else np.cumsum(num_pieces)
        assert (int(ends[-1]) if len(ends) else 0) == len(lengths), "the pieces must add up to the sequences given"
        self._write(tokens)
        first = len(self._sequence_lengths)
        self._sequence_lengths.frombytes(lengths.astype("<i4").tobytes())
        self._document_indices.frombytes((ends + first).astype("<i8").tobytes())

    def _write(self, tokens: Tokens) -> None:
        assert tokens.ndim == 1, "a piece is a flat array of token ids"
        if tokens.dtype != self.dtype and tokens.size:
            limits = np.iinfo(self.dtype)
            assert limits.min <= tokens.min() and tokens.max() <= limits.max, f"token ids must fit in {self.dtype}"
        self._bin.write(tokens.astype(self.dtype, copy=False))

    def _finish(self) -> None:
        lengths = np.frombuffer(self._sequence_lengths, dtype="<i4")
        documents = np.frombuffer(self._document_indices, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(documents))
        self._idx.open()
        for part in (np.frombuffer(header, np.uint8), lengths, _offsets(lengths, self.dtype.itemsize), documents):
            self._idx.write(part)
        for file in (self._bin, self._idx):
            file.close()  # a full disk must end here, where the older pair still stands
        with storage_errors(self.prefix):
            idx_path(self.prefix).unlink(missing_ok=True)  # a new .bin must never stand beside an old .idx
        self._bin.finish()
        self._idx.finish()


def _offsets(lengths: NDArray[np.int32], itemsize: int) -> NDArray[np.int64]:
    """Byte offset of each sequence [S] for sequence lengths [S]."""
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], dtype="<i8", out=offsets[1:])
    offsets *= itemsize
    return offsets


class IndexedReader:
    """PREFIX.idx mapped into memory, and PREFIX.bin, read by document; opens in constant time and memory.

    Checked then, in constant time: header, both sizes, where the document indices begin and end, where the last
    sequence ends, and whether lengths, offsets and document indices agree at CHECKED_PLACES places all over the index.
    Checked when a document is read, in time proportional to it: its own lengths and offsets. Damage of other kinds is
    found by `verify`, which reads everything, and against a manifest's checksums.

    Attributes: num_documents, num_sequences, num_tokens, dtype, sequence_lengths [S] i32, document_indices [D] i64,
    each a read-only view.
    Raises ConfigError where a file is missing, DataError (file and reason) where a file is cut, grown, or foreign.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self._idx_path, self._bin_path = idx_path(self.prefix), bin_path(self.prefix)
        for path in (self._idx_path, self._bin_path):
            if not path.is_file():
                raise ConfigError(f"{path} does not exist; an indexed dataset is PREFIX.bin and PREFIX.idx")
        code, self.num_sequences, num_indices = read_header(self._idx_path)
        self.dtype, self.num_documents = DTYPES[code], num_indices - 1
        index = mapped(self._idx_path, np.uint8)
        offset = HEADER.size
        self.sequence_lengths: NDArray[np.int32] = np.frombuffer(index, "<i4", self.num_sequences, offset)
        offset += self.sequence_lengths.nbytes
        self._offsets: NDArray[np.int64] = np.frombuffer(index, "<i8", self.num_sequences, offset)
        offset += self._offsets.nbytes
        self.document_indices: NDArray[np.int64] = np.frombuffer(index, "<i8", num_indices, offset)
        self._bin_bytes = self._bin_path.stat().st_size
        self._check_ends()
        self._check_places()
        self.num_tokens = self._bin_bytes // self.dtype.itemsize

    @cached_property
    def tokens(self) -> Tokens:
        """[num_tokens], all of `.bin`, mapped: for those who read it from one end to the other."""
        return mapped(self._bin_path, self.dtype)

    def tokens_before(self) -> NDArray[np.int64]:
        """[S + 1]: the tokens before each sequence and, last, all; from the lengths, made anew at each call."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.sequence_lengths, dtype=np.int64)])

    def first_token(self, index: int) -> int:
        """Where in `tokens` document `index`, which is not empty, begins."""
        return int(self._offsets[int(self.document_indices[index])]) // self.dtype.itemsize

    def document_tokens(self, index: int) -> tuple[Tokens, NDArray[np.int32]]:
        """(tokens [sum of lengths]; piece lengths [pieces]) of document `index`.

        Raises DataError where the index contradicts itself, StorageError where the disk does not answer, IndexError
        outside 0..num_documents.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        first, last = int(self.document_indices[index]), int(self.document_indices[index + 1])
        if not 0 <= first <= last <= self.num_sequences:
            raise self._damaged(f"document {index} spans sequences {first}..{last} of {self.num_sequences}")
        lengths = self.sequence_lengths[first:last]
        if first == last:
            return np.zeros(0, dtype=self.dtype), lengths
        itemsize = self.dtype.itemsize
        start, num_tokens = int(self._offsets[first]), int(lengths.sum(dtype=np.int64))
        end = start + num_tokens * itemsize
        following = int(self._offsets[last]) if last < self.num_sequences else self._bin_bytes
        contiguous = end == following and np.array_equal(self._offsets[first:last], start + _offsets(lengths, itemsize))
        if lengths.min() < 0 or start < 0 or start % itemsize or not contiguous or end > self._bin_bytes:
            raise self._damaged(f"offsets and lengths of document {index} contradict each other")
        return self._read(start, num_tokens), lengths

    def _read(self, start: int, num_tokens: int) -> Tokens:
        """Tokens from byte `start` of `.bin` on. Not from a map: there, each costs as much as the disk reads ahead,
        other threads wait meanwhile, and a file that was cut since ends the process by a signal.
        """
        tokens = np.empty(num_tokens, dtype=self.dtype)
        rest = tokens.data.cast("B")
        while rest:  # Linux gives at most 2 GiB at a time
            try:
                num_read = os.preadv(self._descriptor, [rest], start + tokens.nbytes - len(rest))
            except OSError as error:
                raise read_error(self._bin_path, error) from None
            if not num_read:
                raise DataError(f"{self._bin_path} ends before byte {start + tokens.nbytes}: it was cut")
            rest = rest[num_read:]
        return tokens

    @cached_property
    def _descriptor(self) -> int:
        """`.bin`, open as long as this reader lives."""
        descriptor = os.open(self._bin_path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def verify(self, *, vocab_size: int | None = None) -> None:
        """Read everything: indices ascend, offsets follow from lengths, ids in 0..vocab_size. Raises DataError."""
        if np.any(np.diff(self.document_indices) < 0):
            raise self._damaged("document indices do not ascend")
        end = 0
        for first in range(0, self.num_sequences, VERIFY_ROWS):
            lengths = self.sequence_lengths[first : first + VERIFY_ROWS]
            if lengths.min() < 0:
                raise self._damaged(f"a sequence in {first}..{first + len(lengths)} has a negative length")
            expected = end + _offsets(lengths, self.dtype.itemsize)
            if not np.array_equal(self._offsets[first : first + VERIFY_ROWS], expected):
                raise self._damaged(f"offsets in {first}..{first + len(lengths)} do not follow from the lengths")
            end = int(expected[-1]) + int(lengths[-1]) * self.dtype.itemsize
        if end != self._bin_bytes:
            raise self._damaged(f"lengths add up to {end} bytes, {self._bin_path.name} has {self._bin_bytes}")
        for first in range(0, self.num_tokens if vocab_size is not None else 0, VERIFY_ROWS):
            part = self.tokens[first : first + VERIFY_ROWS]
            if int(part.min()) < 0 or int(part.max()) >= (vocab_size or 0):
                bad = first + int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
                raise DataError(
                    f"{self._bin_path}: token {bad} has id {self.tokens[bad]}, outside 0..{vocab_size}; "
                    "the file is damaged or was made with another tokenizer"
                )

    def _check_ends(self) -> None:
        """What constant time allows: first and last document index, and the last sequence's end against `.bin`."""
        first, last = int(self.document_indices[0]), int(self.document_indices[-1])
        if first != 0 or last != self.num_sequences:
            raise self._damaged(f"document indices run {first}..{last}, must run 0..{self.num_sequences}")
        end = 0
        if self.num_sequences:
            end = int(self._offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if self._bin_bytes != end:
            raise DataError(
                f"{self._bin_path} has {self._bin_bytes} bytes where {self._idx_path.name} asks for {end}: it was cut "
                "or grown, or belongs to another index; copy or build it again"
            )

    def _check_places(self) -> None:
        """At places spread evenly: an offset follows from the one before; document indices ascend, over all places."""
        places = np.linspace(0, self.num_sequences - 2, num=CHECKED_PLACES).astype(np.int64)
        for place in sorted({*places.tolist()}) if self.num_sequences > 1 else []:
            length, offset = int(self.sequence_lengths[place]), int(self._offsets[place])
            expected, found = offset + length * self.dtype.itemsize, int(self._offsets[place + 1])
            if length < 0 or offset < 0 or found != expected or (place == 0 and offset != 0):
                raise self._damaged(f"the offset of sequence {place + 1} ({found}) does not follow from {place}")
        places = np.linspace(0, self.num_documents - 1, num=CHECKED_PLACES).astype(np.int64)
        reached = 0
        for place in sorted({*places.tolist()}) if self.num_documents else []:
            first, last = self.document_indices[place : place + 2].tolist()
            if not reached <= first <= last <= self.num_sequences:
                raise self._damaged(f"document {place} spans sequences {first}..{last} of {self.num_sequences}")
            reached = last

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self._idx_path} is damaged: {reason}; copy or build it again")


def read_header(path: Path) -> tuple[int, int, int]:
    """(dtype code, S, D) of an `.idx`, after a check against the file's size. Raises DataError."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise DataError(f"{path} is no Megatron index: it starts with {header[:9]!r} instead of {MAGIC!r}")
    if len(header) < HEADER.size:
        raise DataError(f"{path} has {size} bytes, less than its header of {HEADER.size}: it was cut")
    _, version, code, num_sequences, num_indices = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path} has version {version}; only version {VERSION} of Megatron's index is known")
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code}; token ids have one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_indices
    if num_indices < 1 or size != expected:
        multimodal = num_indices >= 1 and num_sequences > 0 and size == expected + num_sequences
        reason = "multimodal indices (a mode per sequence) are not supported" if multimodal else "it was cut or grown"
        raise DataError(
            f"{path} has {size} bytes where its counts ({num_sequences} sequences, {num_indices} document "
            f"indices) ask for {expected}: {reason}"
        )
    return code, num_sequences, num_indices


def mapped(path: Path, dtype: DTypeLike) -> NDArray[Any]:
    """The file's items, mapped read-only; an empty file cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
