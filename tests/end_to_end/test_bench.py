"""`megatron-xy bench` in tiny sizes: parts give their numbers, one that fails is a result, names are checked.

No time is asserted: these runs show that the suites run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_xy.bench import parts, verb
from megatron_xy.bench.cases import CPU_TINY
from megatron_xy.errors import ConfigError


def bench(*options: str, folder: Path, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "megatron_xy", "bench", *options, "--tiny", "--output", "bench.json"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    written: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    if "--json" in options:
        assert json.loads(ended.stdout) == written
    return written


def test_cpu_suite_measures_speed_beside_a_plain_loop(tmp_path: Path) -> None:
    results = bench("cpu", "--only", "speed", "--only", "baseline", "--json", folder=tmp_path)
    assert list(results["parts"]) == ["speed", "baseline"]
    assert results["packages"]["torch"] and results["date"]
    speed = results["parts"]["speed"]["result"]
    rows = speed["buckets"]
    assert [row["bucket"] for row in rows] == list(CPU_TINY.buckets)
    assert all(row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1 for row in rows)
    shape = CPU_TINY.model
    attention = 6 * shape["num_layers"] * shape["hidden_size"]
    assert rows[1]["flops_per_token"] - rows[0]["flops_per_token"] == attention * (
        rows[1]["bucket"] - rows[0]["bucket"]
    )
    by_flops = 2 * rows[1]["flops_per_token"] / (rows[0]["flops_per_token"] + rows[1]["flops_per_token"])
    assert speed["mix"]["by_flops_alone"] == pytest.approx(by_flops)
    assert min(row["tokens_per_second"] for row in rows) <= speed["mix"]["tokens_per_second"]
    assert speed["mix"]["tokens_per_second"] <= max(row["tokens_per_second"] for row in rows)
    baseline = results["parts"]["baseline"]["result"]["buckets"]
    assert all(row["ratio"] == row["tokens_per_second"] / row["plain_tokens_per_second"] for row in baseline)


def test_full_sizes_for_a_gpu_are_refused_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "out.json"
    with pytest.raises(ConfigError, match="bench gpu: there is no GPU here; take `bench cpu`, or --tiny"):
        verb.run("gpu", only=["speed_1b"], output=output, tiny=False, say=print)
    assert not output.exists()


@pytest.mark.slow
def test_gpu_suite_without_a_gpu_reports_what_is_missing_and_goes_on(tmp_path: Path) -> None:
    results = bench("gpu", "--only", "parity", "--only", "layer_specs", folder=tmp_path)["parts"]
    assert all(part["ok"] for part in results.values())
    parity = results["parity"]["result"]
    assert parity["fp32"]["largest_loss_difference"] == 0  # a CPU against itself
    assert parity["bf16"] == parity["CPU in bf16"] and 0 < parity["bf16"]["largest_loss_difference"] < 1e-2
    assert parity["agrees"]
    (engine_spec,) = results["layer_specs"]["result"]["specs"]
    assert "transformer_engine" in engine_spec["error"]


@pytest.mark.slow
def test_a_killed_run_is_resumed_bit_for_bit() -> None:
    result = parts.kill_and_resume(steps=6)
    assert result["bit_identical"] and result["first_difference"] is None
    assert result["losses"][0] != result["losses"][1]


def test_a_part_that_fails_is_a_result_and_unknown_parts_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> dict[str, Any]:
        raise parts.MeasurementFailed("out of memory")

    monkeypatch.setattr(verb, "parts_of", lambda suite, tiny: {"one": fails, "two": lambda: {"value": 1}})
    output, said = tmp_path / "out.json", []
    results = verb.run("cpu", only=[], output=output, tiny=True, say=said.append)
    assert results["parts"]["one"]["ok"] is False and "out of memory" in results["parts"]["one"]["error"]
    assert results["parts"]["two"]["result"] == {"value": 1}
    assert json.loads(output.read_text()) == results
    assert len(verb.tables(results)) == 2
    with pytest.raises(ConfigError, match="--only three: cpu has no such part; it has one, two"):
        verb.run("cpu", only=["three"], output=output, tiny=True, say=said.append)
