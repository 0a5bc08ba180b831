"""`megatron-xy doctor` in a process of its own: what is found, chosen and patched, for people and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import torch


def doctor(*options: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "megatron_xy", "doctor", *options], capture_output=True, text=True, check=True
    )
    return answer.stdout


def test_doctor_says_what_would_be_used_and_why() -> None:
    found = json.loads(doctor("--json"))
    assert found["packages"]["torch"]["found"] == torch.__version__
    assert found["layer_spec"]["auto"] == "torch" and "transformer_engine" in found["layer_spec"]["reason"]
    attention = found["attention"]["fp32"]
    assert attention["chosen"] == "sdpa"
    assert {finding["name"] for finding in attention["findings"]} >= {"flash_attn_2", "torch_varlen", "sdpa"}
    assert all(finding["reason"] for finding in attention["findings"])
    assert found["compile"]["works"] is False
    assert {"torch.zeros", "torch.cuda.current_device", "torch.Tensor.type"} <= set(found["patched"])

    text = doctor()
    for name, package in found["packages"].items():
        assert f"{name}: {package['found'] or 'not installed'}" in text
    assert "layer_spec auto: torch" in text and "attention in fp32: sdpa" in text
    assert all(name in text for name in found["patched"])
