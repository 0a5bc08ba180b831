"""Best fit over several bucket sizes, the core of packing: how many pieces of each length -> which sample takes which.

The core is written once. numba compiles it where that is installed (the extra `fast`), Python runs it as it stands
where not: the same samples, some 20 million documents packed a CPU second or 1.4 million (tools/bench_packing.py).
"""

from __future__ import annotations

import functools
import importlib
import platform
import time
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xy.errors import ConfigError

Integers = NDArray[np.int32]
Numbers = MutableSequence[int]  # a list where Python runs the core, an i64 array where numba does
EngineName = Literal["auto", "numba", "python"]
Core = Callable[..., tuple[int, int]]

# Position of the lowest set bit of x < 2^32: TABLE[((x & -x) * DE_BRUIJN & 0xFFFFFFFF) >> 27] (de Bruijn sequence).
DE_BRUIJN = 0x077CB531
LOWEST_BIT = (
    *(0, 1, 28, 2, 29, 14, 24, 3, 30, 22, 20, 15, 25, 17, 4, 8),
    *(31, 27, 13, 23, 21, 19, 16, 7, 26, 12, 18, 6, 11, 5, 10, 9),
)


@dataclass(frozen=True)
class Engine:
    """What runs the core in this process, and what it took to get it ready."""

    name: Literal["numba", "python"]
    version: str
    start_cpu_seconds: float  # numba's import, and compiling the core or reading it from numba's cache
    note: str  # what a user may want to know or to change; empty where all is at its best
    core: Core

    def __str__(self) -> str:
        return f"{self.name} {self.version}, ready in {self.start_cpu_seconds:.2f} CPU seconds; {self.note}".rstrip(
            "; "
        )


@dataclass(frozen=True)
class Runs:
    """Pieces, longest first, in runs of equal length: run i puts run_length[i] of them into sample run_sample[i].

    Sample s was opened for a piece of length opened_for[s]. run_* are [runs] i32, opened_for is [samples] i32.
    """

    run_sample: Integers
    run_length: Integers
    opened_for: Integers


def best_fit(counts: NDArray[np.int64], *, sizes: Sequence[int], engine: EngineName = "auto") -> Runs:
    """Pack counts[n] pieces of each length n into samples of the ascending `sizes`; counts is [largest size + 1] i64.

    The longest piece goes first, each into the sample with the least room that still holds it, of several the one
    that came to this room last; where none does, a sample of the smallest size that holds it is opened.
    O(pieces + largest size). Raises ConfigError as `start_engine`.
    """
    assert len(counts) == sizes[-1] + 1, "a count for every length from 0 to the largest size"
    started = start_engine(engine)
    num_pieces = int(counts[1:].sum())
    level_start, bits = _empty_bitmap(len(counts))
    inputs = [counts.tolist(), list(sizes), level_start, bits, [-1] * len(counts)]
    if started.name == "numba":
        arrays = [np.array(values, dtype=np.int64) for values in inputs]
        next_open, run_sample, run_length, opened_for = np.empty((4, num_pieces), dtype=np.int32)
        num_runs, num_samples = started.core(*arrays, next_open, run_sample, run_length, opened_for)
        return Runs(run_sample[:num_runs], run_length[:num_runs], opened_for[:num_samples])
    outputs = [[0] * num_pieces for _ in range(4)]
    num_runs, num_samples = started.core(*inputs, *outputs)
    used = zip(outputs[1:], (num_runs, num_runs, num_samples), strict=True)
    return Runs(*(np.array(values[:length], dtype=np.int32) for values, length in used))


@functools.cache
def start_engine(name: EngineName = "auto") -> Engine:
    """What runs the core from now on: numba if it can be imported, unless `name` says which. Slow at first use only.

    numba keeps the compiled core in NUMBA_CACHE_DIR, else beside this file, else in the user's cache folder, whichever
    it can write; where it can write none, each process compiles. Raises ConfigError where numba is named but missing.
    """
    python = functools.partial(Engine, "python", platform.python_version(), 0.0, core=_pack_runs)
    if name == "python":
        return python(note="")
    began = time.process_time()
    try:
        numba = importlib.import_module("numba")  # here, and not above: a quarter second that only packing should pay
    except (ImportError, OSError) as error:  # missing, it refuses this numpy, or its library cannot be loaded
        if name == "numba":
            raise ConfigError(
                f"engine (numba): it cannot be imported ({error}); pip install 'megatron-xy[fast]', or take auto"
            ) from error
        return python(note=f"numba cannot be imported ({error}): packing is slower; pip install 'megatron-xy[fast]'")
    core, note = _compile(numba)
    return Engine("numba", numba.__version__, time.process_time() - began, note, core)


