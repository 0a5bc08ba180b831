"""What does the next batch cost? Milliseconds for its indices and bytes of memory, at a billion samples that exist in
counts alone: the sampler reads no data, so neither does this.

    python tools/bench_sampler.py [--samples 1000000000] [--sources 8] [--phases 3] [--json]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

from megatron_xy.data.draws.phase_draws import SamplerPhase
from megatron_xy.data.draws.sampler import BucketSampler, Stream

BUCKETS = (2048, 4096, 8192, 16384)
# As many samples a bucket as 23 : 9 : 2 : 0.6, what a report of a model of this kind gives.
BUCKET_PARTS = (0.665, 0.26, 0.058, 0.017)


def main() -> int:
    """Prints one JSON object, or a line for each of its entries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**9)
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--phases", type=int, default=3)
    parser.add_argument("--global-batch-tokens", type=int, default=4 * 1024 * 1024)
    parser.add_argument("--batches", type=int, default=500, help="timed, all over the run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measure(
        num_samples=options.samples,
        num_sources=options.sources,
        num_phases=options.phases,
        global_batch_tokens=options.global_batch_tokens,
        num_batches=options.batches,
    )
    print(json.dumps(report) if options.json else "\n".join(f"{name}: {value}" for name, value in report.items()))
    return 0


def measure(
    *, num_samples: int, num_sources: int, num_phases: int, global_batch_tokens: int, num_batches: int
) -> dict[str, Any]:
    """Times `num_batches` batches spread over two epochs, asked for out of order, each for the first time."""
    streams = [
        Stream(f"source-{number}", bucket, max(1, round(num_samples / num_sources * part)))
        for number in range(num_sources)
        for bucket, part in zip(BUCKETS, BUCKET_PARTS, strict=True)
    ]
    num_steps = 2 * sum(stream.num_samples * stream.bucket for stream in streams) // global_batch_tokens
    phases = [
        SamplerPhase(
            num_steps * number // num_phases,
            {f"source-{index}": 1.0 + (index + number) % num_sources for index in range(num_sources)},
            global_batch_tokens,
        )
        for number in range(num_phases)
    ]
    gc.collect()
    tracemalloc.start()
    sampler = BucketSampler(streams, seed=1, phases=phases)
    steps = [(number * 7919 % num_batches) * num_steps // num_batches for number in range(num_batches)]
    for step in steps[:10]:
        sampler.batch(step)
    traced_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wall_times, cpu_times, samples_drawn = [], [], 0
    for step in steps:
        began, cpu_began = time.perf_counter(), time.thread_time()
        batch = sampler.batch(step)
        cpu_times.append(1000 * (time.thread_time() - cpu_began))
        wall_times.append(1000 * (time.perf_counter() - began))
        samples_drawn += len(batch.indices)
    return {
        "samples": sum(stream.num_samples for stream in streams),
        "streams": len(streams),
        "phases": num_phases,
        "steps": num_steps,
        "global_batch_tokens": global_batch_tokens,
        "samples_a_batch": samples_drawn / num_batches,
        "batch_milliseconds": spread(wall_times),
        "batch_cpu_milliseconds": spread(cpu_times),
        "sampler_bytes": traced_peak,
        "peak_bytes_of_the_process": peak_bytes(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def peak_bytes() -> int:
    """Of this process; getrusage's figure would be the parent's, where that was larger when it forked."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def spread(times: list[float]) -> dict[str, float]:
    """Median, 99th percentile and most."""
    ordered = sorted(times)
    return {"median": statistics.median(ordered), "p99": ordered[len(ordered) * 99 // 100], "max": ordered[-1]}


if __name__ == "__main__":
    sys.exit(main())
