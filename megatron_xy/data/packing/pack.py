"""Packing: document lengths -> a plan of samples of the bucket sizes.

Best fit over several bucket sizes, longest document first, as in "Beyond Fixed Length: Bucket Pre-training is All
You Need" (arXiv 2407.07495) but without its padding threshold: only documents longer than the largest bucket are cut.
Or Megatron's way, documents laid end to end and cut every so many tokens, as the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.packing.best_fit import EngineName, best_fit
from megatron_xy.data.packing.sample_plan import Plan
from megatron_xy.errors import ConfigError, UsageError

Integers = NDArray[np.int64]
Lengths = NDArray[np.int32]
Packing = Literal["best_fit", "concatenate"]
Overflow = Literal["split", "drop", "truncate", "truncate_left"]

# Packed together: padding 0.04% on the paper's lengths, where 1,000 give 0.2%. A plan of so many takes about 2.5 MB.
WINDOW_DOCUMENTS = 1 << 17
LARGEST_BUCKET = 1 << 20  # tokens; packing keeps a few tables of this many entries
LARGEST_DOCUMENT = (1 << 31) - 1  # tokens, as in Megatron's index


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """The bucket sizes as a tuple. Raises UsageError unless they are positive, ascending and each named once."""
    given = tuple(int(bucket) for bucket in buckets)
    if not given or given != tuple(sorted(set(given))) or given[0] < 1 or given[-1] > LARGEST_BUCKET:
        shown = ",".join(str(bucket) for bucket in given)
        raise UsageError(
            f"buckets ({shown}) must be ascending sizes in tokens, each once, from 1 to {LARGEST_BUCKET}, "
            "such as 2048,4096,8192,16384"
        )
    return given


def check_policy(packing: Packing, overflow: Overflow, *, buckets: Sequence[int]) -> None:
    """Raises ConfigError for a policy that does not exist, and where `concatenate` has not one size, or an overflow."""
    for name, value, values in (("packing", packing, get_args(Packing)), ("overflow", overflow, get_args(Overflow))):
        if value not in values:
            raise ConfigError(f"{name} ({value}) must be one of {', '.join(values)}")
    if packing == "concatenate" and len(buckets) != 1:
        shown = ",".join(str(bucket) for bucket in buckets)
        raise ConfigError(f"packing (concatenate) cuts samples of one size, not of {shown}; name one sequence length")
    if packing == "concatenate" and overflow != "split":
        raise ConfigError(f"packing (concatenate) cuts documents anywhere; overflow ({overflow}) can only be split")


def pack(
    lengths: NDArray[np.integer[Any]],
    *,
    buckets: Sequence[int],
    packing: Packing = "best_fit",
    overflow: Overflow = "split",
    engine: EngineName = "auto",
) -> Plan:
    """Pack documents of `lengths` [documents] (tokens) into samples of `buckets` (ascending sizes in tokens).

    best_fit: the longest piece goes first, each into the sample with the least room that still holds it; where none
    does, a sample of the smallest bucket that holds it is opened. `overflow` says what becomes of a document longer
    than the largest bucket. split: full samples of it and a remainder, which is packed like a document; drop: it is
    left out; truncate: its beginning fills one sample; truncate_left: its end does.
    concatenate: Megatron's fixed-length samples of the one bucket. The documents lie end to end in an order shuffled
    as Megatron shuffles it, so that neighbours in a sample are not neighbours in the corpus, and are cut every so many
    tokens; the last sample may be short. The shuffle depends on the number of documents alone: no seed to keep. (A
    sample of Megatron's holds one token more, the label of its last one, which here is not learned.)

    Documents of length 0 are skipped. Deterministic, the same for every `engine`; O(documents + largest bucket).
    Raises UsageError for bad buckets, ConfigError for bad policies or engine.
    """
    sizes = check_buckets(buckets)
    check_policy(packing, overflow, buckets=sizes)
    assert not len(lengths) or 0 <= lengths.min() <= lengths.max() <= LARGEST_DOCUMENT, "as a Megatron index holds them"
    given = lengths.astype(np.int32)
    kept = _overflow(given, overflow=overflow, capacity=sizes[-1])
    pieces = _concatenate(kept, size=sizes[0]) if packing == "concatenate" else _best_fit(kept, sizes, engine=engine)
    num_documents = int(np.count_nonzero(kept))
    dropped_documents = int(np.count_nonzero(given)) - num_documents
    shortened_documents = int(np.count_nonzero(kept != given)) - dropped_documents
    return Plan(
        buckets=sizes,
        num_documents=num_documents,
        truncated_documents=pieces.num_cut_documents + shortened_documents,
        dropped_documents=dropped_documents,
        tokens_lost=int(given.sum(dtype=np.int64) - kept.sum(dtype=np.int64)),
        piece_document=pieces.document,
        piece_start=pieces.start + (given - kept)[pieces.document] if overflow == "truncate_left" else pieces.start,
        piece_length=pieces.length,
        sample_ptr=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(pieces.num_in_sample)]),
        sample_bucket=pieces.sample_bucket,
    )


class _Pieces(NamedTuple):
    """What a plan says of [pieces] and [samples]."""

    num_cut_documents: int
    document: Lengths
    start: Lengths
    length: Lengths
    num_in_sample: Integers
    sample_bucket: Lengths


def _overflow(lengths: Lengths, *, overflow: Overflow, capacity: int) -> Lengths:
    """How many tokens of each document go into samples."""
    if overflow == "drop":
        return np.where(lengths > capacity, np.int32(0), lengths)
    return lengths if overflow == "split" else np.minimum(lengths, np.int32(capacity))


def _best_fit(lengths: Lengths, sizes: tuple[int, ...], *, engine: EngineName) -> _Pieces:
    capacity = sizes[-1]
    long = np.flatnonzero(lengths > capacity).astype(np.int32)
    full_samples = lengths[long] // capacity
    cut_off = np.zeros_like(lengths)
    cut_off[long] = full_samples * capacity
    remainders = lengths - cut_off
    runs = best_fit(np.bincount(remainders, minlength=capacity + 1), sizes=sizes, engine=engine)
    num_samples, num_full = len(runs.opened_for), int(full_samples.sum())
    longest_first = _stable_order(capacity - remainders, largest=capacity)[: np.count_nonzero(remainders)]
    piece_sample = np.repeat(runs.run_sample, runs.run_length)
    packed = longest_first[_stable_order(piece_sample, largest=num_samples)].astype(np.int32)
    bucket_of_length = np.repeat(np.arange(len(sizes), dtype=np.int32), np.diff((-1, *sizes)))
    # Behind the samples of best fit, the full samples of documents beyond the largest bucket.
    return _Pieces(
        num_cut_documents=len(long),
        document=np.concatenate([packed, np.repeat(long, full_samples)]),
        start=np.concatenate([cut_off[packed], _count_within(full_samples) * np.int32(capacity)]),
        length=np.concatenate([remainders[packed], np.full(num_full, capacity, dtype=np.int32)]),
        num_in_sample=np.concatenate([np.bincount(piece_sample, minlength=num_samples), np.ones(num_full, np.int64)]),
        sample_bucket=np.concatenate(
            [bucket_of_length[runs.opened_for], np.full(num_full, len(sizes) - 1, dtype=np.int32)]
        ),
    )


def _concatenate(lengths: Lengths, *, size: int) -> _Pieces:
    # The raw stream of Philox is the same in every numpy; what shuffles are made of it is not.
    draws = np.random.Philox(key=0).random_raw(len(lengths)) >> np.uint64(32)
    order = _stable_order(draws, largest=(1 << 32) - 1).astype(np.int32)
    order = order[lengths[order] > 0]
    ends = np.cumsum(lengths[order], dtype=np.int64)
    starts = ends - lengths[order]
    samples_touched = (ends - 1) // size - starts // size + 1
    piece_sample = np.repeat(starts // size, samples_touched) + _count_within(samples_touched)
    document_start = np.repeat(starts, samples_touched)
    first = np.maximum(document_start, piece_sample * size)
    last = np.minimum(np.repeat(ends, samples_touched), (piece_sample + 1) * size)
    num_in_sample = np.bincount(piece_sample)
    return _Pieces(
        num_cut_documents=int(np.count_nonzero(samples_touched > 1)),
        document=np.repeat(order, samples_touched),
        start=(first - document_start).astype(np.int32),
        length=(last - first).astype(np.int32),
        num_in_sample=num_in_sample,
        sample_bucket=np.zeros(len(num_in_sample), dtype=np.int32),
    )


def _count_within(counts: NDArray[np.integer[Any]]) -> Lengths:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    first = np.cumsum(counts) - counts
    numbers: Lengths = (np.arange(int(counts.sum())) - np.repeat(first, counts)).astype(np.int32)
    return numbers


def _stable_order(keys: NDArray[np.integer[Any]], *, largest: int) -> Integers:
    """The indices that sort `keys` (0..largest), equal ones as they stand, in O(keys): numpy sorts u16 by radix."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(16, largest.bit_length(), 16):
        digits = np.right_shift(keys, keys.dtype.type(shift)).astype(np.uint16)
        order = order[np.argsort(digits[order], kind="stable")]
    return order
