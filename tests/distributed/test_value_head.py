"""A model with a value head: the same values, gradients and updates under every layout, and a start from any trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xy.config import ModelConfig, OptimizerConfig, ParallelConfig
from tests.distributed import models
from tests.distributed.spawn import run_ranks

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=96,
    max_position_embeddings=64, init_method_std=0.2, head="value",
)  # fmt: skip
TOKENS = 64
LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tp2 sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "dp2 distributed optimizer": (2, ParallelConfig(use_distributed_optimizer=True)),
    "tp2 pp2 sp": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    ),
}


def micro_batches(number: int) -> list[Any]:
    """Rows of two documents each, drawn by their number."""
    from megatron_xy.data.dataset import MicroBatch

    batches = []
    for index in range(number):
        draw = np.random.default_rng(index)
        lengths = [TOKENS // 4, 3 * TOKENS // 4]
        batches.append(
            MicroBatch(
                tokens=draw.integers(0, 96, TOKENS),
                labels=np.zeros(TOKENS, dtype=np.int64),
                loss_mask=np.ones(TOKENS, dtype=np.float32),
                position_ids=np.concatenate([np.arange(length) for length in lengths]),
                cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
                source_ids=np.zeros(TOKENS, dtype=np.int32),
                num_padding_tokens=0,
                sum_squared_lengths=sum(length**2 for length in lengths),
            )
        )
    return batches


def two_steps(parallel: ParallelConfig, dtype: str, load: str | None = None) -> dict[str, Any]:
    """Losses, gradient norms, and the head after two steps towards value = 1 on all tokens."""
    import torch.distributed as dist

    from megatron_xy.model.weights import load_initial_weights
    from megatron_xy.parallel import build_groups, sum_over
    from megatron_xy.role import build_role
    from megatron_xy.training.train_step import forward_backward, on_device

    model = MODEL.model_copy(update={"params_dtype": dtype, "load": load})
    groups = build_groups("critic", ranks=range(dist.get_world_size()), parallel=parallel, timeout_seconds=60)
    assert groups is not None
    optimizer = OptimizerConfig(lr=1e-3, lr_decay_style="constant", adam_eps=1e-6)
    role = build_role(groups, model=model, parallel=parallel, optimizer=optimizer, seed=1, draw=False)
    load_initial_weights(role, seed=1)
    batches = [on_device(batch) for batch in micro_batches(4)[groups.dp_rank :: groups.dp_size]]

    def loss_of(batch: Any, values: torch.Tensor) -> Any:
        assert values.shape == (1, TOKENS, 1)
        assert values.dtype == torch.float32
        total = (values - 1).square().sum()
        count = torch.tensor(TOKENS, dtype=torch.int)
        return total, count, {"total": total.detach()}

    told: dict[str, Any] = {"losses": [], "norms": []}
    for _ in range(2):
        role.zero_gradients()
        outputs = forward_backward(role, batches, loss_of=loss_of)
        if groups.is_last_stage:
            total = torch.stack([output["total"] for output in outputs]).sum()
            told["losses"].append(float(sum_over(total, groups.collection.dp)))
        norm, updated = models.update(role, lr=1e-3, clip_grad=0.0)
        assert updated
        told["norms"].append(norm)
    for named in role.named_parameters():
        if named.name == "value_head.weight":
            told["head"] = named.parameter.detach().numpy().copy()
    return told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_values_and_updates_in_every_layout(layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    (alone,) = run_ranks(two_steps, ParallelConfig(), "fp32", world_size=1)
    results = run_ranks(two_steps, parallel, "fp32", world_size=world_size)
    assert alone["losses"][1] < 0.95 * alone["losses"][0]
    for told in results:
        assert told["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        if told["losses"]:
            assert told["losses"] == pytest.approx(alone["losses"], rel=1e-5)
            np.testing.assert_allclose(told["head"], alone["head"], rtol=1e-4, atol=1e-5)
    assert any(told["losses"] for told in results)


def test_the_head_stays_in_fp32_beside_weights_in_bf16() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True)
    (alone,) = run_ranks(two_steps, ParallelConfig(), "bf16", world_size=1)
    for told in run_ranks(two_steps, layout, "bf16", world_size=2):
        assert told["head"].dtype == np.float32
        assert told["losses"] == pytest.approx(alone["losses"], rel=2e-2)


def saved(parallel: ParallelConfig, folder: Path, head: str, seed: int) -> dict[str, Any]:
    """Writes a checkpoint of fresh weights; its parameters on this rank."""
    import torch.distributed as dist

    from megatron_xy.checkpoint.files import TrainingState
    from megatron_xy.checkpoint.writer import CheckpointWriter
    from megatron_xy.parallel import build_groups
    from megatron_xy.role import build_role

    model = MODEL.model_copy(update={"head": head})
    groups = build_groups("model", ranks=range(dist.get_world_size()), parallel=parallel, timeout_seconds=60)
    assert groups is not None
    role = build_role(groups, model=model, parallel=parallel, optimizer=OptimizerConfig(), seed=seed)
    writer = CheckpointWriter(folder, keep_latest=1, asynchronous=False, timeout_seconds=60)
    writer.save(role, TrainingState(), facts={"model": model.model_dump(mode="json")})
    writer.finish(groups)
    return {named.name: named.parameter.detach().numpy().copy() for named in role.named_parameters()}


def loaded(parallel: ParallelConfig, load: str, head: str) -> dict[str, Any]:
    """The parameters of a role of that head that starts from `load`."""
    import torch.distributed as dist

    from megatron_xy.model.source import resolve_model
    from megatron_xy.model.weights import load_initial_weights
    from megatron_xy.parallel import build_groups
    from megatron_xy.role import build_role

    model = resolve_model(ModelConfig.model_validate({"load": load, "head": head}))
    groups = build_groups("model", ranks=range(dist.get_world_size()), parallel=parallel, timeout_seconds=60)
    assert groups is not None
    role = build_role(groups, model=model, parallel=parallel, optimizer=None, seed=5, draw=False)
    load_initial_weights(role, seed=5)
    return {named.name: named.parameter.detach().numpy().copy() for named in role.named_parameters()}


@pytest.mark.parametrize("written", ["language_model", "value"])
def test_a_value_model_starts_from_a_language_model_or_another_value_model(tmp_path: Path, written: str) -> None:
    two = ParallelConfig(tensor_model_parallel_size=2)
    run_ranks(saved, two, tmp_path, written, 1, world_size=2)
    (folder,) = tmp_path.glob("iter_*")
    (there,) = run_ranks(saved, ParallelConfig(), tmp_path / "whole", written, 1, world_size=1)
    (here,) = run_ranks(loaded, ParallelConfig(), f"ckpt:{folder}", "value", world_size=1)
    assert set(here) == {name for name in there if name != "output_layer.weight"} | {"value_head.weight"}
    for name, weight in here.items():
        if name in there:
            np.testing.assert_array_equal(weight, there[name])
    assert np.abs(here["value_head.weight"]).sum() > 0
    assert here["value_head.weight"].dtype == np.float32


def _refusal(load: str) -> str:
    from megatron_xy.errors import DataError

    with pytest.raises(DataError) as caught:
        loaded(ParallelConfig(), load, "language_model")
    return str(caught.value)


def test_a_language_model_does_not_start_from_a_value_model(tmp_path: Path) -> None:
    run_ranks(saved, ParallelConfig(), tmp_path, "value", 1, world_size=1)
    (folder,) = tmp_path.glob("iter_*")
    (told,) = run_ranks(_refusal, f"ckpt:{folder}", world_size=1)
    assert "output_layer.weight" in told
