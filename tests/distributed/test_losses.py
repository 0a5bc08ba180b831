"""token_cross_entropy with the vocabulary split over gloo ranks against torch's cross_entropy in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.distributed.spawn import run_ranks

COLUMNS = 64  # of all ranks together
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# With 4 ranks of 16 columns: all of them true, some padding on the last, only padding on the last, on the last three.
VOCAB_SIZES = [64, 57, 48, 33, 16, 5]


def made_up(vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [2, 33, COLUMNS] of the padded vocabulary, labels in every rank's part, weights of the losses."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(2, 33, COLUMNS, generator=generator) * 5
    logits[..., vocab_size:] += 40  # padding that would win if it took part
    labels = torch.arange(66).reshape(2, 33) % vocab_size
    return logits.to(dtype), labels, torch.rand(2, 33, generator=generator)


def split(dtype: str, way: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(losses, this rank's columns of the gradient) for every vocabulary."""
    from megatron_xy import losses as ways
    from megatron_xy.losses import token_cross_entropy

    if way == "as on a GPU":
        ways._VocabParallelCrossEntropy = ways._CompiledCrossEntropy
    group = dist.group.WORLD
    assert group is not None
    results = []
    for vocab_size in VOCAB_SIZES:
        logits, labels, weights = made_up(vocab_size, DTYPES[dtype])
        mine = logits.chunk(group.size(), dim=-1)[group.rank()].clone().requires_grad_()
        losses = token_cross_entropy(mine, labels, vocab_size=vocab_size, tp_group=group)
        (losses * weights).sum().backward()
        assert mine.grad is not None
        results.append((losses.detach().numpy(), mine.grad.float().numpy()))
    return results


@pytest.mark.parametrize("way", ["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_split_vocabulary_gives_the_losses_and_gradients_of_the_whole(world_size: int, dtype: str, way: str) -> None:
    ranks: list[list[Any]] = run_ranks(split, dtype, way, world_size=world_size)
    for case, vocab_size in enumerate(VOCAB_SIZES):
        logits, labels, weights = made_up(vocab_size, DTYPES[dtype])
        whole = logits.double().requires_grad_()
        losses = F.cross_entropy(whole[..., :vocab_size].reshape(-1, vocab_size), labels.reshape(-1), reduction="none")
        (losses.view(2, 33) * weights).sum().backward()
        for results in ranks:
            found = torch.from_numpy(results[case][0]).double()
            torch.testing.assert_close(found, losses.detach().view(2, 33), rtol=1e-6, atol=1e-5)
        gradient = torch.cat([torch.from_numpy(results[case][1]) for results in ranks], dim=-1).double()
        relative = 1e-5 if dtype == "fp32" else 2**-8
        torch.testing.assert_close(gradient, whole.grad, rtol=relative, atol=1e-6)
        assert not gradient[..., vocab_size:].any()
