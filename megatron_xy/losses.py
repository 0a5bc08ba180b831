"""Token losses over a vocabulary split by tensor parallelism: tensors in, tensors out, the group a parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_xy.compiling import compiled, compiler
from megatron_xy.parallel import max_over, sum_over


def token_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, tp_group: dist.ProcessGroup
) -> torch.Tensor:
    """-log p(label) of every token, in fp32.

    logits [..., padded vocabulary / tp], labels [...]; returns [...]. Rows of the padded vocabulary beyond `vocab_size`
    take no part: the loss is that of the true vocabulary under every tensor parallel size.
    """
    way: Any = _CompiledCrossEntropy if compiler().works else _VocabParallelCrossEntropy
    losses: torch.Tensor = way.apply(logits, labels, vocab_size, tp_group)
    return losses


def _columns_here(columns: int, vocab_size: int, tp_group: dist.ProcessGroup) -> tuple[int, int]:
    """The token id of this rank's first column, and how many of its columns are token ids: the last may be padding."""
    first = tp_group.rank() * columns
    return first, max(0, min(columns, vocab_size - first))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy with the vocabulary split over a group; two small all-reduces forward, none backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp_group: dist.ProcessGroup
    ) -> torch.Tensor:
        columns = logits.size(-1)
        first, valid = _columns_here(columns, vocab_size, tp_group)
        largest = (
            logits[..., :valid].amax(dim=-1).float() if valid else logits.new_full(labels.shape, -torch.inf).float()
        )
        scores = logits.float() - max_over(largest, tp_group).unsqueeze(-1)
        scores[..., valid:] = -torch.inf
        owned = (labels >= first) & (labels < first + columns)
        column = (labels - first).clamp(0, columns - 1)
        label_score = torch.where(owned, scores.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)
        exponentials = scores.exp_()
        sums = sum_over(torch.stack([label_score, exponentials.sum(dim=-1)]), tp_group)
        probabilities = exponentials.div_(sums[1].unsqueeze(-1))
        ctx.save_for_backward(probabilities, owned, column)
        ctx.dtype = logits.dtype
        return sums[1].log() - sums[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        probabilities, owned, column = ctx.saved_tensors
        # The saved softmax is used once: it becomes the gradient in place.
        gradient = probabilities.scatter_add_(-1, column.unsqueeze(-1), -owned.to(probabilities.dtype).unsqueeze(-1))
        return gradient.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None, None, None


class _CompiledCrossEntropy(torch.autograd.Function):
    """The same in three kernels, which read the logits once each and keep them instead of a softmax in fp32.

    Where exponentials cost next to nothing and memory's bandwidth is what a loss takes: on a GPU.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp_group: dist.ProcessGroup
    ) -> torch.Tensor:
        rows, column = logits.flatten(0, -2), labels.flatten()
        columns = rows.size(-1)
        first, valid = _columns_here(columns, vocab_size, tp_group)
        column = column - first  # of no row of this rank's part: below 0, or beyond its columns
        owned = (column >= 0) & (column < valid)
        largest = _largest(rows[:, :valid]) if valid else rows.new_full(column.shape, -torch.inf, dtype=torch.float32)
        largest = max_over(largest, tp_group)
        label_score = rows.gather(-1, column.clamp(0, columns - 1).unsqueeze(-1)).squeeze(-1).float() - largest
        total = _sum_of_exponentials(rows[:, :valid], largest) if valid else torch.zeros_like(largest)
        label_score, total = sum_over(torch.stack([torch.where(owned, label_score, 0.0), total]), tp_group)
        ctx.save_for_backward(rows, largest, total, column)
        ctx.valid, ctx.shape = valid, logits.shape
        losses: torch.Tensor = (total.log() - label_score).view(labels.shape)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient: torch.Tensor = _softmax_gradient(*ctx.saved_tensors, grad.flatten(), ctx.valid)
        shape: torch.Size = ctx.shape
        return gradient.view(shape), None, None, None


@compiled
def _largest(rows: torch.Tensor) -> torch.Tensor:
    return rows.amax(dim=-1).float()


@compiled
def _sum_of_exponentials(rows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return (rows.float() - largest.unsqueeze(-1)).exp().sum(dim=-1)


@compiled
def _softmax_gradient(
    rows: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    column: torch.Tensor,
    grad: torch.Tensor,
    valid: int,
) -> torch.Tensor:
    """(softmax - onehot) * grad; 0 in the padding. rows [tokens, columns], all else [tokens]."""
    places = torch.arange(rows.size(-1), device=rows.device)
    probabilities = (rows.float() - largest.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    hit = (places == column.unsqueeze(-1)).float()
    gradient = (probabilities - hit) * grad.unsqueeze(-1)
    return torch.where(places < valid, gradient, 0.0).to(rows.dtype)


def token_logprobs_and_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, temperature: float, tp_group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(label) and the entropy of the distribution softmax(logits / temperature), in one pass, in fp32.

    logits [tokens, padded vocabulary / tp], labels [tokens]; returns two of [tokens], both with gradients. Worked on in
    chunks of tokens, forward and backward: beside the logits' own memory there is that of one chunk.
    """
    logprobs, entropy = _VocabParallelLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, labels, vocab_size, temperature, tp_group
    )
    return logprobs, entropy


