"""HF folders: transformers' logits are ours under every layout, in both directions; the command itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_xy.checkpoint import files
from megatron_xy.config import ModelConfig, OptimizerConfig
from megatron_xy.errors import DataError
from megatron_xy.hf import verb
from megatron_xy.hf.convert import to_checkpoint, to_hf
from megatron_xy.hf.source import open_source
from megatron_xy.hf.verify import TOLERANCE, transformers_logits
from megatron_xy.tensors.block_reader import tensor_hashes
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks
from tools.train_tokenizer import train

LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, sp=True)]
OPTIMIZER = OptimizerConfig(lr=3e-3, lr_warmup_iters=0)
VOCAB_SIZE = 503  # not divisible by 2
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
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
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2-tied": {"model_type": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "reward": {"num_key_value_heads": 2, "num_labels": 1},
    "reward-qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "num_labels": 1},
    "mha-untied-bf16": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3, "dtype": "bfloat16"},
}
PLAIN_WEIGHTS = {
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.1.mlp.linear_fc2.weight": "model.layers.1.mlp.down_proj.weight",
}
ROWS = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in (1, 7, 40, 63)]


# In a process of its own, as a user's: the stand-in for CUDA is not made for transformers. argv: root, shapes, rows.
MAKE_FOLDERS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
root, shapes, rows = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name, shape in shapes.items():
    torch.manual_seed(0)
    dtype = getattr(torch, shape.pop("dtype", "float32"))
    # Weights so large that RoPE shows in the logits, and norms that are not 1.
    is_value = shape.get("num_labels") == 1
    kind = AutoModelForSequenceClassification if is_value else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(shape.pop("model_type", "llama"), **shape, initializer_range=0.15))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(root / name)
    model = kind.from_pretrained(root / name).float().eval()
    head = model.score if is_value else model.lm_head
    with torch.no_grad():
        hidden = [model.model(torch.tensor([row])).last_hidden_state[0] for row in rows]
        logits = {str(i): head(states).contiguous() for i, states in enumerate(hidden)}
    save_file(logits, root / name / "logits.safetensors")
"""


def hf_to_checkpoint(folder: Path, target: Path) -> None:
    to_checkpoint(open_source("hf", folder), target, dtype=None, say=print)


def largest_difference(ours: list[NDArray[np.float32]], theirs: list[NDArray[np.float32]]) -> float:
    assert [a.shape for a in ours] == [b.shape for b in theirs] and [len(a) for a in ours] == list(map(len, ROWS))
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def assert_same_weights(folder: Path, other: Path) -> None:
    original, again = (load_file(path / "model.safetensors") for path in (folder, other))
    assert original.keys() == again.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), name


def saved_logits(folder: Path) -> list[NDArray[np.float32]]:
    saved = load_file(folder / "logits.safetensors")
    return [saved[str(number)].numpy() for number in range(len(ROWS))]


def load_role(layout: Layout, load: str, *, optimizer: OptimizerConfig | None = None, **model: Any) -> Any:
    from megatron_xy.model.source import resolve_model
    from megatron_xy.model.weights import load_initial_weights

    resolved = resolve_model(ModelConfig(load=load, **model))
    role = models.make_role(layout, model=resolved, optimizer=optimizer, seed=3)
    assert role is not None
    load_initial_weights(role, seed=3)
    return role


def logits(role: Any) -> list[NDArray[np.float32]]:
    from megatron_xy.model.logits import logits_of

    return [output.numpy() for output in logits_of(role, ROWS)]


