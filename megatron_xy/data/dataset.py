"""Packed samples as arrays: from the folders that `data build` wrote to micro-batches that are ready for the model.

    folders -> PackedDataset.sample -> collate -> MicroBatch

A sample of bucket b holds at most b tokens, in pieces; each piece is text of one document. In a micro-batch the samples
lie one after another in one row, each padded to its bucket, so that every micro-batch of every bucket has one shape.
"""

from __future__ import annotations

import bisect
import itertools
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.draws.sampler import Batch, BucketSampler, SampleId, Stream
from megatron_xy.data.indexed import IndexedReader, bin_path, idx_path, read_header
from megatron_xy.data.manifest import Manifest, ShardEntry, read_manifest
from megatron_xy.data.origins import Rows, read_mask, read_rows
from megatron_xy.errors import ConfigError, DataError

MOST_OPEN_SHARDS = 8192  # Linux gives a process 65,530 maps, if nobody has raised it
Array = TypeVar("Array")
NO_LABEL = 0  # stands where loss_mask is 0; a valid id, so that an embedding or a loss may read it


@dataclass(frozen=True)
class Sample:
    """One packed sample: tokens [num_tokens], num_tokens <= its bucket; piece_lengths [pieces], num_tokens in all.

    learned [num_tokens]: which tokens the loss asks for, each as the next one of the token before it; None: all.
    """

    tokens: NDArray[np.int64]
    piece_lengths: NDArray[np.int64]
    learned: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class PairIndex(Generic[Array]):
    """Where the pairs of answers in a row are: p pairs, in n comparisons; as arrays, or as tensors on the device.

    In comparison i, which is one of pair owners[i] and counts weights[i] of it, the value at `chosen[i]` is to exceed
    that at `rejected[i]`; the weights of a pair sum to 1.
    """

    chosen: Array  # [n] int64 positions in the row
    rejected: Array  # [n] int64
    owners: Array  # [n] int64, 0 to p - 1
    weights: Array  # [n] fp32
    chosen_ends: Array  # [p] int64 positions of the last tokens, where the scores are
    rejected_ends: Array  # [p] int64
    margins: Array  # [p] fp32, by how much the chosen one is to win
    source_ids: Array  # [p] int64


@dataclass(frozen=True)
class MicroBatch:
    """One row of t = micro_batch_tokens tokens; every array but cu_seqlens is [t]."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]  # the next token of the same piece; NO_LABEL where there is none, or it is not learned
    loss_mask: NDArray[np.float32]  # 1 where there is a label; 0 at the end of a piece, in padding, before a prompt's
    position_ids: NDArray[np.int64]  # from 0 at every segment border
    cu_seqlens: NDArray[np.int32]  # [segments + 1], from 0 to t: attention stays within a segment
    source_ids: NDArray[np.int32]  # of every token, that of its sample for padding
    num_padding_tokens: int
    sum_squared_lengths: int  # of n^2 over the texts that attend within themselves: what attention costs
    pairs: PairIndex[NDArray[Any]] | None = None  # of task reward, which learns from them alone


class PackedDataset:
    """The samples of one or more data folders.

    What several folders hold of one (source, bucket) is joined in the order in which the folders are given. Opening
    costs one manifest a folder and a look at each shard's files; a shard is opened when its first sample is read, and
    closed once `most_open_shards` others have been read since.
    """

    def __init__(self, paths: Sequence[Path], *, looked_at: slice = slice(None)) -> None:
        """looked_at: the shards whose files are checked now, as the ranks of a job share them out; the others are
        checked when they are opened. Raises ConfigError (no such folder, the same one twice) or DataError (damaged, or
        not to be joined).
        """
        if not paths:
            raise ConfigError("data.path is empty; name at least one folder that `data build` wrote")
        self.paths = list(paths)
        for path in self.paths:
            if not path.is_dir():
                raise ConfigError(f"data.path ({path}): there is no such folder; name one that `data build` wrote")
        manifests = [read_manifest(path) for path in self.paths]
        _check_joinable(self.paths, manifests)
        self.buckets = sorted(manifests[0].buckets)
        self.vocab_size = manifests[0].tokenizer.vocab_size
        self.fingerprints: dict[str, Any] = {"data.path": [manifest.fingerprint for manifest in manifests]}
        self.tokenizer_sha256 = manifests[0].tokenizer.sha256
        chats = [manifest.chat for manifest in manifests if manifest.chat is not None]
        self.chat_template = chats[0].template if chats else None
        self.tokenizer_path = self.paths[0] / manifests[0].tokenizer.file  # the folder's own copy
        self._shards: dict[tuple[str, int], list[_Shard]] = {}
        for path, manifest in zip(self.paths, manifests, strict=True):
            corpus_files = [entry.path for entry in manifest.inputs]
            for source, bucket, entry in manifest.shards:
                self._shards.setdefault((source, bucket), []).append(_Shard(path, entry, corpus_files))
        for shard in [shard for shards in self._shards.values() for shard in shards][looked_at]:
            shard.check_files()
            read_header(idx_path(shard.prefix))
        self._opened = lru_cache(maxsize=most_open_shards())(_OpenShard)
        # The first sample of each shard and, last, the number of samples.
        self._starts = {
            stream: list(itertools.accumulate((shard.num_samples for shard in shards), initial=0))
            for stream, shards in sorted(self._shards.items())
        }

    @property
    def streams(self) -> list[Stream]:
        """What each source holds in each bucket, sorted; a bucket without samples is left out."""
        return [Stream(source, bucket, starts[-1]) for (source, bucket), starts in self._starts.items()]

    @property
    def conversation_sources(self) -> list[str]:
        """The names of the sources in which only a part of the tokens is learned, sorted."""
        return sorted(
            {source for (source, _), shards in self._shards.items() if any(shard.is_masked for shard in shards)}
        )

    @property
    def sources(self) -> list[str]:
        """The names of all sources, sorted."""
        return sorted({source for source, _ in self._starts})

    def attention_cost(self, sample_id: SampleId, *, split_documents: bool) -> int:
        """Sum of n^2 over what attends within itself: the pieces, or the whole sample. Reads the index alone."""
        shard, index = self._place(sample_id)
        lengths = self._opened(shard).piece_lengths(index).astype(np.int64)
        return int((lengths**2).sum()) if split_documents else int(lengths.sum()) ** 2

    def sample(self, sample_id: SampleId) -> Sample:
        """Reads one sample. Raises DataError, with file, sample and offset, where it breaks the format's rules."""
        shard, index = self._place(sample_id)
        return self._opened(shard).sample(index, bucket=sample_id.bucket, vocab_size=self.vocab_size)

    def documents(self, sample_id: SampleId) -> list[dict[str, Any]]:
        """Where a sample's pieces come from: [{file, line, start, length}], `length` tokens from token `start` on of
        the document at FILE:LINE. Raises DataError where the trace is missing or cut.
        """
        shard, index = self._place(sample_id)
        return self._opened(shard).documents(index)

    def _place(self, sample_id: SampleId) -> tuple[_Shard, int]:
        """The shard that holds a sample, and the sample's number there."""
        stream = sample_id.source, sample_id.bucket
        starts = self._starts[stream]
        if not 0 <= sample_id.index < starts[-1]:
            raise IndexError(f"sample {sample_id.index} of {starts[-1]} in source {stream[0]}, bucket {stream[1]}")
        number = bisect.bisect_right(starts, sample_id.index) - 1
        return self._shards[stream][number], sample_id.index - starts[number]


