"""How fast and how tight is packing? Document lengths -> plans, window by window as `data build` packs them.

    python tools/bench_packing.py --lengths LENGTHS.npy --buckets 2048,4096,8192,16384 [--json]
    python tools/bench_packing.py --made-up paper --documents 10000000 --buckets 1024,2048,4096,8192,16384

Only the packing is timed: lengths lie in memory, plan arrays come out, the engine is warm. One thread, CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_xy.data.packing.best_fit import Engine, EngineName, start_engine
from megatron_xy.data.packing.pack import (
    LARGEST_DOCUMENT,
    WINDOW_DOCUMENTS,
    Overflow,
    Packing,
    check_buckets,
    check_policy,
    pack,
)
from megatron_xy.data.packing.sample_plan import Plan
from megatron_xy.errors import ConfigError, DataError, with_exit_code

Lengths = NDArray[np.integer[Any]]


@with_exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the three ratios of a packing, what it lost and its speed."""
    options = _parser().parse_args(arguments)
    result = measure(options)
    print(json.dumps(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Packs `repeats` times and judges the last. Raises ConfigError and DataError for what cannot be packed."""
    buckets = check_buckets(options.buckets)
    check_policy(options.packing, options.overflow, buckets=buckets)
    engine = start_engine(options.engine)
    lengths = read_lengths(options.lengths) if options.lengths else made_up(options.made_up, options.documents)
    windows = [lengths[first : first + WINDOW_DOCUMENTS] for first in range(0, len(lengths), WINDOW_DOCUMENTS)]
    policy = {"packing": options.packing, "overflow": options.overflow, "engine": options.engine}
    pack(windows[0], buckets=buckets, **policy)
    seconds: list[float] = []
    plans: list[Plan] = []
    for _ in range(options.repeats):
        plans.clear()
        began = time.process_time()
        plans += [pack(window, buckets=buckets, **policy) for window in windows]
        seconds.append(time.process_time() - began)
    return {**judge(plans), **speed(seconds, num_documents=len(lengths), engine=engine), **policy}


def judge(plans: Sequence[Plan]) -> dict[str, Any]:
    """The ratios over all windows, what was lost, and how many samples of each bucket there are."""
    documents = sum(plan.num_documents for plan in plans)
    samples = sum(plan.num_samples for plan in plans)
    truncated = sum(plan.truncated_documents for plan in plans)
    tokens, length = sum(plan.num_tokens for plan in plans), sum(plan.packed_length for plan in plans)
    buckets = plans[0].buckets
    per_bucket = sum(np.bincount(plan.sample_bucket, minlength=len(buckets)) for plan in plans)
    return {
        "padding_ratio": 1 - tokens / length if length else 0.0,
        "truncation_ratio": truncated / documents if documents else 0.0,
        "concatenation_ratio": documents / samples if samples else 0.0,
        "tokens_lost": sum(plan.tokens_lost for plan in plans),
        "num_documents": documents,
        "num_samples": samples,
        "num_tokens": tokens,
        "truncated_documents": truncated,
        "dropped_documents": sum(plan.dropped_documents for plan in plans),
        "samples_by_bucket": dict(zip(map(str, buckets), np.asarray(per_bucket).tolist(), strict=True)),
        "plan_bytes": sum(
            array.nbytes
            for plan in plans
            for array in (
                plan.piece_document,
                plan.piece_start,
                plan.piece_length,
                plan.sample_ptr,
                plan.sample_bucket,
            )
        ),
    }


def speed(seconds: Sequence[float], *, num_documents: int, engine: Engine) -> dict[str, Any]:
    """The median rate, the spread behind it and on what it was measured."""
    median = statistics.median(seconds)
    return {
        "documents_per_cpu_second": num_documents / median if median else math.inf,
        "cpu_seconds_median": median,
        "cpu_seconds_min": min(seconds),
        "cpu_seconds_max": max(seconds),
        "repeats": len(seconds),
        "window_documents": WINDOW_DOCUMENTS,
        "ran_by": str(engine),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }


def read_lengths(path: Path) -> Lengths:
    """The lengths [documents] in a .npy file of integers."""
    if not path.is_file():
        raise ConfigError(f"lengths ({path}) is not a file; name a .npy file of document lengths in tokens")
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a .npy array ({error}); write it with numpy.save") from error
    if not isinstance(lengths, np.ndarray) or lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
        raise DataError(f"{path} must hold one row of integers, one length a document, and at least one")
    if lengths.min() < 0 or lengths.max() > LARGEST_DOCUMENT:
        raise DataError(
            f"{path} holds lengths {lengths.min()} to {lengths.max()}; they must be 0 to {LARGEST_DOCUMENT}"
        )
    return lengths


def made_up(kind: str, num_documents: int) -> Lengths:
    """Lengths [num_documents] i32 drawn at random, always the same.

    paper: a mixture of two log-normals, fitted to the table of "Beyond Fixed Length" (arXiv 2407.07495) for cuts at
    1k to 16k. log-normal: median 700, sigma 1.3, with more long documents.
    """
    random = np.random.default_rng(0)
    if kind == "log-normal":
        drawn = random.lognormal(math.log(700), 1.3, num_documents)
    else:
        long = random.random(num_documents) < 0.1117
        drawn = np.where(
            long,
            random.lognormal(7.18232, 1.28874, num_documents),
            random.lognormal(6.34324, 0.76967, num_documents),
        )
    return np.clip(drawn, 1, 300_000).astype(np.int32)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--lengths", type=Path, help="a .npy file of document lengths in tokens")
    given.add_argument("--made-up", choices=("paper", "log-normal"), help="lengths drawn at random instead")
    parser.add_argument("--documents", type=_positive, default=10_000_000, help="how many to draw for --made-up")
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--buckets", type=_sizes, help="ascending sample sizes in tokens, with commas between")
    sizes.add_argument("--seq-length", dest="buckets", type=_sizes, metavar="N", help="one size, as for concatenate")
    parser.add_argument("--packing", choices=get_args(Packing), default="best_fit")
    parser.add_argument("--overflow", choices=get_args(Overflow), default="split")
    parser.add_argument("--engine", choices=get_args(EngineName), default="auto")
    parser.add_argument("--repeats", type=_positive, default=5, help="the median counts")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
