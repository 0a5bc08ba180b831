"""Which prompts are the same, or nearly, and which of them are held out: texts -> clusters -> a split.

Two prompts are alike where nothing but case, width, blanks and punctuation tells them apart, or where they share 80% of
their runs of 4 characters (Jaccard). Candidates come from MinHash signatures in bands, as datasketch or text-dedup
find them; here all prompts go through numpy at once, so that every rank can afford it at its start.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.draws.permutation import mixed

RUN_LENGTH = 4  # characters
SIMILARITY = 0.8  # Jaccard, from which on prompts are alike
NUM_BANDS, BAND_SIZE = 24, 4  # of pairs at 0.8, 99.999% meet in a band; at 0.5, 79% do and are then told apart


def clusters_of(texts: Sequence[str]) -> list[int]:
    """For each text the number of its cluster: the first text that it is the same as, like, or like one like it."""
    cleaned = [_cleaned(text) for text in texts]
    firsts: dict[str, int] = {}
    owner = [firsts.setdefault(text, number) for number, text in enumerate(cleaned)]
    numbers = list(firsts.values())  # of the distinct ones
    runs = [_runs(cleaned[number]) for number in numbers]
    parents = list(range(len(numbers)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for band in _bands(runs):
        order = np.argsort(band, kind="stable")
        for first, second in zip(order[:-1].tolist(), order[1:].tolist(), strict=True):
            if band[first] == band[second] and root(first) != root(second) and _are_alike(runs[first], runs[second]):
                low, high = sorted((root(first), root(second)))
                parents[high] = low
    place = {number: index for index, number in enumerate(numbers)}
    return [numbers[root(place[number])] for number in owner]


def split_by_cluster(clusters: Sequence[int], texts: Sequence[str], *, fraction: float) -> list[bool]:
    """Which texts are held out: whole clusters, in an order that their texts alone decide, up to the fraction."""
    members: dict[int, list[int]] = {}
    for number, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(number)
    room = round(fraction * len(clusters))
    is_held_out = [False] * len(clusters)
    for cluster in sorted(members, key=lambda cluster: _rank(min(texts[number] for number in members[cluster]))):
        if len(members[cluster]) <= room:
            room -= len(members[cluster])
            for number in members[cluster]:
                is_held_out[number] = True
    return is_held_out


def _rank(text: str) -> bytes:
    return hashlib.sha256(f"held out/{text}".encode()).digest()


def _cleaned(text: str) -> str:
    """In one case and width, without blanks, punctuation and control characters; a text of nothing else as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(sign for sign in folded if unicodedata.category(sign)[0] not in "PZC") or text


def _runs(text: str) -> NDArray[np.uint64]:
    """Hashes of the distinct runs of RUN_LENGTH characters; of a shorter text, of the whole."""
    signs = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    length = min(RUN_LENGTH, len(signs))
    hashes = np.zeros(max(1, len(signs) - length + 1), dtype=np.uint64)
    for place in range(length):
        hashes = mixed(hashes ^ signs[place : place + len(hashes)]) + np.uint64(place)
    return np.unique(hashes)


def _bands(runs: Sequence[NDArray[np.uint64]]) -> list[NDArray[Any]]:
    """One number a text in each band: equal ones are candidates."""
    joined = np.concatenate(runs) if runs else np.zeros(0, dtype=np.uint64)
    starts = np.cumsum([0, *(len(part) for part in runs[:-1])]) if runs else np.zeros(0, dtype=np.int64)
    bands = []
    for band in range(NUM_BANDS):
        number = np.zeros(len(runs), dtype=np.uint64)
        for place in range(BAND_SIZE):
            key = mixed(np.array([band * BAND_SIZE + place + 1], dtype=np.uint64))
            number = mixed(number ^ np.minimum.reduceat(mixed(joined ^ key), starts)) if len(runs) else number
        bands.append(number)
    return bands


def _are_alike(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> bool:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common >= SIMILARITY * (len(first) + len(second) - common)
