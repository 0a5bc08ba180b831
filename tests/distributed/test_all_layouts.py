"""Every layout that fits four ranks, with every switch, from one checkpoint: the same losses and gradient norms."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from megatron_xy.checkpoint import files
from megatron_xy.config import OptimizerConfig
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

Curve = list[tuple[float, float]]

STEPS = 20
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
MODEL = models.MODEL.model_copy(update={"num_layers": 8, "num_attention_heads": 8, "num_query_groups": 4})
SIZES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4), (2, 2, 1), (2, 1, 2),
         (1, 2, 2)]  # fmt: skip
SHAPES = [
    Layout(tp=tp, pp=pp, dp=dp, sp=sp, vp=vp)
    for tp, pp, dp in SIZES
    for vp in ((1, 2) if pp > 1 else (1,))
    for sp in ((False, True) if tp > 1 else (False,))
    if not (vp == 2 and 4 // dp % pp)  # an interleaved schedule takes micro-batches in rounds of pp
]
SWITCHES = list(itertools.product((False, True), (False, True), ("none", "selective", "full")))


def save_fresh(checkpoints: Path) -> None:
    """The checkpoint that all start from."""
    from megatron_xy.checkpoint.writer import CheckpointWriter, TrainingState

    role = models.make_role(Layout(), model=MODEL, optimizer=OPTIMIZER)
    assert role is not None
    writer = CheckpointWriter(checkpoints, keep_latest=1, asynchronous=False, timeout_seconds=60)
    writer.save(role, TrainingState(), facts={"model": MODEL.model_dump(mode="json")})


def curves(folder: Path, shape: Layout, switches: list[tuple[bool, bool, str]]) -> list[Curve]:
    """(loss, gradient norm) of every step, for each (distributed optimizer, overlap, recomputation)."""
    from megatron_xy.checkpoint.state import load_state
    from megatron_xy.training.train_step import train_step

    result = []
    for number, (distributed, overlap, recompute) in enumerate(switches):
        layout = dataclasses.replace(shape, distributed=distributed, overlap=overlap)
        model = MODEL.model_copy(update={"recompute_granularity": recompute})
        role = models.make_role(layout, model=model, optimizer=OPTIMIZER, seed=99, name=f"model{number}")
        assert role is not None
        load_state(role, folder, files.read_manifest(folder))
        curve = []
        for step in range(STEPS):
            batches = models.micro_batches(step, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
            done = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0)
            curve.append((done.loss, done.grad_norm))
        result.append(curve)
    return result


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoints = tmp_path_factory.mktemp("fresh")
    run_ranks(save_fresh, checkpoints, world_size=1)
    return checkpoints / "iter_0000000"


@pytest.fixture(scope="module")
def reference(start: Path) -> Curve:
    (curve,) = run_ranks(curves, start, Layout(), [(False, False, "none")], world_size=1)[0]
    assert curve[0][0] - curve[-1][0] > 1.0, "the loss must move, or nothing is compared"
    return curve


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_and_every_switch_has_the_same_losses_and_gradient_norms(
    shape: Layout, start: Path, reference: Curve
) -> None:
    for of_rank in run_ranks(curves, start, shape, SWITCHES, world_size=shape.world_size, timeout_seconds=600):
        for switches, curve in zip(SWITCHES, of_rank, strict=True):
            assert curve == [pytest.approx(step, rel=1e-5) for step in reference], switches