def _compile(numba: Any) -> tuple[Core, str]:
    """The core, compiled or read from numba's cache, and a note where it was not read."""
    for helper in (_next_set, _set, _clear):
        numba.extending.register_jitable(helper)
    level_start, bits = _empty_bitmap(2)
    inputs = [np.array(values, dtype=np.int64) for values in ([0, 1], [1], level_start, bits, [-1, -1])]
    one_piece = [*inputs, *np.zeros((4, 1), dtype=np.int32)]  # of one token: it fixes the types to compile for
    try:
        core = numba.njit(cache=True)(_pack_runs)
        core(*one_piece)
        return core, "" if core.stats.cache_hits else f"compiled and kept in {core.stats.cache_path}"
    except Exception as error:  # no folder, a full disk, a damaged file: of many types, and none should stop a build
        core = numba.njit(_pack_runs)
        core(*one_piece)
        return core, f"compiled anew in every process, as numba's cache fails ({error}); name a folder: NUMBA_CACHE_DIR"


def _pack_runs(
    counts: Numbers,
    sizes: Numbers,
    level_start: Numbers,
    bits: Numbers,
    first_with_room: Numbers,
    next_open: Numbers,
    run_sample: Numbers,
    run_length: Numbers,
    opened_for: Numbers,
) -> tuple[int, int]:
    """The core: fills the last three and returns how many (runs, samples) there are. Plain enough for numba.

    Open samples of equal remaining room form a linked list (last in, first out); a bitmap of the rooms that occur,
    with a bitmap over each of its words and so on, finds the least sufficient room in O(log32 of the largest size).
    """
    num_runs = num_samples = 0
    bucket = len(sizes) - 1
    for length in range(len(counts) - 1, 0, -1):
        left = counts[length]
        while bucket > 0 and sizes[bucket - 1] >= length:
            bucket -= 1
        while left > 0:
            room = _next_set(bits, level_start, length)
            if room < 0:
                sample, room = num_samples, sizes[bucket]
                opened_for[sample] = length
                num_samples += 1
            else:
                sample = first_with_room[room]
                first_with_room[room] = next_open[sample]
                if next_open[sample] < 0:
                    _clear(bits, level_start, room)
            # After one piece this sample has less room than any other that fits: equal pieces follow it there.
            run = min(room // length, left)
            run_sample[num_runs] = sample
            run_length[num_runs] = run
            num_runs += 1
            left -= run
            room -= run * length
            if room > 0:
                next_open[sample] = first_with_room[room]
                first_with_room[room] = sample
                _set(bits, level_start, room)
    return num_runs, num_samples


def _empty_bitmap(size: int) -> tuple[list[int], list[int]]:
    """(start of each level in the words, words) of a bitmap over 0..size - 1, 32 bits a word."""
    level_start, num_words = [], 0
    while True:
        level_start.append(num_words)
        size = (size >> 5) + 1  # one bit to spare, so that looking beyond the last word stays inside
        num_words += size
        if size == 1:
            return level_start, [0] * num_words


def _set(bits: Numbers, level_start: Numbers, index: int) -> None:
    for start in level_start:
        bits[start + (index >> 5)] |= 1 << (index & 31)
        index >>= 5


def _clear(bits: Numbers, level_start: Numbers, index: int) -> None:
    for start in level_start:
        word = start + (index >> 5)
        bits[word] &= ~(1 << (index & 31))
        if bits[word]:
            return
        index >>= 5


def _next_set(bits: Numbers, level_start: Numbers, index: int) -> int:
    """The smallest set index >= `index`, or -1."""
    for level in range(len(level_start)):
        rest = bits[level_start[level] + (index >> 5)] >> (index & 31)
        if rest:
            index += LOWEST_BIT[((rest & -rest) * DE_BRUIJN & 0xFFFFFFFF) >> 27]
            for below in range(level - 1, -1, -1):
                word = bits[level_start[below] + index]
                index = (index << 5) + LOWEST_BIT[((word & -word) * DE_BRUIJN & 0xFFFFFFFF) >> 27]
            return index
        index = (index >> 5) + 1
    return -1
