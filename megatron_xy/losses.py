"""Token losses over a vocabulary split by tensor parallelism: tensors in, tensors out, the group a parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_xy.parallel import max_over, sum_over


def token_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, tp_group: dist.ProcessGroup
) -> torch.Tensor:
    """-log p(label) of every token, in fp32.

    logits [..., padded vocabulary / tp], labels [...]; returns [...]. Rows of the padded vocabulary beyond `vocab_size`
    take no part: the loss is that of the true vocabulary under every tensor parallel size.
    """
    losses: torch.Tensor = _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, labels, vocab_size, tp_group
    )
    return losses


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy with the vocabulary split over a group; two small all-reduces forward, none backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp_group: dist.ProcessGroup
    ) -> torch.Tensor:
        columns = logits.size(-1)
        first = tp_group.rank() * columns
        valid = max(0, min(columns, vocab_size - first))
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