def logits_of_folders(layout: Layout, loads: list[str], saved: Path) -> list[list[NDArray[np.float32]]]:
    """Of every load; the HF folders' weights are saved as well, as this layout's ranks do it."""
    from megatron_xy.checkpoint.writer import CheckpointWriter, TrainingState

    found = []
    for load in loads:
        role = load_role(layout, load)
        found.append(logits(role))
        if load.startswith("hf:"):
            folder = saved / Path(load).name
            writer = CheckpointWriter(folder, keep_latest=1, asynchronous=False, timeout_seconds=30)
            writer.save(role, TrainingState(iteration=1), facts={"model": role.model.model_dump(mode="json")})
            writer.finish(role.groups)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that transformers wrote, each with its logits of ROWS beside the weights."""
    root = tmp_path_factory.mktemp("hf")
    shapes = {name: {**SIZES, **shape} for name, shape in SHAPES.items()}
    command = [sys.executable, "-P", "-c", MAKE_FOLDERS, str(root), json.dumps(shapes), json.dumps(ROWS)]
    subprocess.run(command, check=True, timeout=120)
    return {name: root / name for name in SHAPES}


@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param(Layout(tp=2, pp=2, vp=2), marks=pytest.mark.slow)], ids=str)
def test_a_folder_of_transformers_gives_its_logits_in_every_layout_and_comes_back_byte_for_byte(
    layout: Layout, folders: dict[str, Path], tmp_path: Path
) -> None:
    theirs = {name: saved_logits(folder) for name, folder in folders.items()}
    loads = [f"hf:{folder}" for folder in folders.values()]
    loads += [f"ckpt:{tmp_path / name}" for name in folders]
    for name, folder in folders.items():
        hf_to_checkpoint(folder, tmp_path / name)
    saved = tmp_path / "saved"
    results = run_ranks(logits_of_folders, layout, loads, saved, world_size=layout.world_size)
    for name, folder in folders.items():
        back, checkpoint = tmp_path / f"{name}-back", open_source("ckpt", saved / name / "iter_0000001")
        dtype = "bfloat16" if name.endswith("bf16") else None  # the run computes in fp32
        to_hf(checkpoint, back, dtype=dtype, tokenizer=None, say=lambda text: None)
        assert_same_weights(folder, back)
    for load, ours in zip(loads, results[-1], strict=True):
        assert largest_difference(ours, theirs[Path(load).name]) < TOLERANCE, load
    if layout.pp > 1:
        assert results[0] == [[]] * len(loads)


def test_every_family_comes_back_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in folders.items():
        hf_to_checkpoint(folder, tmp_path / name)
        to_hf(open_source("ckpt", tmp_path / name), tmp_path / f"{name}-back", dtype=None, tokenizer=None, say=print)
        assert_same_weights(folder, tmp_path / f"{name}-back")
        before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / f"{name}-back"))
        assert before["architectures"] == after["architectures"] and before["model_type"] == after["model_type"]
    back = transformers_logits(tmp_path / "reward-qwen2-back", ROWS)
    assert largest_difference([row.numpy() for row in back], saved_logits(folders["reward-qwen2"])) == 0.0


# In a process of its own, as the command's. argv: folder.
DIFFERENCES = """
import sys
from pathlib import Path
from megatron_xy import device
device.start()
from megatron_xy.hf.source import open_source
from megatron_xy.hf.verify import largest_logit_difference
source, rows = open_source("hf", Path(sys.argv[1])), [list(range(length)) for length in (1, 17, 128)]
print(*(largest_logit_difference(source, rows, max_bytes=size) for size in (10**9, 520_000)))
"""


def test_verification_in_blocks_of_layers(folders: dict[str, Path]) -> None:
    """Of 0.75 MB of weights in fp32 a block may take 0.52: two blocks of two layers."""
    folder = folders["qwen2"]
    command = [sys.executable, "-c", DIFFERENCES, str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    whole, in_blocks = map(float, output.split())
    assert 0 < whole < TOLERANCE and 0 < in_blocks < TOLERANCE
    assert whole != in_blocks, "the model was cut"
    assert not list(folder.parent.glob(".tmp-*"))


def padding_of(role: Any) -> set[float]:
    """The numbers in the rows of this rank's embedding and output layer that pad the vocabulary."""
    found = set()
    for named in role.named_parameters():
        if named.name in (EMBEDDING, OUTPUT_LAYER):
            num_rows = named.shard.local_shape[0]
            assert num_rows < len(named.parameter) or role.groups.tp_rank < role.groups.tp_size - 1
            found |= set(named.parameter[num_rows:].flatten().tolist())
    return found or {0.0}


