"""token_cross_entropy on one rank against torch's cross_entropy in fp64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from megatron_xy import losses as losses_module
from megatron_xy.losses import _CompiledCrossEntropy, token_cross_entropy


@pytest.fixture(params=["as on a CPU", "as on a GPU"], autouse=True)
def way(request, monkeypatch):
    """Both ways of the loss; that of a GPU without a compiler."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(losses_module, "_VocabParallelCrossEntropy", _CompiledCrossEntropy)


def expected(logits, labels, weights, *, vocab_size):
    """Losses and the gradient of their weighted sum, in fp64, over the true vocabulary; zero in the padding."""
    logits = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(
        logits[..., :vocab_size].reshape(-1, vocab_size), labels.reshape(-1), reduction="none"
    ).view_as(labels)
    (losses * weights).sum().backward()
    return losses.detach(), logits.grad


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("columns", "vocab_size"), [(64, 64), (64, 63), (128, 1), (7, 5)])
def test_losses_and_gradients_are_those_of_the_true_vocabulary(alone, columns, vocab_size, scale):
    generator = torch.Generator().manual_seed(columns * 1000 + vocab_size)
    logits = torch.randn(3, 11, columns, generator=generator) * scale
    logits[..., vocab_size:] += 50 * scale  # padding that would win if it took part
    labels = torch.randint(vocab_size, (3, 11), generator=generator)
    weights = torch.rand(3, 11, generator=generator)
    want, want_gradient = expected(logits, labels, weights.double(), vocab_size=vocab_size)
    logits.requires_grad_()
    before = logits.detach().clone()
    losses = token_cross_entropy(logits, labels, vocab_size=vocab_size, tp_group=alone.collection.tp)
    (losses * weights).sum().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.detach().double(), want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), want_gradient, rtol=1e-5, atol=1e-6)
    assert not logits.grad[..., vocab_size:].any()
    assert torch.equal(logits.detach(), before), "the caller's logits stay as they are"


def test_first_and_last_label_of_the_vocabulary_and_large_logits(alone):
    logits = torch.zeros(1, 3, 8)
    logits[0, 0, 0] = 1e4
    logits[0, 1, 4] = 1e4
    logits[0, 2, :5] = -3e38
    labels = torch.tensor([[0, 0, 4]])
    losses = token_cross_entropy(logits, labels, vocab_size=5, tp_group=alone.collection.tp)
    torch.testing.assert_close(losses, torch.tensor([[0.0, 1e4, torch.log(torch.tensor(5.0))]]))


def test_bf16_logits_are_reduced_in_fp32_and_get_a_bf16_gradient(alone):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 9, 256, generator=generator).mul(4).bfloat16()
    labels = torch.randint(250, (2, 9), generator=generator)
    weights = torch.ones(2, 9)
    want, want_gradient = expected(logits, labels, weights.double(), vocab_size=250)
    logits.requires_grad_()
    losses = token_cross_entropy(logits, labels, vocab_size=250, tp_group=alone.collection.tp)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach().double(), want, rtol=1e-6, atol=1e-5)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), want_gradient, rtol=2**-8, atol=1e-7)
