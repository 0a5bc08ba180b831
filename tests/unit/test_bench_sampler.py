"""The sampler's benchmark: a billion samples take no memory, and it prints one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "bench_sampler.py"


def test_a_billion_samples_take_less_than_a_hundred_megabytes_and_so_does_the_process():
    ended = subprocess.run(
        [sys.executable, str(TOOL), "--batches", "20", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(ended.stdout)
    assert report["samples"] == 10**9 and report["streams"] == 32 and report["phases"] == 3
    assert 256 <= report["samples_a_batch"] <= 2048
    assert report["peak_bytes_of_the_process"] < 100e6 and report["sampler_bytes"] < 5e6
    assert set(report["batch_milliseconds"]) == {"median", "p99", "max"} == set(report["batch_cpu_milliseconds"])
