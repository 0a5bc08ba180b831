"""Recomputation changes what is kept for the backward pass, never losses or gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from megatron_xy.config import OptimizerConfig
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

STEPS = 4
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
LAYOUTS = [Layout(), Layout(tp=2, pp=2), Layout(tp=2, pp=2, sp=True)]


def train(layout: Layout, granularity: str) -> dict[str, Any]:
    """The curve of (loss, gradient norm), and the bytes that one micro-batch's forward pass keeps for the backward."""
    from megatron_xy.training.train_step import train_step

    model = models.MODEL.model_copy(update={"recompute_granularity": granularity})
    role = models.make_role(layout, model=model, optimizer=OPTIMIZER)
    assert role is not None
    kept = kept_bytes(role)
    curve = []
    for step in range(STEPS):
        batches = models.micro_batches(step, dp_size=1, dp_rank=0)
        result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
        curve.append((result.loss, result.grad_norm))
    return {"curve": curve, "kept": kept}


def kept_bytes(role: Any) -> int:
    """Bytes of the distinct storages saved in the first micro-batch's forward pass, parameters left out."""
    from megatron_xy.training.train_step import forward_backward, language_model_loss, on_device

    own = {named.parameter.untyped_storage().data_ptr() for named in role.named_parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not measured and tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    measured: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = plain_forward(*args, **kwargs)
        measured.append(sum(tensor.untyped_storage().nbytes() for tensor in held.values()))
        return result

    plain_forward, role.chunks[0].forward = role.chunks[0].forward, forward  # type: ignore[method-assign]
    batches = [on_device(batch) for batch in models.micro_batches(0, dp_size=1, dp_rank=0)]
    role.chunks[0].zero_grad_buffer()
    forward_backward(role, batches, loss_of=partial(language_model_loss, role, 2))
    return measured[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_recomputation_keeps_less_and_changes_nothing(layout: Layout) -> None:
    plain, selective, full = (
        run_ranks(train, layout, granularity, world_size=layout.world_size)
        for granularity in ("none", "selective", "full")
    )
    for rank in range(layout.world_size):
        kept = plain[rank]["kept"]
        assert selective[rank]["kept"] < 0.8 * kept, "the MLP keeps a good part of what a layer keeps"
        assert full[rank]["kept"] < 0.4 * kept
        for recomputed in (selective, full):
            for got, want in zip(recomputed[rank]["curve"], plain[rank]["curve"], strict=True):
                assert got == pytest.approx(want, rel=1e-6)
