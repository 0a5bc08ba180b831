"""Under bf16 every layout trains like the single rank, within bf16's rounding, and close to fp32."""

from __future__ import annotations

import pytest

from megatron_xy.config import OptimizerConfig
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

STEPS = 8
ROUNDING = 2**-8  # bf16 has 8 bits of precision
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
LAYOUTS = [Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2), Layout(tp=2, pp=2), Layout(tp=2, pp=2, sp=True)]


def train(layout: Layout, dtype: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    from megatron_xy.training.train_step import train_step

    role = models.make_role(layout, model=models.MODEL.model_copy(update={"params_dtype": dtype}), optimizer=OPTIMIZER)
    assert role is not None
    curve = []
    for step in range(STEPS):
        batches = models.micro_batches(step, dp_size=1, dp_rank=0)
        result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
        curve.append((result.loss, result.grad_norm))
    return curve


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    return run_ranks(train, Layout(), "bf16", world_size=1)[0]


def test_bf16_learns_as_fp32_does(reference: list[tuple[float, float]]) -> None:
    fp32 = run_ranks(train, Layout(), "fp32", world_size=1)[0]
    assert [loss for loss, _ in reference] == pytest.approx([loss for loss, _ in fp32], rel=2 * ROUNDING)
    assert reference != fp32
    assert reference[0][0] - reference[-1][0] > 1.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_agrees_within_rounding(layout: Layout, reference: list[tuple[float, float]]) -> None:
    for curve in run_ranks(train, layout, "bf16", world_size=layout.world_size):
        # At first only the order of sums differs; Adam then turns the rounding of small gradients into whole steps.
        assert curve[0][0] == pytest.approx(reference[0][0], rel=1e-4)
        assert curve[0][1] == pytest.approx(reference[0][1], rel=1e-3)
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in reference], rel=ROUNDING)
        assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in reference], rel=8 * ROUNDING)
