"""What `launch` starts, with real ranks: asked to stop ahead of the time limit they save; the next start goes on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_xy.run_folder import read_exit
from tests.end_to_end.tiny_run import (
    ONE_RANK,
    live_rank_at,
    make_data,
    run_to_end,
    started,
    wait_for_end,
    wait_until,
    write_config,
)
from tests.unit.fake_cluster import cluster_environment, make_cluster

LAUNCH = [sys.executable, "-m", "megatron_xy", "launch"]


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_config(tmp_path / "run.yaml", data=make_data(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.yaml"


def options(*, train_iters: int) -> list[str]:
    """For one rank, in the folder `run`."""
    overrides = ["run_dir=run", f"training.train_iters={train_iters}", "checkpoint.save_interval=1000"]
    return ["run.yaml", *ONE_RANK, *overrides, "--gpus-per-node", "1"]


def saved_iteration(run_dir: Path) -> int:
    (checkpoint,) = (run_dir / "checkpoints").glob("iter_*")
    return int(checkpoint.name.removeprefix("iter_"))


@pytest.mark.slow
def test_the_sbatch_script_saves_ahead_of_the_limit(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    make_cluster(tmp_path)
    variables = {"FAKE_NODES": "localhost", "CUDA_VISIBLE_DEVICES": "", "FAKE_RUN": str(run_dir)}
    gpus = (tmp_path / "bin" / "nvidia-smi").read_text().replace("0 1 2 3", "0")
    (tmp_path / "bin" / "nvidia-smi").write_text(gpus)
    for name, value in cluster_environment(tmp_path, **variables).items():
        monkeypatch.setenv(name, value)
    script = run_to_end([*LAUNCH, *options(train_iters=5000), "--on", "slurm", "--venv", sys.prefix])
    assert script.code == 0, script.err
    with started(["bash", "-c", script.out]) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=0, iteration=3), process=process, seconds=120)
        process.send_signal(signal.SIGUSR1)
        ended = wait_for_end(process)
    record = read_exit(run_dir)
    assert (ended.code, record.code if record else None) == (75, 75), ended
    assert (tmp_path / "record" / "scontrol").read_text() == "requeue 7\n"
    assert saved_iteration(run_dir) >= 3


@pytest.mark.slow
def test_submit_on_local_saves_when_asked_and_goes_on(run_yaml: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started([*LAUNCH, *options(train_iters=5000), "--submit"]) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=0, iteration=3), process=process, seconds=120)
        os.kill(process.pid, signal.SIGUSR1)
        ended = wait_for_end(process)
    assert ended.code == 75 and "ended with 75 (stopped)" in ended.err, ended
    saved = saved_iteration(run_dir)
    again = run_to_end([*LAUNCH, *options(train_iters=saved + 2), "--submit"])
    assert again.code == 0, again
    assert f"resuming from run/checkpoints/iter_{saved:07d}" in again.out
