"""Documents packed into one row do not see each other; unsplit, a sample is one text. transformers is the judge."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xy.config import OptimizerConfig
from megatron_xy.data.dataset import MicroBatch, Sample, collate
from tests.distributed import models
from tests.distributed.models import BUCKET, MICRO_BATCH_TOKENS, VOCAB_SIZE, Layout
from tests.distributed.spawn import run_ranks

# Weights large enough for attention to matter from the first step.
MODEL = models.MODEL.model_copy(update={"init_method_std": 0.1})
# Pieces of each sample: a single token, a full bucket, padding behind, several of one length.
PIECES = [[10, 30, 24], [1, 50], [64], [2, 2, 2, 40]]
LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(pp=2), Layout(tp=2, pp=2, sp=True)]


def samples() -> list[Sample]:
    generator = np.random.default_rng(5)
    return [Sample(generator.integers(1, VOCAB_SIZE, sum(pieces)), np.array(pieces)) for pieces in PIECES]


def documents() -> list[tuple[int, int, np.ndarray]]:
    """(sample, where it starts there, tokens) of every piece."""
    found = []
    for number, sample in enumerate(samples()):
        starts = np.cumsum(sample.piece_lengths) - sample.piece_lengths
        for start, length in zip(starts.tolist(), sample.piece_lengths.tolist(), strict=True):
            found.append((number, start, sample.tokens[start : start + length]))
    return found


def pack(chosen: list[Sample], *, split_documents: bool, micro_batch_tokens: int) -> list[MicroBatch]:
    per_micro_batch = micro_batch_tokens // BUCKET
    return [
        collate(
            chosen[first : first + per_micro_batch],
            source_indices=[0] * per_micro_batch,
            bucket=BUCKET,
            micro_batch_tokens=micro_batch_tokens,
            split_documents=split_documents,
        )
        for first in range(0, len(chosen), per_micro_batch)
    ]


def token_losses(role: Any, micro_batches: list[MicroBatch]) -> np.ndarray | None:
    """Loss of every token [samples, BUCKET] on the last stage."""
    from megatron_xy.losses import token_cross_entropy
    from megatron_xy.training.train_step import forward_pass, on_device

    def losses_of(batch: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        tp_group = role.groups.collection.tp
        return {"losses": token_cross_entropy(logits, batch.labels, vocab_size=VOCAB_SIZE, tp_group=tp_group)[0]}

    with torch.no_grad():
        outputs = forward_pass(role, [on_device(batch) for batch in micro_batches], losses_of)
    if not role.groups.is_last_stage:
        return None
    return torch.cat([output["losses"] for output in outputs]).reshape(-1, BUCKET).numpy()


def losses_of_layout(layout: Layout) -> dict[str, np.ndarray | None]:
    role = models.make_role(layout, model=MODEL)
    assert role is not None
    alone = [Sample(tokens, np.array([len(tokens)])) for _, _, tokens in documents()]
    return {
        "split": token_losses(role, pack(samples(), split_documents=True, micro_batch_tokens=MICRO_BATCH_TOKENS)),
        "joined": token_losses(role, pack(samples(), split_documents=False, micro_batch_tokens=MICRO_BATCH_TOKENS)),
        "alone": token_losses(role, pack(alone, split_documents=True, micro_batch_tokens=BUCKET)),
    }


def hf_weights() -> dict[str, np.ndarray]:
    """The weights that every layout draws, as transformers names them."""
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


@pytest.fixture(scope="module")
def plain_losses() -> Any:
    """Losses [tokens - 1] of transformers' Llama for one text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_xy.hf.config import hf_config

    llama = LlamaForCausalLM(LlamaConfig(**hf_config(MODEL, dtype="float32", token_ids={}))).eval()
    weights = {name: torch.from_numpy(part) for name, part in run_ranks(hf_weights, world_size=1)[0].items()}
    llama.load_state_dict(weights, strict=True)

    def losses(tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            logits = llama(ids[None]).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").numpy()

    return losses


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_documents_have_the_losses_that_they_have_alone(layout: Layout, plain_losses: Any) -> None:
    for rank in run_ranks(losses_of_layout, layout, world_size=layout.world_size):
        if rank["split"] is None:
            continue
        for number, (sample, start, tokens) in enumerate(documents()):
            last = len(tokens) - 1
            packed, want = rank["split"][sample, start : start + last], plain_losses(tokens)
            assert packed == pytest.approx(want, rel=1e-5, abs=1e-5)
            assert rank["alone"][number, :last] == pytest.approx(want, rel=1e-5, abs=1e-5)
        for number, sample in enumerate(samples()):
            want = plain_losses(sample.tokens)
            ends = np.cumsum(sample.piece_lengths)[:-1] - 1  # no label there: a document's end never predicts the next
            inside = np.delete(np.arange(len(want)), ends)
            assert rank["joined"][number, inside] == pytest.approx(want[inside], rel=1e-5, abs=1e-5)
            later = inside[inside > ends[0]] if len(ends) else inside[:0]
            if len(later):
                assert np.abs(rank["joined"][number, later] - rank["split"][number, later]).mean() > 0.05
            first = slice(0, ends[0] if len(ends) else len(want))
            assert rank["joined"][number, first] == pytest.approx(rank["split"][number, first], rel=1e-5, abs=1e-5)


def gradients(layout: Layout, split_documents: bool) -> list[dict[str, np.ndarray]]:
    """This rank's gradients: of the batch, with other padding and masked labels, with one true label changed."""
    from megatron_xy.training.train_step import forward_backward, language_model_loss, on_device

    role = models.make_role(layout, model=MODEL, optimizer=OptimizerConfig())
    assert role is not None
    options = {"split_documents": split_documents, "micro_batch_tokens": MICRO_BATCH_TOKENS}
    plain = pack(samples(), **options)
    generator = np.random.default_rng(9)
    other = [
        dataclasses.replace(
            batch,
            tokens=np.where(batch.tokens > 0, batch.tokens, 77),  # of samples none is 0
            labels=np.where(batch.loss_mask > 0, batch.labels, generator.integers(0, VOCAB_SIZE, len(batch.labels))),
        )
        for batch in plain
    ]
    changed = [dataclasses.replace(batch, labels=batch.labels.copy()) for batch in plain]
    changed[1].labels[3] = (changed[1].labels[3] + 1) % VOCAB_SIZE
    assert any((a.tokens != b.tokens).any() and (a.labels != b.labels).any() for a, b in zip(plain, other, strict=True))
    results = []
    for batches in (plain, other, changed):
        role.chunks[0].zero_grad_buffer()
        role.optimizer.zero_grad()
        forward_backward(role, [on_device(batch) for batch in batches], loss_of=partial(language_model_loss, role, 2))
        results.append({named.name: named.parameter.main_grad.numpy().copy() for named in role.named_parameters()})
    return results


@pytest.mark.parametrize("split_documents", [True, False])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=str)
def test_padding_and_masked_labels_leave_no_trace_in_gradients(layout: Layout, split_documents: bool) -> None:
    for plain, other, changed in run_ranks(gradients, layout, split_documents, world_size=layout.world_size):
        assert all(gradient.any() for gradient in plain.values())
        for name, gradient in plain.items():
            assert np.array_equal(gradient, other[name]), name
            # The output layer's rows on a tensor parallel rank that holds neither label do not see the change.
            assert name == "output_layer.weight" or not np.array_equal(gradient, changed[name]), name
