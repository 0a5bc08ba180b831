"""The comparison between layouts can fail: planted faults of parallel training change losses or norms visibly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_xy.config import OptimizerConfig
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

STEPS = 3
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
TOLERANCE = 1e-5  # of the comparison between layouts


def no_fault(role: Any) -> None:
    pass


def norms_forget_sequence_parallelism(role: Any) -> None:
    """Their gradients are then not summed over the tensor parallel ranks, each of which saw its own tokens."""
    for named in role.named_parameters():
        if named.name.endswith("layernorm.weight"):
            assert named.parameter.sequence_parallel
            del named.parameter.sequence_parallel


def split_weights_pass_for_replicas(role: Any) -> None:
    """The gradient norm then counts those of one tensor parallel rank only."""
    for named in role.named_parameters():
        named.parameter.tensor_model_parallel = False


def one_rank_starts_from_other_weights(role: Any) -> None:
    if role.groups.role_rank == 1:
        with torch.no_grad():
            next(n.parameter for n in role.named_parameters() if n.name.endswith("fc1.weight")).mul_(1.1)


def one_ranks_gradient_is_not_reduced(role: Any) -> None:
    """Data parallel rank 1 goes on with the gradient that it computed itself."""
    for chunk in role.chunks:

        def finish(*arguments: Any, chunk: Any = chunk, reduce: Any = chunk.finish_grad_sync, **options: Any) -> None:
            own = {parameter: parameter.main_grad.clone() for parameter in chunk.parameters()}
            reduce(*arguments, **options)
            for parameter, gradient in own.items():
                if role.groups.dp_rank == 1:
                    parameter.main_grad.copy_(gradient)

        chunk.finish_grad_sync = finish


def train(layout: Layout, fault: Callable[[Any], None], shift: int = 0) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step; `shift` moves the labels by one place."""
    from megatron_xy.training.train_step import train_step

    role = models.make_role(layout, optimizer=OPTIMIZER)
    assert role is not None
    fault(role)
    curve = []
    for step in range(STEPS):
        batches = models.micro_batches(step, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
        batches = [dataclasses.replace(batch, labels=np.roll(batch.labels, shift)) for batch in batches]
        result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
        curve.append((result.loss, result.grad_norm))
    return curve


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    return run_ranks(train, Layout(), no_fault, world_size=1)[0]


FAULTS = [
    (Layout(tp=2, sp=True), norms_forget_sequence_parallelism, 0),
    (Layout(tp=2, pp=2, sp=True), norms_forget_sequence_parallelism, 0),
    (Layout(tp=2), split_weights_pass_for_replicas, 0),
    (Layout(tp=2), one_rank_starts_from_other_weights, 0),
    (Layout(dp=2), one_rank_starts_from_other_weights, 0),
    (Layout(pp=2), one_rank_starts_from_other_weights, 0),
    (Layout(dp=2), one_ranks_gradient_is_not_reduced, 0),
    (Layout(dp=2, distributed=True), one_ranks_gradient_is_not_reduced, 0),
    (Layout(tp=2, dp=2, sp=True, distributed=True, overlap=True), one_ranks_gradient_is_not_reduced, 0),
    (Layout(pp=2, vp=2), one_rank_starts_from_other_weights, 0),
    (Layout(dp=2, distributed=True, overlap=True), no_fault, 1),
    (Layout(pp=2, vp=2), no_fault, 1),
    (Layout(tp=2), no_fault, 1),
    (Layout(tp=2), no_fault, -1),
]


@pytest.mark.parametrize(("layout", "fault", "shift"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_fault_shows_at_once_and_stays(
    layout: Layout, fault: Callable[[Any], None], shift: int, reference: list[tuple[float, float]]
) -> None:
    curves = run_ranks(train, layout, fault, shift, world_size=layout.world_size)
    for step in (0, -1):
        assert any(curve[step] != pytest.approx(reference[step], rel=3 * TOLERANCE) for curve in curves)


def test_without_a_fault_nothing_shows(reference: list[tuple[float, float]]) -> None:
    layout = Layout(tp=2, pp=2, sp=True)
    for curve in run_ranks(train, layout, no_fault, world_size=layout.world_size):
        assert curve == [pytest.approx(step, rel=TOLERANCE) for step in reference]
