"""Losses on answers: the same over layouts, micro-batches and packings, those of transformers with labels of -100, and
blind to what stands in the prompts' labels; a run that is broken off goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xy.config import OptimizerConfig, RunConfig
from megatron_xy.data.dataset import MicroBatch, Sample, collate
from tests.distributed import models
from tests.distributed.loop import config_of, train, until
from tests.distributed.models import BUCKET, VOCAB_SIZE, Layout
from tests.distributed.spawn import run_ranks
from tests.end_to_end.tiny_run import make_data, metrics_of, without_clock

STEPS = 4
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
MODEL = models.MODEL.model_copy(update={"init_method_std": 0.1})
TOGETHER, APART = [[20, 30, 14], [30, 34], [64], [10, 10, 10]], [[20], [30], [14], [30], [34], [64], [10], [10], [10]]
LAYOUTS = [
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(dp=2, distributed=True, overlap=True),
    Layout(tp=2, pp=2, sp=True),
    Layout(pp=2, dp=2, vp=2),
    Layout(tp=2, dp=2),
    Layout(dp=4),
]


def conversations(step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, which of them are learned) of pieces of the lengths in APART; the fourth is a text, all learned."""
    generator = np.random.default_rng(50 + step)
    made = []
    for number, (length,) in enumerate(APART):
        learned = np.ones(length, dtype=bool) if number == 3 else generator.random(length) < 0.3
        learned[-1] = True
        made.append((generator.integers(1, VOCAB_SIZE, length), learned))
    return made


def samples(step: int, *, pieces: list[list[int]]) -> list[Sample]:
    """The conversations packed as `pieces` says, and as many empty-handed samples as make their number a multiple of 4:
    nothing of theirs is learned."""
    given = iter(conversations(step))
    made = []
    for lengths in pieces:
        chosen = [next(given) for _ in lengths]
        tokens, learned = (np.concatenate([each[part] for each in chosen]) for part in (0, 1))
        made.append(Sample(tokens, np.array(lengths), learned))
    idle = Sample(np.arange(1, 6), np.array([5]), np.zeros(5, dtype=bool))
    return [*made, *[idle] * (-len(made) % 4)]


def micro_batches(
    step: int, role: Any, *, pieces: list[list[int]] = TOGETHER, tokens: int = BUCKET, split: bool = True
) -> list[MicroBatch]:
    groups, each = role.groups, tokens // BUCKET
    mine = samples(step, pieces=pieces)[groups.dp_rank :: groups.dp_size]
    sources = [sample.learned is not None and bool(sample.learned.all()) for sample in mine]
    return [
        collate(
            mine[first : first + each],
            source_indices=[int(source) for source in sources[first : first + each]],
            bucket=BUCKET,
            micro_batch_tokens=tokens,
            split_documents=split,
        )
        for first in range(0, len(mine), each)
    ]


def curve(layout: Layout, options: dict[str, Any] | None = None) -> list[tuple[float, float, int]]:
    """(loss, gradient norm, learned tokens) of every step."""
    from megatron_xy.training.train_step import train_step

    role = models.make_role(layout, model=MODEL, optimizer=OPTIMIZER)
    assert role is not None
    found = []
    for step in range(STEPS):
        batches = micro_batches(step, role, **(options or {}))
        done = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
        found.append((done.loss, done.grad_norm, done.num_loss_tokens))
    return found


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float, int]]:
    return run_ranks(curve, Layout(), world_size=1)[0]


def close(found: list[tuple[float, float, int]], expected: list[tuple[float, float, int]]) -> None:
    assert [row[2] for row in found] == [row[2] for row in expected]
    assert [row[:2] for row in found] == [pytest.approx(row[:2], rel=1e-5) for row in expected]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_has_the_same_losses_and_gradient_norms(
    layout: Layout, reference: list[tuple[float, float, int]]
) -> None:
    for found in run_ranks(curve, layout, world_size=layout.world_size):
        close(found, reference)


def three_ways(layout: Layout) -> list[list[tuple[float, float, int]]]:
    return [curve(layout, {"tokens": 4 * BUCKET}), curve(layout, {"pieces": APART}), curve(layout, {"split": False})]


def test_neither_micro_batch_nor_packing_matter_where_attention_is_split(
    reference: list[tuple[float, float, int]],
) -> None:
    larger, apart, joined = run_ranks(three_ways, Layout(), world_size=1)[0]
    close(larger, reference)
    close(apart, reference)
    assert joined[0][2] == reference[0][2] and abs(joined[0][0] - reference[0][0]) > 1e-4, (
        "attention is not split there"
    )


def weights_after_a_step(label: int | None, *, learned_too: bool) -> dict[str, np.ndarray]:
    """The weights after one step in which `label` stands for every label that is not learned, or for all."""
    from megatron_xy.training.train_step import train_step

    role = models.make_role(Layout(), model=MODEL, optimizer=OPTIMIZER)
    assert role is not None
    batches = micro_batches(0, role)
    if label is not None:
        batches = [
            dataclasses.replace(batch, labels=np.where((batch.loss_mask > 0) & (not learned_too), batch.labels, label))
            for batch in batches
        ]
    train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
    return {named.name: named.parameter.detach().numpy().copy() for named in role.named_parameters()}


