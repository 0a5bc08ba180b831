"""`logprobs`: transformers' log-probabilities, on one rank and under a layout, from an HF folder of each kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from megatron_xy import run_folder
from megatron_xy.config import ModelConfig
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.convert import to_hf
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.source import open_source
from megatron_xy.hf.verify import transformers_logits
from megatron_xy.inference.answers import identity_of
from megatron_xy.inference.partial_results import PartialResults
from megatron_xy.storage import file_sha256
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks
from tests.distributed.test_checkpoint import train_and_save
from tests.distributed.test_hf import load_role

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=301,
    max_position_embeddings=64, add_qkv_bias=True,
)  # fmt: skip
LENGTHS = (5, 1, 33, 2, 17, 64)


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

    results = PartialResults(one)  # what a killed run leaves
    results.begin({"model": identity_of(f"hf:{folder}"), "input": file_sha256(given)})
    run_folder.prepare(results.run_dir)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"tokens": [1, 301]}\n{"text": "a"}\n')
    with run_folder.lock(results.run_dir, name=run_folder.SUPERVISOR_LOCK):
        answer = verb(f"hf:{folder}", bad, one)
        assert answer.returncode == 65
        assert "bad.jsonl:1: holds token 301; the model knows 0..300" in answer.stderr
        assert "bad.jsonl:2: must be" in answer.stderr
        answer = verb(f"hf:{folder}", given, one)
        assert answer.returncode == 78 and f"another run is active in {results.run_dir}" in answer.stderr
        assert results.folder.exists(), "the work of the one that is at it stays"
    writer = results.writer(0)
    writer.add(2, {"logprobs": [0.1] * 32})
    writer.close()
    assert verb(f"hf:{folder}", given, one).returncode == 0
    again = load_file(one)
    assert torch.equal(again.pop("2"), torch.full((32,), 0.1)), "it goes on, and every bit of what was done stays"
    assert all(torch.equal(tensor, found[one][name]) for name, tensor in again.items())

    PartialResults(tmp_path / "two").folder.touch()
    answer = verb(f"hf:{folder}", given, tmp_path / "two")
    assert answer.returncode == 74 and "two) cannot be written: File exists" in answer.stderr


def test_a_bf16_checkpoint_and_what_is_exported_of_it_are_one_model(tmp_path: Path) -> None:
    """To verbs, which compute in fp32 on a CPU; a run in fp32 goes on from the main weights."""
    model = models.MODEL.model_copy(update={"params_dtype": "bf16"})
    run_ranks(train_and_save, Layout(), model, tmp_path, world_size=1)
    checkpoint, exported = tmp_path / "iter_0000003", tmp_path / "released"
    to_hf(open_source("ckpt", checkpoint), exported, dtype=None, tokenizer=None, say=print)
    given = tmp_path / "rows.jsonl"
    given.write_text(json.dumps({"tokens": list(range(30))}) + "\n")
    for source in (f"ckpt:{checkpoint}", f"hf:{exported}"):
        answer = verb(source, given, tmp_path / source.partition(":")[0])
        assert answer.returncode == 0, answer.stderr
    found, theirs = (load_file(tmp_path / kind)["0"] for kind in ("ckpt", "hf"))
    assert torch.equal(found, theirs)

    (norm,) = run_ranks(final_norm, f"ckpt:{checkpoint}", world_size=1)
    name = "decoder.final_layernorm.weight"
    stored = load_file(checkpoint / "rank-00000-of-00001.safetensors")
    assert torch.equal(torch.from_numpy(norm), stored[f"optimizer.main_param.{name}"])
    assert not torch.equal(torch.from_numpy(norm), stored[name].float())


def final_norm(load: str) -> NDArray[np.float32]:
    role = load_role(Layout(), load, params_dtype="fp32")
    names = {named.name: named.parameter for named in role.named_parameters()}
    return names["decoder.final_layernorm.weight"].numpy(force=True)  # type: ignore[no-any-return]
