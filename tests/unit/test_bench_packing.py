"""bench_packing: one JSON object that says what packing makes of given lengths, window by window, and how fast."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_xy.data.packing.pack import WINDOW_DOCUMENTS, pack

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_packing


@pytest.fixture
def lengths_file(tmp_path):
    """A window and a bit of it; lengths about the buckets' sizes, some of 0."""
    lengths = np.random.default_rng(3).integers(0, 41, WINDOW_DOCUMENTS + 1000).astype(np.int32)
    np.save(tmp_path / "lengths.npy", lengths)
    return tmp_path / "lengths.npy"


def bench(capsys, *arguments):
    assert bench_packing.main([*map(str, arguments), "--repeats", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("overflow", ["split", "drop", "truncate"])
def test_figures_of_all_windows_together(lengths_file, capsys, overflow):
    result = bench(capsys, "--lengths", lengths_file, "--buckets", "8,16,32", "--overflow", overflow)
    lengths = np.load(lengths_file)
    plans = [
        pack(part, buckets=[8, 16, 32], overflow=overflow)
        for part in (lengths[:WINDOW_DOCUMENTS], lengths[WINDOW_DOCUMENTS:])
    ]
    long, full = lengths > 32, lengths > 0
    samples = sum(plan.num_samples for plan in plans)
    capacity = sum(plan.packed_length for plan in plans)
    lost = {"split": 0, "drop": lengths[long].sum(), "truncate": (lengths[long] - 32).sum()}[overflow]
    packed = (full & ~long).sum() if overflow == "drop" else full.sum()
    assert result["num_documents"] == packed
    assert result["num_samples"] == samples == sum(result["samples_by_bucket"].values())
    assert result["tokens_lost"] == lost
    assert result["num_tokens"] == lengths.sum() - lost
    assert result["padding_ratio"] == pytest.approx(1 - (lengths.sum() - lost) / capacity)
    assert result["truncation_ratio"] == pytest.approx(0 if overflow == "drop" else long.sum() / packed)
    assert result["concatenation_ratio"] == pytest.approx(packed / samples)
    assert result["documents_per_cpu_second"] == pytest.approx(len(lengths) / result["cpu_seconds_median"])
    assert result["window_documents"] >= 100_000


def test_fixed_length_samples_and_engines(lengths_file, capsys):
    by_engine = [
        bench(capsys, "--lengths", lengths_file, "--buckets", "16,32", "--engine", engine)
        for engine in ("auto", "python")
    ]
    assert by_engine[1]["ran_by"].startswith("python ")
    same = [
        {name: value for name, value in result.items() if name.startswith(("num_", "padding", "samples_by", "plan_"))}
        for result in by_engine
    ]
    assert same[0] == same[1]
    fixed = bench(capsys, "--lengths", lengths_file, "--packing", "concatenate", "--seq-length", "64")
    lengths = np.load(lengths_file)
    windows = [int(part.sum()) for part in (lengths[:WINDOW_DOCUMENTS], lengths[WINDOW_DOCUMENTS:])]
    assert fixed["num_samples"] == sum(-(-tokens // 64) for tokens in windows)
    assert fixed["tokens_lost"] == 0


def test_made_up_lengths_stay_the_same(capsys):
    once, again = (bench(capsys, "--made-up", "paper", "--documents", 20_000, "--buckets", "16384") for _ in range(2))
    assert once["num_tokens"] == again["num_tokens"]
    assert 0.001 < once["truncation_ratio"] < 0.006  # 0.28% of the paper's documents are longer than 16k
    other = bench(capsys, "--made-up", "log-normal", "--documents", 20_000, "--buckets", "16384")
    assert 0.005 < other["truncation_ratio"] < 0.011


@pytest.mark.parametrize(
    ("array", "code", "message"),
    [
        (None, 78, "is not a file"),
        (b"text", 65, "is not a .npy array"),
        (np.array([1.5, 2.0]), 65, "one row of integers"),
        (np.array([[1, 2]]), 65, "one row of integers"),
        (np.array([], dtype=np.int32), 65, "at least one"),
        (np.array([3, -1]), 65, "lengths -1 to 3"),
        (np.array([1 << 31]), 65, "lengths 2147483648"),
        (np.array([{"length": 1}]), 65, "is not a .npy array"),
    ],
)
def test_bad_lengths_are_refused(tmp_path, capsys, array, code, message):
    path = tmp_path / "lengths.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    assert bench_packing.main(["--lengths", str(path), "--buckets", "8"]) == code
    assert message in capsys.readouterr().err


def test_bad_arguments_are_refused(lengths_file, capsys):
    lengths = ["--lengths", str(lengths_file)]
    assert bench_packing.main([*lengths, "--buckets", "8,4"]) == 2
    assert bench_packing.main([*lengths, "--buckets", "4,8", "--packing", "concatenate"]) == 78
    assert "one sequence length" in capsys.readouterr().err
    for wrong in (["--buckets", "8,x"], ["--buckets", "8", "--repeats", "0"], []):
        with pytest.raises(SystemExit) as stopped:
            bench_packing.main([*lengths, *wrong])
        assert stopped.value.code == 2