def four_label_sets() -> list[dict[str, np.ndarray]]:
    kinds = ((None, False), (7, False), (VOCAB_SIZE - 1, False), (7, True))
    return [weights_after_a_step(label, learned_too=learned_too) for label, learned_too in kinds]


def test_gradients_do_not_depend_on_the_labels_of_prompts() -> None:
    plain, seven, last, all_seven = run_ranks(four_label_sets, world_size=1)[0]
    for name, weights in plain.items():
        assert np.array_equal(weights, seven[name]) and np.array_equal(weights, last[name]), name
    assert any(not np.array_equal(weights, all_seven[name]) for name, weights in plain.items())


def hf_weights() -> dict[str, np.ndarray]:
    from megatron_xy.hf.names import hf_shards

    role = models.make_role(Layout(), model=MODEL)
    assert role is not None
    weights = {}
    for named in role.named_parameters():
        tensor = named.shard.trim(named.parameter.detach())
        for part, shard in hf_shards(named.name, MODEL).items():
            boxes = [tensor[tuple(map(slice, box.start, box.stop))] for box in shard.boxes]
            weights[part] = torch.cat(boxes).numpy()
    return weights


def test_loss_and_gradient_norm_are_those_of_transformers_with_labels_of_minus_100(
    reference: list[tuple[float, float, int]],
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_xy.hf.config import hf_config

    llama = LlamaForCausalLM(LlamaConfig(**hf_config(MODEL, dtype="float32", token_ids={})))
    weights = {name: torch.from_numpy(part) for name, part in run_ranks(hf_weights, world_size=1)[0].items()}
    llama.load_state_dict(weights, strict=True)
    given = conversations(0)
    count = sum(int(learned[1:].sum()) for _, learned in given)
    total = 0.0
    for tokens, learned in given:
        ids = torch.from_numpy(tokens)[None]
        labels = torch.where(torch.from_numpy(learned)[None], ids, -100)
        loss = llama(ids, labels=labels).loss * int(learned[1:].sum()) / count
        loss.backward()
        total += float(loss)
    norm = torch.sqrt(sum(parameter.grad.double().square().sum() for parameter in llama.parameters()))
    assert reference[0] == (pytest.approx(total, rel=1e-5), pytest.approx(float(norm), rel=1e-5), count)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a file of conversations in two sources, a folder of texts)."""
    base = tmp_path_factory.mktemp("data")
    texts = make_data(base)
    words = np.random.default_rng(1).choice(["abba", "cede", "fig", "hop", "keel"], (120, 6))
    rows = []
    for number, said in enumerate(words):
        turns = [{"role": ("user", "assistant")[place % 2], "content": " ".join(said[:place])} for place in range(1, 5)]
        rows.append({"messages": turns, "source": ("general", "finance")[number % 5 == 0]})
    (base / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base / "chat.jsonl", texts


def sft_config(data: tuple[Path, Path], run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    file, texts = data
    of_data = {
        "path": [str(file), str(texts)],
        "tokenizer": str(texts / "tokenizer.model"),
        "chat_template": "xuanyuan",
        "weights": {"general": 4, "finance": 1, "prose": 1, "code": 0},
    }
    sections["parallel"] = {"tensor_model_parallel_size": 2, **sections.get("parallel", {})}
    config = config_of(texts, run_dir, data=of_data, **sections)
    return config.model_copy(update={"task": "sft"})


def test_a_run_on_conversations_and_text_resumes_as_if_unbroken_and_in_another_layout(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, broken = (sft_config(data, tmp_path / name) for name in ("whole", "broken"))
    run_ranks(train, whole, until(broken, 4), broken, world_size=2, timeout_seconds=120)
    other = sft_config(data, tmp_path / "broken", parallel={"tensor_model_parallel_size": 1})
    again = other.model_copy(update={"checkpoint": other.checkpoint.model_copy(update={"resume": 8})})
    expected = metrics_of(tmp_path / "whole")
    assert without_clock(metrics_of(tmp_path / "broken")) == without_clock(expected)
    run_ranks(train, again, world_size=1)
    for ours, row in zip(metrics_of(tmp_path / "broken"), expected, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((row["loss"], row["grad_norm"]), rel=1e-5)
        assert ours["num_loss_tokens_by_source"] == row["num_loss_tokens_by_source"]
    drawn = {source for row in expected for source in row["loss_by_source"]}
    assert drawn == {"general", "finance", "prose"}
    share = sum(row["num_loss_tokens"] for row in expected) / expected[-1]["consumed_tokens"]
    assert 0.2 < share < 0.7, "answers, and the text's tokens"
