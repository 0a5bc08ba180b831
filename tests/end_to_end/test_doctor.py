"""`megatron-xy doctor` in a process of its own: what is found, chosen and patched, for people and as JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def doctor(*options: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "megatron_xy", "doctor", *options], capture_output=True, text=True, check=True
    )
    return answer.stdout


def test_doctor_says_what_would_be_used_and_why() -> None:
    found = json.loads(doctor("--json"))
    without_build = torch.__version__.partition("+")[0]  # +cpu, +cu130: of which a wheel's metadata may say nothing
    assert found["packages"]["torch"]["found"].partition("+")[0] == without_build
    assert found["layer_spec"]["auto"] == "torch" and "transformer_engine" in found["layer_spec"]["reason"]
    attention = found["attention"]["fp32"]
    assert attention["chosen"] == "sdpa"
    assert {finding["name"] for finding in attention["findings"]} >= {"flash_attn_2", "torch_varlen", "sdpa"}
    assert all(finding["reason"] for finding in attention["findings"])
    assert found["compile"]["works"] is False
    assert {"torch.zeros", "torch.cuda.current_device", "torch.Tensor.type"} <= set(found["patched"])

    assert {entry["verdict"] for entry in found["health"]} <= {"ok", "warn"}

    few_files = ["prlimit", "--nofile=512", sys.executable, "-m", "megatron_xy", "doctor"]
    answer = subprocess.run(few_files, capture_output=True, text=True, check=False)
    assert answer.returncode == 1 and ": fail open files: 512; ulimit -n 4096" in answer.stdout, answer
    text = answer.stdout
    assert ": ok   torch: " in text and "MB/s with fsync" in text
    for name, package in found["packages"].items():
        assert f"{name}: {package['found'] or 'not installed'}" in text
    assert "layer_spec auto: torch" in text and "attention in fp32: sdpa" in text
    assert all(name in text for name in found["patched"])


def test_doctor_over_two_ranks_compares_them_and_measures_the_links(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "megatron_xy", "doctor", "--json", "--folder", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    health = {entry["subject"]: entry for entry in json.loads(answer.stdout)["health"]}
    assert health["versions on all nodes"]["found"] == "the same on 2 ranks"
    for link in ("all-reduce", "point to point"):
        assert health[link]["verdict"] == "ok" and "GB/s over gloo, 1 host(s)" in health[link]["found"]
    assert health["disk writes"]["host"] == socket.gethostname()
