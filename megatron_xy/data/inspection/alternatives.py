"""The lengths of a corpus' documents -> their histogram, and what fixed-length samples would make of the same corpus.

Fixed length: the documents of a source lie end to end in order of the corpus and are cut every so many tokens, as
Megatron's GPTDataset does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.manifest import FixedLengthEntry, LengthsEntry, Manifest

# Where the bins of a histogram begin: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four to a doubling, evenly.
QUARTERS = (1, 1.1892071150, 1.4142135624, 1.6817928305)
BIN_STARTS = np.array(sorted({math.ceil(2.0**doubling * quarter) for doubling in range(31) for quarter in QUARTERS}))


def profile_lengths(lengths: Iterable[NDArray[np.integer[Any]]], *, sizes: Sequence[int]) -> LengthsEntry:
    """What a manifest keeps of one source's document lengths [documents] (tokens, none 0), given in blocks in order.

    `sizes`: the fixed lengths to compare with, in tokens a sample.
    """
    counts = np.zeros(len(BIN_STARTS), dtype=np.int64)
    tokens = longest = 0
    cut = dict.fromkeys(sizes, 0)
    for block in lengths:
        ends = tokens + np.cumsum(block, dtype=np.int64)
        counts += np.bincount(np.searchsorted(BIN_STARTS, block, side="right") - 1, minlength=len(BIN_STARTS))
        for size in sizes:
            cut[size] += int(np.count_nonzero((ends - block) // size != (ends - 1) // size))
        tokens, longest = int(ends[-1]) if len(block) else tokens, max(longest, int(block.max(initial=0)))
    used = np.flatnonzero(counts)
    return LengthsEntry(
        longest=longest,
        histogram={str(BIN_STARTS[index]): int(counts[index]) for index in used},
        fixed_length={
            str(size): FixedLengthEntry(samples=-(-tokens // size), truncated_documents=cut[size]) for size in sizes
        },
    )


def fixed_length_alternatives(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """{sample length: {samples, padding_ratio, truncation_ratio, concatenation_ratio}} over all sources.

    The ratios are those of arXiv 2407.07495, for the same documents as the data set was built of; empty where the
    manifest does not keep their lengths.
    """
    kept = [(source, source.lengths) for source in manifest.sources.values() if source.lengths is not None]
    documents = sum(lengths.documents for _, lengths in kept)
    tokens = sum(source.tokens + source.tokens_lost for source, _ in kept)
    result: dict[str, dict[str, Any]] = {}
    for size in (str(bucket) for bucket in manifest.buckets if kept):
        entries = [lengths.fixed_length[size] for _, lengths in kept]
        samples = sum(entry.samples for entry in entries)
        result[size] = {
            "samples": samples,
            "padding_ratio": 1 - tokens / (samples * int(size)),
            "truncation_ratio": sum(entry.truncated_documents for entry in entries) / documents,
            "concatenation_ratio": documents / samples,
        }
    return result
