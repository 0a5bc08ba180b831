"""Small models and made-up packed batches for the distributed tests; the same on every rank and for every layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist

from megatron_xy import parallel
from megatron_xy.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_xy.data.dataset import MicroBatch, Sample, collate
from megatron_xy.optimizer import apply_gradients, finish_gradients
from megatron_xy.role import Role, build_role

BUCKET = 64
MICRO_BATCH_TOKENS = 128
VOCAB_SIZE = 500

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=256,
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one way to split the model; dp follows from the world."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    vp: int = 1
    distributed: bool = False  # the optimizer's state split over data parallel ranks
    overlap: bool = False  # gradients reduced, and parameters gathered, while others compute

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vp if self.vp > 1 else None,
            sequence_parallel=self.sp,
            use_distributed_optimizer=self.distributed,
            overlap_grad_reduce=self.overlap,
            overlap_param_gather=self.overlap and self.distributed,
        )


def make_role(
    layout: Layout,
    *,
    model: ModelConfig = MODEL,
    optimizer: OptimizerConfig | None = None,
    ranks: range | list[int] | None = None,
    name: str = "model",
    seed: int = 7,
) -> Role | None:
    """A role over `ranks` (default: all); None on ranks outside."""
    chosen = list(ranks) if ranks is not None else list(range(dist.get_world_size()))
    groups = parallel.build_groups(name, ranks=chosen, parallel=layout.parallel, timeout_seconds=60)
    if groups is None:
        return None
    return build_role(groups, model=model, parallel=layout.parallel, optimizer=optimizer, seed=seed)


def update(role: Role, *, lr: float, clip_grad: float, frozen: Iterable[torch.Tensor] = ()) -> tuple[float, bool]:
    """An update from the gradients of a forward_backward, as a step makes it: their norm, and whether it was made."""
    grad_norm = finish_gradients(role.optimizer, frozen=frozen)
    if math.isfinite(grad_norm):
        apply_gradients(role.optimizer, lr=lr, clip_grad=clip_grad, grad_norm=grad_norm)
    return grad_norm, math.isfinite(grad_norm)


def global_batch(step: int, *, num_samples: int = 8) -> list[tuple[Sample, int]]:
    """The samples of one step with their sources: several pieces each, some shorter than the bucket."""
    generator = np.random.default_rng(1000 + step)
    samples = []
    for number in range(num_samples):
        length = BUCKET if number % 2 else int(generator.integers(BUCKET // 2, BUCKET))
        cut = int(generator.integers(5, length - 5))
        # Learnable within a few steps: a small part of the vocabulary, and mostly the same successor for each token.
        tokens = generator.integers(1, 40, length)
        for place in range(1, length):
            if generator.random() < 0.8:
                tokens[place] = (2 * tokens[place - 1] + 1) % 40
        samples.append((Sample(tokens, np.array([cut, length - cut])), number % 2))
    return samples


def micro_batches(step: int, *, dp_size: int, dp_rank: int, split_documents: bool = True) -> list[MicroBatch]:
    """This data parallel rank's part of `global_batch(step)`."""
    mine = global_batch(step)[dp_rank::dp_size]
    per_micro_batch = MICRO_BATCH_TOKENS // BUCKET
    return [
        collate(
            [sample for sample, _ in mine[first : first + per_micro_batch]],
            source_indices=[source for _, source in mine[first : first + per_micro_batch]],
            bucket=BUCKET,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            split_documents=split_documents,
        )
        for first in range(0, len(mine), per_micro_batch)
    ]
