"""Keyed shuffles of any size in O(1) a position, without a table: the order of the samples of a stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PERMUTATION_ROUNDS = 8


def permute(positions: NDArray[np.uint64], sizes: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where keyed shuffles of range(size) put positions, in O(1) each: sizes [n], keys [n, PERMUTATION_ROUNDS].

    A Feistel network on pairs (left, right) with left * columns + right covering 0..size-1 and a few numbers more; what
    lands beyond `size` goes through again until it is inside (cycle walking), which keeps it a bijection.
    """
    columns = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    rows = (sizes + columns - np.uint64(1)) // columns
    results = _through_the_network(positions, rows, columns, keys)
    while len(outside := np.flatnonzero(results >= sizes)):
        results[outside] = _through_the_network(results[outside], rows[outside], columns[outside], keys[outside])
    return results


def shuffled(positions: Sequence[int], *, size: int, key: str) -> list[int]:
    """Where the shuffle of range(size) that `key` names puts positions."""
    keys = np.frombuffer(hashlib.sha256(key.encode()).digest() * 2, dtype=np.uint64)
    places = np.array(positions, dtype=np.uint64)
    numbers: list[int] = permute(places, np.full_like(places, size), np.tile(keys, (len(places), 1))).tolist()
    return numbers


def _through_the_network(
    positions: NDArray[np.uint64], rows: NDArray[np.uint64], columns: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(positions, columns)
    for number in range(0, PERMUTATION_ROUNDS, 2):
        left = (left + (mixed(right ^ keys[:, number]) >> np.uint64(8))) % rows
        right = (right + (mixed(left ^ keys[:, number + 1]) >> np.uint64(8))) % columns
    return left * columns + right


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit changes half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def digest(*parts: int | str) -> bytes:
    """64 bytes, a key, that depend on every part; JSON keeps the borders between parts."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8 * PERMUTATION_ROUNDS).digest()
