"""HF folders: transformers' logits are ours under every layout, in both directions; whole conversions by the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_xy import checkpoint_files as files
from megatron_xy.config import ModelConfig, OptimizerConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.convert import checkpoint_to_hf, hf_to_checkpoint
from megatron_xy.hf.verify import TOLERANCE, largest_logit_difference, tensors_agree
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks
from tools.train_tokenizer import train

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, sp=True)]
OPTIMIZER = OptimizerConfig(lr=3e-3, lr_warmup_iters=0)
VOCAB_SIZE = 503  # not divisible by 2
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa-untied": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "mha-tied-linear": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "gqa-tied-llama3": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 2000.0},
    },
    "mha-untied-bf16": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3, "dtype": torch.bfloat16},
}
ROWS = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in (1, 7, 40, 63)]


def save_random_model(folder: Path, *, dtype: torch.dtype = torch.float32, **shape: Any) -> None:
    """A Llama by transformers, with weights so large that RoPE shows and norms that are not 1."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
        **shape,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)


def transformers_logits(folder: Path) -> list[NDArray[np.float32]]:
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].numpy() for row in ROWS]


def largest_difference(ours: list[NDArray[np.float32]], theirs: list[NDArray[np.float32]]) -> float:
    assert [a.shape for a in ours] == [b.shape for b in theirs] == [(len(row), VOCAB_SIZE) for row in ROWS]
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def load_role(layout: Layout, load: str, *, optimizer: OptimizerConfig | None = None, **model: Any) -> Any:
    from megatron_xy.weights import load_initial_weights, resolve_model

    resolved = resolve_model(ModelConfig(load=load, **model))
    role = models.make_role(layout, model=resolved, optimizer=optimizer, seed=3)
    assert role is not None
    load_initial_weights(role, verify=role.groups.role_rank == 0)
    return role


def logits(role: Any) -> list[NDArray[np.float32]]:
    from megatron_xy.model.logits import logits_of

    return [output.numpy() for output in logits_of(role, ROWS)]


