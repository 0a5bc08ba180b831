"""A rank killed at a random moment: the supervisor goes on, and the run ends bit for bit as if nothing had happened."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_xy.run_folder import read_exit
from tests.end_to_end.tiny_run import (
    TRAIN_ITERS,
    hash_of,
    live_rank_at,
    make_data,
    metrics_of,
    run_command,
    run_to_end,
    started,
    wait_for_end,
    wait_until,
    without_clock,
    write_config,
)

LAYOUTS = {
    "tp2-pp2": (),
    "tp2-dp2": (
        "parallel.pipeline_model_parallel_size=1",
        "parallel.use_distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ),
}
KILLS = 10  # of each layout
LAST = f"iter_{TRAIN_ITERS:07d}"
LONGEST_DELAY = 0.3  # seconds, several steps and saves of this small model


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_config(folder / "tiny.yaml", data=make_data(folder))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """Run folders of undisturbed runs by layout, made when they are asked for."""
    made: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in made:
            run_dir = tmp_path_factory.mktemp(layout) / "run"
            ended = run_to_end(run_command(config, f"run_dir={run_dir}", *LAYOUTS[layout], ranks=4))
            assert ended.code == 0, ended
            made[layout] = run_dir
        return made[layout]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "number"),
    [(layout, number) for layout in LAYOUTS for number in range(KILLS)],
)
def test_killed_at_a_random_moment_equals_unbroken(layout, number, config, unbroken, tmp_path):
    chance = random.Random(f"{layout}/{number}")
    rank, iteration, delay = chance.randrange(4), chance.randrange(TRAIN_ITERS // 2), chance.uniform(0, LONGEST_DELAY)
    whole, run_dir = unbroken(layout), tmp_path / "run"
    with started(run_command(config, f"run_dir={run_dir}", *LAYOUTS[layout], ranks=4, restarts=1)) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=rank, iteration=iteration), process=process)
        time.sleep(delay)
        os.kill(live_rank_at(run_dir, rank=rank, iteration=iteration), signal.SIGKILL)
        ended = wait_for_end(process)
    told = f"rank {rank} killed {delay:.3f} s after it came to iteration {iteration}\n{ended}"
    assert ended.code == 0, told
    assert read_exit(run_dir).attempt == 1, told
    assert without_clock(metrics_of(run_dir)) == without_clock(metrics_of(whole)), told
    assert hash_of(run_dir / "checkpoints" / LAST) == hash_of(whole / "checkpoints" / LAST), told
    assert list(run_dir.rglob(".tmp-*")) == [], told
