"""The command that converts: killed half-way and gone on with, and its memory against the size of the model."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_xy.checkpoint import files
from megatron_xy.config import ModelConfig
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.source import open_source
from megatron_xy.hf.verify import tensors_agree
from megatron_xy.tensors.dtypes import Bits
from megatron_xy.tensors.safetensors_file import write_safetensors
from tests.end_to_end import tiny_run

# 1.1 GB of bf16, of which no tensor takes more than 90 MB.
MODEL = ModelConfig(
    num_layers=12, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=16, num_query_groups=4, vocab_size=20011
)
MEMORY_LIMIT = 250 * 10**6  # bytes: less than importing torch takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder in which no two tensors begin alike, written a block at a time."""
    root = tmp_path_factory.mktemp("hf")
    shards = {part: shard for name in global_names(MODEL) for part, shard in hf_shards(name, MODEL).items()}
    pattern = np.random.default_rng(0).integers(-(2**15), 2**15, 1 << 21, dtype=np.int16)

    def parts_of(name: str) -> list[Bits]:
        start, numel = sum(map(ord, name)), math.prod(shards[name].local_shape)
        size = pattern.size - start
        return [pattern[start : start + min(size, numel - done)] for done in range(0, numel, size)]

    write_safetensors(
        root / "model.safetensors",
        {name: ("bfloat16", shard.local_shape) for name, shard in shards.items()},
        parts_of=parts_of,
        metadata={"format": "pt"},
    )
    (root / "config.json").write_text(json.dumps(hf_config(MODEL, dtype="bfloat16", token_ids={})))
    return root


def command(source: str, target: str) -> list[str]:
    options = ["--from", source, "--to", target, "--max-shard-size", "100MB"]
    return [sys.executable, "-m", "megatron_xy", "convert", *options]


# A process's peak begins with that of the one that started it, here of all tests so far: a small one stands between.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def convert(source: str, target: str) -> int:
    """Runs the command; returns its peak memory in bytes."""
    measured = [sys.executable, "-c", MEASURED, *command(source, target)]
    ended = subprocess.run(measured, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.splitlines()[-1])


def test_memory_is_a_part_of_the_model_and_a_killed_conversion_goes_on(folder: Path, tmp_path: Path) -> None:
    target, work = tmp_path / "ckpt", tmp_path / ".tmp-ckpt"
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        there = len(list(work.glob("rank-*.receipt.json")))
        process = subprocess.Popen(command(f"hf:{folder}", f"ckpt:{target}"), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(list(work.glob("rank-*.receipt.json"))) < there + 2:
            assert process.poll() is None and time.monotonic() < deadline, "it is stopped in the middle"
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate()
        assert process.returncode == code
        assert ("stopped by SIGTERM; the same command goes on with the files that are done" in told) == (code == 75)
    assert not target.exists()
    receipts = [path.name.removesuffix(".receipt.json") for path in work.glob("rank-*.receipt.json")]
    done = {name: (work / name).stat().st_ino for name in receipts}

    assert convert(f"hf:{folder}", f"ckpt:{target}") < MEMORY_LIMIT
    assert not work.exists()
    assert {name: (target / name).stat().st_ino for name in done} == done, "what was done is not done again"
    manifest = files.read_manifest(target)
    files.verify_files(target, manifest)
    files.verify_coverage(target, manifest)
    assert convert(f"ckpt:{target}", f"hf:{tmp_path / 'back'}") < MEMORY_LIMIT

    with safe_open(folder / "model.safetensors", framework="pt") as original:
        left = set(original.keys())
        for path in (tmp_path / "back").glob("*.safetensors"):
            with safe_open(path, framework="pt") as again:
                for name in again.keys():  # noqa: SIM118
                    before, after = (file.get_tensor(name).view(torch.int16) for file in (original, again))
                    assert torch.equal(before, after), name
                    left.remove(name)
    assert not left


def test_a_run_writes_hf_folders_of_its_checkpoints(tmp_path: Path) -> None:
    data = tiny_run.make_data(tmp_path)
    config, run_dir = tmp_path / "run.yaml", tmp_path / "run"
    tiny_run.write_config(config, data=data)
    model = ModelConfig(**yaml.safe_load(config.read_text())["model"])
    generator, origin = torch.Generator().manual_seed(0), tmp_path / "mistral"
    origin.mkdir()
    shards = {part: shard for name in global_names(model) for part, shard in hf_shards(name, model).items()}
    tensors = {part: torch.randn(shard.local_shape, generator=generator) * 0.1 for part, shard in shards.items()}
    save_file(tensors, origin / "model.safetensors", metadata={"format": "pt"})
    values = hf_config(model, dtype="float32", token_ids={"eos_token_id": [2, 9]}, model_type="mistral")
    (origin / "config.json").write_text(json.dumps(values))
    (origin / "generation_config.json").write_text('{"eos_token_id": [2, 9], "top_p": 0.9}')
    options = (
        "training.train_iters=6", "checkpoint.save_interval=2", "checkpoint.hf_interval=4", f"run_dir={run_dir}",
        f"model.load=hf:{origin}",
    )  # fmt: skip
    ended = tiny_run.run_to_end(tiny_run.run_command(config, *options, ranks=4))
    assert ended.code == 0, ended.err
    assert [path.name for path in (run_dir / "hf").iterdir()] == ["iter_0000004"]
    checkpoint, folder = run_dir / "checkpoints" / "iter_0000004", run_dir / "hf" / "iter_0000004"
    assert tensors_agree(open_source("ckpt", checkpoint), open_source("hf", folder), say=print)
    assert (folder / "tokenizer.model").read_bytes() == (data / "tokenizer.model").read_bytes()
    released = json.loads((folder / "config.json").read_text())
    assert (released["architectures"], released["eos_token_id"]) == (["MistralForCausalLM"], [2, 9])
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 9], "top_p": 0.9}
    card = (folder / "README.md").read_text()
    assert "| iteration | 4 |" in card and "| loss of the last step |" in card