def logits_of_folders(layout: Layout, loads: list[str]) -> list[list[NDArray[np.float32]]]:
    return [logits(load_role(layout, load)) for load in loads]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    for name, shape in SHAPES.items():
        save_random_model(root / name, **shape)
    return {name: root / name for name in SHAPES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[NDArray[np.float32]]]:
    return {name: transformers_logits(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_folder_of_transformers_gives_its_logits_in_every_layout(
    layout: Layout, folders: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    loads = [f"hf:{folder}" for folder in folders.values()]
    loads += [f"ckpt:{tmp_path / name}" for name in folders]
    for name, folder in folders.items():
        hf_to_checkpoint(folder, tmp_path / name, dtype=None, say=print)
    results = run_ranks(logits_of_folders, layout, loads, world_size=layout.world_size)
    differences = {
        load: largest_difference(ours, theirs)
        for load, ours, theirs in zip(loads, results[-1], [*expected.values()] * 2, strict=True)
    }
    assert max(differences.values()) < TOLERANCE, differences
    if layout.pp > 1:
        assert results[0] == [[]] * len(loads)
    spread = [float(np.abs(rows[-1]).max()) for rows in expected.values()]
    assert min(spread) > 1, "the logits are large enough for the tolerance to mean something"


def train_and_save(layout: Layout, model: ModelConfig, checkpoints: Path, tokenizer: Path) -> Any:
    from megatron_xy.checkpoint import CheckpointWriter, TrainingState
    from megatron_xy.train_step import train_step

    role = models.make_role(layout, model=model, optimizer=OPTIMIZER)
    assert role is not None
    for number in range(2):
        batches = models.micro_batches(number, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
        train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
    writer = CheckpointWriter(checkpoints, keep_latest=1, asynchronous=False, timeout_seconds=30)
    facts = {"model": model.model_dump(mode="json"), "tokenizer": str(tokenizer)}
    writer.save(role, TrainingState(iteration=2, data_step=2, optimizer_steps=2), facts=facts)
    writer.finish(role.groups)
    return logits(role)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    text = Path(__file__).read_text(encoding="utf-8")
    file.write_bytes(train([text], vocab_size=VOCAB_SIZE))
    return file


@pytest.fixture(scope="module")
def trained(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray[np.float32]]]:
    """A checkpoint that training wrote under tp2 x pp2, and its logits."""
    layout = LAYOUTS[-1]
    checkpoints = tmp_path_factory.mktemp("trained")
    scaling = {**LLAMA3, "original_max_position_embeddings": 16}
    changes = {"vocab_size": VOCAB_SIZE, "rotary_base": 500.0, "rope_scaling": scaling, "init_method_std": 0.1}
    model = models.MODEL.model_copy(update=changes)
    results = run_ranks(train_and_save, layout, model, checkpoints, tokenizer, world_size=layout.world_size)
    return checkpoints / "iter_0000002", results[-1]


def convert(source: str, target: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_xy", "convert", "--from", source, "--to", target, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_converts_both_ways_and_verifies(
    trained: tuple[Path, list[NDArray[np.float32]]], tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint, ours = trained
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    answer = convert(f"ckpt:{checkpoint}", f"hf:{exported}", "--verify")
    assert answer.returncode == 0, answer.stderr
    assert "every tensor is the same, bit for bit" in answer.stderr and "largest difference" in answer.stderr
    assert largest_difference(ours, transformers_logits(exported)) < TOLERANCE
    assert AutoTokenizer.from_pretrained(exported)("import torch").input_ids[0] == 1
    assert (exported / "tokenizer.model").read_bytes() == tokenizer.read_bytes()

    answer = convert(f"hf:{exported}", f"ckpt:{imported}")
    assert answer.returncode == 0, answer.stderr
    manifest = files.read_manifest(imported)
    files.verify_files(imported, manifest)
    files.verify_coverage(imported, manifest)
    original = dict(files.tensor_hashes(checkpoint, files.read_manifest(checkpoint)))
    weights = {name: facts for name, facts in original.items() if not name.startswith("optimizer.")}
    assert dict(files.tensor_hashes(imported, manifest)) == weights
    assert (imported / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()


def test_a_tampered_folder_does_not_verify(trained: tuple[Path, Any], tmp_path: Path) -> None:
    checkpoint, _ = trained
    said: list[str] = []
    checkpoint_to_hf(checkpoint, tmp_path / "hf", dtype=None, tokenizer=None, say=said.append)
    assert tensors_agree(checkpoint, tmp_path / "hf", target="hf", say=said.append)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] += 1e-6
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert not tensors_agree(checkpoint, tmp_path / "hf", target="hf", say=said.append)
    assert said[-1] == "1 tensors differ, the first is decoder.layers.1.self_attention.linear_qkv.weight"


def test_the_largest_difference_sees_another_model(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_xy.hf import verify

    folder = folders["gqa-untied"]
    assert largest_logit_difference(folder) < TOLERANCE
    theirs = verify.transformers_logits
    monkeypatch.setattr(verify, "transformers_logits", lambda _, rows: theirs(folders["mha-tied-linear"], rows))
    assert largest_logit_difference(folder) > 1


def load_across_dtypes(layout: Layout, folder: Path, kind: str) -> dict[str, Any]:
    """Parameters and main weights of a bf16 run from an fp32 folder, as {name: array} of what this rank holds whole."""
    role = load_role(layout, f"{kind}:{folder}", optimizer=OPTIMIZER, params_dtype="bf16")
    name = "decoder.final_layernorm.weight"
    found = {}
    for named in role.named_parameters():
        if named.name == name:
            found = {"parameter": named.parameter.detach().float().numpy(), "main": named.parameter.main_param.numpy()}
    assert all(named.parameter.dtype == torch.bfloat16 for named in role.named_parameters())
    return found
