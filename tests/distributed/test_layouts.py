"""One checkpoint, every layout: the same losses and gradient norms."""

from __future__ import annotations

import pytest

from megatron_xy.config import ModelConfig, OptimizerConfig
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

STEPS = 20
# A higher rate moves the loss no further, and lets fp32 rounding itself grow beyond 1e-5 under Adam.
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
LAYOUTS = [
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=2, sp=True),
    Layout(dp=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, dp=2, sp=True),
    Layout(pp=2, vp=2),
    Layout(pp=3),  # 4 layers on 3 stages
    Layout(pp=4),
    Layout(tp=2, pp=2, sp=True, vp=2),
    Layout(pp=2, dp=2, vp=2, distributed=True, overlap=True),
    Layout(dp=2, distributed=True),
    Layout(dp=2, overlap=True),
    Layout(dp=4, distributed=True, overlap=True),
    Layout(tp=2, dp=2, sp=True, distributed=True),
    Layout(tp=2, dp=2, sp=True, distributed=True, overlap=True),
    Layout(pp=2, dp=2, distributed=True),
    Layout(pp=2, dp=2, overlap=True),
]


def train(layout: Layout, model: ModelConfig, steps: int = STEPS) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    from megatron_xy.training.train_step import train_step

    role = models.make_role(layout, model=model, optimizer=OPTIMIZER)
    assert role is not None
    curve = []
    for step in range(steps):
        batches = models.micro_batches(step, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
        result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
        assert result.updated
        curve.append((result.loss, result.grad_norm))
    return curve


@pytest.fixture(scope="module")
def reference() -> list[tuple[float, float]]:
    return run_ranks(train, Layout(), models.MODEL, world_size=1)[0]


def test_the_reference_run_learns(reference: list[tuple[float, float]]) -> None:
    assert reference[0][0] - reference[-1][0] > 1.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_has_the_same_losses_and_gradient_norms(
    layout: Layout, reference: list[tuple[float, float]]
) -> None:
    for curve in run_ranks(train, layout, models.MODEL, world_size=layout.world_size):
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, reference, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


# A large embedding of an odd vocabulary: a norm that loses digits with a tensor's size shows here.
WIDE = models.MODEL.model_copy(
    update={"hidden_size": 128, "vocab_size": 8197, "num_query_groups": 4, "untie_embeddings_and_output_weights": False}
)


def test_the_gradient_norm_of_large_tensors_is_the_same_however_they_are_split() -> None:
    expected = run_ranks(train, Layout(), WIDE, 2, world_size=1)[0]
    for layout in (Layout(tp=2), Layout(tp=2, pp=2, sp=True)):
        curve = run_ranks(train, layout, WIDE, 2, world_size=layout.world_size)[0]
        assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in expected], rel=2e-6)


def test_biases_of_queries_keys_and_values_train_alike_in_every_layout() -> None:
    biased = models.MODEL.model_copy(update={"add_qkv_bias": True})
    expected = run_ranks(train, Layout(), biased, 5, world_size=1)[0]
    for layout in (Layout(tp=2, dp=2, sp=True, distributed=True), Layout(tp=2, pp=2, sp=True)):
        for curve in run_ranks(train, layout, biased, 5, world_size=layout.world_size):
            for step, expected_step in zip(curve, expected, strict=True):
                assert step == pytest.approx(expected_step, rel=1e-5)