CHUNK_TOKENS = 1024


class _VocabParallelLogprobs(torch.autograd.Function):
    """With z = logits / T and p = softmax(z): log p_label = z_label - logsumexp(z), H = logsumexp(z) - sum(p z)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        temperature: float,
        tp_group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = logits.size(-1)
        first, valid = _columns_here(columns, vocab_size, tp_group)
        owned = (labels >= first) & (labels < first + valid)
        column = (labels - first).clamp(0, columns - 1)
        results = [logits.new_empty(3, 0, dtype=torch.float32)]  # a micro-batch may have no answers, and so no tokens
        for part in range(0, logits.size(0), CHUNK_TOKENS):
            rows = slice(part, part + CHUNK_TOKENS)
            scores = logits[rows, :valid].float() / temperature
            largest = scores.amax(dim=-1) if valid else scores.new_full((scores.size(0),), -torch.inf)
            largest = max_over(largest, tp_group)
            scores = scores - largest.unsqueeze(-1)
            exponentials = scores.exp()
            chosen = column[rows].clamp(max=max(valid - 1, 0)).unsqueeze(-1)
            label_score = (
                torch.where(owned[rows], scores.gather(-1, chosen).squeeze(-1), 0.0)
                if valid
                else torch.zeros_like(largest)
            )
            sums = torch.stack([label_score, exponentials.sum(dim=-1), (exponentials * scores).sum(dim=-1)])
            label_score, total, weighted = sum_over(sums, tp_group)
            log_total = total.log()
            results.append(torch.stack([label_score - log_total, log_total - weighted / total, largest + log_total]))
        logprobs, entropy, log_normaliser = torch.cat(results, dim=1)
        ctx.save_for_backward(logits, log_normaliser, entropy, owned, column)
        ctx.valid, ctx.temperature = valid, temperature
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        """d log p_label / dz = onehot - p;  dH / dz = -p (log p + H)."""
        logits, log_normaliser, entropy, owned, column = ctx.saved_tensors
        valid, temperature = ctx.valid, ctx.temperature
        gradient = torch.zeros_like(logits)
        for part in range(0, logits.size(0), CHUNK_TOKENS):
            rows = slice(part, part + CHUNK_TOKENS)
            if not valid:
                break
            log_p = logits[rows, :valid].float() / temperature - log_normaliser[rows].unsqueeze(-1)
            p = log_p.exp()
            by_label, by_entropy = grad_logprobs[rows].unsqueeze(-1), grad_entropy[rows].unsqueeze(-1)
            dz = -p * (by_label + by_entropy * (log_p + entropy[rows].unsqueeze(-1)))
            chosen = column[rows].clamp(max=valid - 1).unsqueeze(-1)
            dz.scatter_add_(-1, chosen, torch.where(owned[rows], grad_logprobs[rows], 0.0).unsqueeze(-1))
            gradient[rows, :valid] = (dz / temperature).to(logits.dtype)
        return gradient, None, None, None, None