def samples_of_rank(
    dataset: PackedDataset,
    sampler: BucketSampler,
    data_step: int,
    *,
    data_parallel_size: int,
    data_parallel_rank: int,
    split_documents: bool,
) -> tuple[Batch, tuple[SampleId, ...]]:
    """The batch of `data_step` and this rank's samples of it, dealt so that all ranks have equal attention work."""
    batch = sampler.batch(data_step)
    costs = None
    if data_parallel_size > 1:
        costs = [dataset.attention_cost(sample, split_documents=split_documents) for sample in batch.samples]
    mine = sampler.samples_of_rank(
        batch, data_parallel_size=data_parallel_size, data_parallel_rank=data_parallel_rank, costs=costs
    )
    return batch, mine


def most_open_shards() -> int:
    """How many shards stay open: one takes up to four descriptors and maps, and a run has others to open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN_SHARDS if limit == resource.RLIM_INFINITY else min(MOST_OPEN_SHARDS, max(limit // 8, 1))


class _Shard:
    """One .bin/.idx pair, as the manifest has it."""

    def __init__(self, folder: Path, entry: ShardEntry, corpus_files: list[str]) -> None:
        """corpus_files: as the trace numbers them."""
        self.prefix = folder / entry.name
        self.num_samples = entry.samples
        self.is_masked = entry.mask is not None
        self.corpus_files = corpus_files
        files = [*entry.pair, *([] if entry.mask is None else [entry.mask])]
        self._sizes = {folder / file.name: file.size for file in files}

    def check_files(self) -> None:
        """That its files are there, and as large as they should be."""
        for path, expected in self._sizes.items():
            if not path.is_file():
                raise DataError(f"{path} is missing though the manifest lists it; copy the folder or build it again")
            if (size := path.stat().st_size) != expected:
                raise DataError(
                    f"{path} has {size} bytes where the manifest lists {expected}: it was cut, grown or replaced; "
                    "copy the folder or build it again"
                )

    def damaged(self, reason: str) -> DataError:
        """The error for what its contents break."""
        return DataError(f"{bin_path(self.prefix)}: {reason}; the folder is damaged: copy it or build it again")


class _OpenShard:
    """A shard whose samples can be read."""

    def __init__(self, shard: _Shard) -> None:
        shard.check_files()
        self._shard, self._reader = shard, IndexedReader(shard.prefix)
        if self._reader.num_documents != shard.num_samples:
            raise shard.damaged(
                f"holds {self._reader.num_documents} samples where the manifest lists {shard.num_samples}"
            )
        self._mask = read_mask(shard.prefix, num_tokens=self._reader.num_tokens) if shard.is_masked else None

    def piece_lengths(self, index: int) -> NDArray[np.int32]:
        first, last = self._reader.document_indices[index : index + 2].tolist()
        return self._reader.sequence_lengths[first:last]

    def sample(self, index: int, *, bucket: int, vocab_size: int) -> Sample:
        tokens, piece_lengths = self._reader.document_tokens(index)
        if not 0 < len(tokens) <= bucket:
            raise self._shard.damaged(f"sample {index} has {len(tokens)} tokens, must have 1 to {bucket}")
        bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if len(bad):
            raise self._shard.damaged(
                f"sample {index}, offset {bad[0]}: token id {tokens[bad[0]]} is outside the vocabulary of {vocab_size}"
            )
        learned = None
        if self._mask is not None:
            first = self._reader.first_token(index)
            learned = self._mask[first : first + len(tokens)] != 0
        return Sample(tokens.astype(np.int64), piece_lengths.astype(np.int64), learned)

    @cached_property
    def _rows(self) -> Rows:
        return read_rows(self._shard.prefix, num_sequences=self._reader.num_sequences)

    def documents(self, index: int) -> list[dict[str, Any]]:
        first, last = self._reader.document_indices[index : index + 2].tolist()
        pieces = zip(self._rows[first:last].tolist(), self.piece_lengths(index).tolist(), strict=True)
        return [
            {"file": self._shard.corpus_files[file], "line": line, "start": start, "length": length}
            for (line, file, start), length in pieces
        ]


def collate(
    samples: Sequence[Sample],
    *,
    source_indices: Sequence[int],
    bucket: int,
    micro_batch_tokens: int,
    split_documents: bool,
) -> MicroBatch:
    """One micro-batch of micro_batch_tokens // bucket samples; `source_indices` gives each sample's source.

    With `split_documents` every piece is a segment, and so is a sample's padding; without it, every sample is one
    segment, its padding included. Labels stop at the end of a piece either way.
    """
    assert len(samples) * bucket == micro_batch_tokens, "a micro-batch is filled by whole samples of one bucket"
    assert len(source_indices) == len(samples), "every sample has its source"
    tokens = np.zeros(micro_batch_tokens, dtype=np.int64)
    loss_mask = np.zeros(micro_batch_tokens, dtype=np.float32)
    borders: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    num_real_tokens = sum_squared_lengths = 0
    for start, sample in zip(range(0, micro_batch_tokens, bucket), samples, strict=True):
        length = len(sample.tokens)
        assert 0 < length <= bucket and sample.piece_lengths.sum() == length, "pieces fill a sample, within its bucket"
        ends = start + np.cumsum(sample.piece_lengths[sample.piece_lengths > 0])
        tokens[start : start + length] = sample.tokens
        loss_mask[start : start + length] = 1 if sample.learned is None else np.append(sample.learned[1:], False)
        loss_mask[ends - 1] = 0
        if split_documents:
            borders.append(ends)
        if not split_documents or length < bucket:
            borders.append(np.array([start + bucket]))
        num_real_tokens += length
        sum_squared_lengths += int((sample.piece_lengths**2).sum()) if split_documents else length**2
    labels = np.where(loss_mask > 0, np.roll(tokens, -1), NO_LABEL)
    cu_seqlens = np.concatenate(borders)
    seqlens = np.diff(cu_seqlens)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=np.arange(micro_batch_tokens) - np.repeat(cu_seqlens[:-1], seqlens),
        cu_seqlens=cu_seqlens.astype(np.int32),
        source_ids=np.repeat(np.array(source_indices, dtype=np.int32), bucket),
        num_padding_tokens=micro_batch_tokens - num_real_tokens,
        sum_squared_lengths=sum_squared_lengths,
    )


def _check_joinable(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Folders that are drawn from together have one tokenizer and the same buckets, and each is named once."""
    places = [path.resolve() for path in paths]
    first = manifests[0]
    for number, (path, manifest) in enumerate(zip(paths, manifests, strict=True)):
        if places[number] in places[:number]:
            raise ConfigError(f"data.path names {path} twice; to draw a source more often, raise its data.weights")
        if manifest.tokenizer.sha256 != first.tokenizer.sha256:
            raise DataError(
                f"{path} was built with another tokenizer ({manifest.tokenizer.sha256[:12]}) than {paths[0]} "
                f"({first.tokenizer.sha256[:12]}); build both with the same --tokenizer"
            )
        if sorted(manifest.buckets) != sorted(first.buckets):
            raise DataError(
                f"{path} has buckets {sorted(manifest.buckets)}, {paths[0]} has {sorted(first.buckets)}; "
                "build both with the same --buckets"
            )
    templates = {m.chat.template: path for path, m in zip(reversed(paths), reversed(manifests), strict=True) if m.chat}
    if len(templates) > 1:
        names = " and ".join(map(str, reversed(templates.values())))
        raise DataError(f"{names} were built with different chat templates; build all with the same --chat-template")
