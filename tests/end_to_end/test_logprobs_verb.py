"""`logprobs`: transformers' log-probabilities, on one rank and under a layout, from an HF folder of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_xy import run_folder
from megatron_xy.config import ModelConfig
from megatron_xy.errors import StorageError
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.verify import transformers_logits
from megatron_xy.inference.logprobs import logprobs_file
from megatron_xy.inference.model_job import ModelJob
from megatron_xy.run_folder import RunDirBusy

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=301,
    max_position_embeddings=64, add_qkv_bias=True,
)  # fmt: skip
LENGTHS = (5, 1, 33, 2, 17, 64)


def work_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.work")


def verb(source: str, rows: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_xy", "logprobs", source, "--input", str(rows), "--output", str(output)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=120)


def test_rows_get_the_logprobs_of_transformers_on_one_rank_and_on_four(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        part: torch.randn(shard.local_shape, generator=generator) * 0.3
        for name in global_names(MODEL)
        for part, shard in hf_shards(name, MODEL).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(MODEL, dtype="float32", token_ids={})))
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 301, length).tolist() for length in LENGTHS]
    given = tmp_path / "rows.jsonl"
    given.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))

    one, four = tmp_path / "one.safetensors", tmp_path / "four.safetensors"
    for output in (one, four):  # what a killed run of more replicas over more rows would leave
        work_folder(output).mkdir()
        save_file({"2": torch.zeros(32), "9": torch.zeros(3)}, work_folder(output) / "part-00007.safetensors")
    answer = verb(f"hf:{folder}", given, one)
    assert answer.returncode == 0, answer.stderr
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
    answer = verb(f"hf:{folder}", given, four, "--nproc-per-node", "4", *layout)
    assert answer.returncode == 0, answer.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "four.safetensors", "hf", "one.safetensors", "rows.jsonl",
    ]  # fmt: skip
    found = {path: load_file(path) for path in (one, four)}
    for number, (row, logits) in enumerate(zip(rows, transformers_logits(folder, rows), strict=True)):
        theirs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(row)[1:, None])[:, 0]
        for tensors in found.values():
            assert tensors[str(number)].dtype == torch.float32 and tensors[str(number)].shape == (len(row) - 1,)
            torch.testing.assert_close(tensors[str(number)], theirs, rtol=0, atol=1e-4)

    arguments = {"input": str(given), "output": str(one)}
    job = ModelJob("logprobs", f"hf:{folder}", 1, [], str(work_folder(one)), arguments)
    run_folder.prepare(work_folder(one))
    (work_folder(one) / "part-00000.safetensors").touch()
    with run_folder.lock(work_folder(one), name=run_folder.SUPERVISOR_LOCK), pytest.raises(RunDirBusy) as caught:
        logprobs_file(job, say=print)
    assert caught.value.exit_code == 78 and f"another run is active in {work_folder(one)}" in str(caught.value)
    assert (work_folder(one) / "part-00000.safetensors").exists(), "the work of the one that is at it stays"

    work_folder(tmp_path / "two").touch()
    arguments["output"] = str(tmp_path / "two")
    job = ModelJob("logprobs", f"hf:{folder}", 1, [], str(work_folder(tmp_path / "two")), arguments)
    with pytest.raises(StorageError, match=r"--output \(.*two\) cannot be written: File exists"):
        logprobs_file(job, say=print)

    given.write_text('{"tokens": [1, 301]}\n{"text": "a"}\n')
    answer = verb(f"hf:{folder}", given, tmp_path / "bad.safetensors")
    assert answer.returncode == 65
    assert "rows.jsonl:1: holds token 301; the model knows 0..300" in answer.stderr
    assert "rows.jsonl:2: must be" in answer.stderr and not (tmp_path / "bad.safetensors").exists()