def train_and_save(layout: Layout, model: ModelConfig, checkpoints: Path, tokenizer: Path) -> Any:
    from megatron_xy.checkpoint.writer import CheckpointWriter, TrainingState
    from megatron_xy.training.train_step import train_step

    role = models.make_role(layout, model=model, optimizer=OPTIMIZER)
    assert role is not None
    for number in range(2):
        batches = models.micro_batches(number, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
        train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
    writer = CheckpointWriter(checkpoints, keep_latest=1, asynchronous=False, timeout_seconds=30)
    assert padding_of(role) == {0.0}, "rows that pad the vocabulary stay as they began"
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
    """As if an earlier start had been killed while it verified: its target is there, and is gone on with."""
    checkpoint, ours = trained
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    verb.convert(f"ckpt:{checkpoint}", f"hf:{exported}", dtype=None, tokenizer=None, say=print)
    answer = convert(f"ckpt:{checkpoint}", f"hf:{exported}", "--verify", "--verify-text", __file__)
    assert answer.returncode == 0, answer.stderr
    assert f"{exported} is there, as this command has written it before" in answer.stderr
    assert re.search(r"every tensor is the same, bit for bit: \d+, sha256 of all [0-9a-f]{64}\n", answer.stderr)
    assert f"4,096 tokens of {__file__}: largest difference" in answer.stderr
    assert largest_difference(ours, [row.numpy() for row in transformers_logits(exported, ROWS)]) < TOLERANCE
    assert AutoTokenizer.from_pretrained(exported)("import torch").input_ids[0] == 1
    assert (exported / "tokenizer.model").read_bytes() == tokenizer.read_bytes()

    answer = convert(f"hf:{exported}", f"ckpt:{imported}")
    assert answer.returncode == 0, answer.stderr
    manifest = files.read_manifest(imported)
    files.verify_files(imported, manifest)
    files.verify_coverage(imported, manifest)
    original = dict(tensor_hashes(checkpoint, files.read_manifest(checkpoint)))
    weights = {name: facts for name, facts in original.items() if not name.startswith("optimizer.")}
    assert dict(tensor_hashes(imported, manifest)) == weights
    verb.convert(f"ckpt:{checkpoint}", f"ckpt:{tmp_path / 'copy'}", dtype=None, tokenizer=None, say=print)
    copied = dict(tensor_hashes(tmp_path / "copy", files.read_manifest(tmp_path / "copy")))
    assert copied == original, "the optimizer's state comes along"
    assert (imported / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()


def weights_of(layout: Layout, loads: list[str]) -> list[dict[str, tuple[Any, Any]]]:
    """{name: (parameter, main weights)} of a bf16 run from every load, for a weight and a norm."""
    found = []
    for load in loads:
        role = load_role(layout, load, optimizer=OPTIMIZER, params_dtype="bf16")
        assert {named.parameter.dtype for named in role.named_parameters()} == {torch.bfloat16}
        assert padding_of(role) == {0.0}
        found.append(
            {
                named.name: (named.parameter.detach().float().numpy(), named.parameter.main_param.detach().numpy())
                for named in role.named_parameters()
                if named.name in PLAIN_WEIGHTS
            }
        )
    return found


def test_a_bf16_run_opens_fp32_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """From an HF folder its main weights are exact; fp32 runs from bf16 weights stand in the test of the layouts."""
    folder = folders["gqa-untied"]
    hf_to_checkpoint(folder, tmp_path / "fp32")
    from_hf, from_checkpoint = run_ranks(
        weights_of, Layout(), [f"hf:{folder}", f"ckpt:{tmp_path / 'fp32'}"], world_size=1
    )[0]
    exact = load_file(folder / "model.safetensors")
    assert from_hf.keys() == from_checkpoint.keys() == PLAIN_WEIGHTS.keys()
    for name, (parameter, main) in from_hf.items():
        fp32 = exact[PLAIN_WEIGHTS[name]]
        assert np.array_equal(main, fp32.numpy())
        assert np.array_equal(parameter, fp32.bfloat16().float().numpy())
        assert np.array_equal(parameter, from_checkpoint[name][0])


def head_and_norm(layout: Layout, load: str) -> dict[str, NDArray[np.float32]]:
    role = load_role(layout, load, head="value")
    names = ("value_head.weight", "decoder.final_layernorm.weight")
    return {named.name: named.parameter.numpy(force=True) for named in role.named_parameters() if named.name in names}


def test_a_language_model_gets_a_fresh_head_and_a_reward_model_keeps_its_own(folders: dict[str, Path]) -> None:
    layout = Layout(tp=2)
    fresh, other_rank = run_ranks(head_and_norm, layout, f"hf:{folders['gqa-tied-llama3']}", world_size=2)
    kept = run_ranks(head_and_norm, layout, f"hf:{folders['reward']}", world_size=2)[0]
    assert np.array_equal(fresh["value_head.weight"], other_rank["value_head.weight"])
    assert 0.01 < fresh["value_head.weight"].std() < 0.03
    trunk = load_file(folders["gqa-tied-llama3"] / "model.safetensors")["model.norm.weight"]
    assert np.array_equal(fresh["decoder.final_layernorm.weight"], trunk.numpy())
    score = load_file(folders["reward"] / "model.safetensors")["score.weight"]
    assert np.array_equal(kept["value_head.weight"], score.numpy())


def test_a_flipped_bit_in_the_weights_to_start_from_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    hf_to_checkpoint(folders["gqa-untied"], tmp_path / "ckpt")
    shard = tmp_path / "ckpt" / "rank-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    answers = run_ranks(refusal, Layout(), f"ckpt:{tmp_path / 'ckpt'}", world_size=1)
    assert answers == [f"{shard} is damaged: its contents do not match the checksum in manifest.json"]


def refusal(layout: Layout, load: str) -> str:
    with pytest.raises(DataError) as caught:
        load_role(layout, load)
    return str(caught.value)
