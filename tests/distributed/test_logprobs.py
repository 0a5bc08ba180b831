"""Log-probabilities and entropy over a split vocabulary against torch's own in fp64, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_xy import losses
from tests.distributed.spawn import run_ranks

COLUMNS, TOKENS = 64, 37
VOCAB_SIZES = [64, 57, 33, 16, 5]  # of 4 ranks' 16 columns: all true; padding on the last; on the last ones only
TEMPERATURES = [1.0, 0.7]


def made_up(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(TOKENS, COLUMNS, generator=generator) * 4
    logits[:, vocab_size:] += 40  # padding that would win if it took part
    labels = torch.arange(TOKENS) % vocab_size
    return logits, labels, torch.randn(2, TOKENS, generator=generator)


def split() -> list[Any]:
    """(log-probabilities, entropies, this rank's columns of the gradient) of every case."""
    losses.CHUNK_TOKENS = 10  # several chunks, the last one smaller
    group = dist.group.WORLD
    assert group is not None
    results = []
    for vocab_size in VOCAB_SIZES:
        for temperature in TEMPERATURES:
            logits, labels, weights = made_up(vocab_size)
            mine = logits.chunk(group.size(), dim=-1)[group.rank()].clone().requires_grad_()
            logprobs, entropy = losses.token_logprobs_and_entropy(
                mine, labels, vocab_size=vocab_size, temperature=temperature, tp_group=group
            )
            (logprobs * weights[0] + entropy * weights[1]).sum().backward()
            assert mine.grad is not None
            results.append((logprobs.detach().numpy(), entropy.detach().numpy(), mine.grad.numpy()))
    return results


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_split_vocabulary_gives_what_the_whole_gives(world_size: int) -> None:
    ranks = run_ranks(split, world_size=world_size)
    cases = [(vocab_size, temperature) for vocab_size in VOCAB_SIZES for temperature in TEMPERATURES]
    for case, (vocab_size, temperature) in enumerate(cases):
        logits, labels, weights = made_up(vocab_size)
        whole = logits.double().requires_grad_()
        log_p = (whole[:, :vocab_size] / temperature).log_softmax(dim=-1)
        logprobs, entropy = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(dim=-1)
        (logprobs * weights[0] + entropy * weights[1]).sum().backward()
        assert whole.grad is not None
        for results in ranks:
            torch.testing.assert_close(
                torch.from_numpy(results[case][0]).double(), logprobs.detach(), rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                torch.from_numpy(results[case][1]).double(), entropy.detach(), rtol=1e-5, atol=1e-5
            )
        gradient = torch.cat([torch.from_numpy(results[case][2]) for results in ranks], dim=-1).double()
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-4, atol=1e-5)


def of_no_tokens() -> list[Any]:
    """As a data parallel rank has them whose micro-batch got no answer."""
    group = dist.group.WORLD
    assert group is not None
    logits = torch.ones(0, COLUMNS // group.size(), requires_grad=True)
    logprobs, entropy = losses.token_logprobs_and_entropy(
        logits, torch.zeros(0, dtype=torch.int64), vocab_size=57, temperature=0.7, tp_group=group
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    return [tuple(tensor.shape) for tensor in (logprobs, entropy, logits.grad)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_micro_batch_may_be_empty(world_size: int) -> None:
    assert run_ranks(of_no_tokens, world_size=world_size) == [[(0,), (0,), (0, COLUMNS // world_size)]] * world_size
