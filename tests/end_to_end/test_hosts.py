"""A run over two hosts that meet by c10d rendezvous: one is cut off, all end with a message; later both go on."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_xy.run_folder import read_exit, read_heartbeats
from tests.end_to_end.hosts import HOSTS, INTERFACE, CannotMakeHosts, on_host, plug, two_hosts
from tests.end_to_end.tiny_run import make_data, metrics_of, started, wait_for_end, wait_until, write_config

TIMEOUT_SECONDS = 20  # of a collective
ENOUGH_ITERS = 2000  # to be cut off before the end


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(two_hosts(tmp_path))
        except CannotMakeHosts as error:
            pytest.skip(f"no hosts as network namespaces here: {error}")
        yield


def launch_on(name: str, *overrides: str, folder: Path) -> list[str]:
    """`launch --on local --submit` of this host's 2 ranks of 4."""
    where = ["--nodes", "2", "--gpus-per-node", "2", "--rdzv-endpoint", f"{next(iter(HOSTS))}:29500"]
    command = [sys.executable, "-m", "megatron_xy", "launch", str(folder / "run.yaml"), *overrides, "--on", "local"]
    return on_host(name, [*command, *where, "--network-interface", INTERFACE, "--submit"], folder=folder)


@pytest.mark.slow
def test_a_host_is_cut_off_and_comes_back(hosts: None, tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", data=make_data(tmp_path))
    run_dir = tmp_path / "run"
    common = (f"run_dir={run_dir}", f"runtime.timeout_seconds={TIMEOUT_SECONDS}")

    with contextlib.ExitStack() as stack:  # tensor parallel inside a host, pipeline parallel across
        first, second = (
            stack.enter_context(
                started(launch_on(name, *common, f"training.train_iters={ENOUGH_ITERS}", folder=tmp_path))
            )
            for name in HOSTS
        )
        wait_until(
            lambda: sum(1 for beat in read_heartbeats(run_dir).values() if beat.iteration >= 9) == 4,
            process=first,
            seconds=180,
        )
        plug(list(HOSTS)[1], "down")
        ends = [wait_for_end(process, seconds=TIMEOUT_SECONDS + 60) for process in (first, second)]
    assert [end.code for end in ends] == [76, 76], ends
    record = read_exit(run_dir)
    assert record is not None and record.code == 76, (record, ends)
    assert all(record.message in end.err for end in ends)

    plug(list(HOSTS)[1], "up")
    saved = max(int(path.name.removeprefix("iter_")) for path in (run_dir / "checkpoints").glob("iter_*"))
    across = (
        "parallel.pipeline_model_parallel_size=1",
        f"training.train_iters={saved + 3}",
        "checkpoint.allow_changes=true",
    )
    with contextlib.ExitStack() as stack:  # now data parallel across, from the same checkpoint
        both = [stack.enter_context(started(launch_on(name, *common, *across, folder=tmp_path))) for name in HOSTS]
        ends = [wait_for_end(process, seconds=180) for process in both]
    assert [end.code for end in ends] == [0, 0], ends
    assert f"iter_{saved:07d}" in "".join(end.out for end in ends)
    assert [record["iteration"] for record in metrics_of(run_dir)] == list(range(1, saved + 4))
    record = read_exit(run_dir)
    assert record is not None and record.code == 0


def test_hosts_are_apart(hosts: None, tmp_path: Path) -> None:
    """What a cut is: the other host no longer answers, and does again."""
    first, second = HOSTS
    ask = on_host(first, [sys.executable, "-ISc", REACH, second], folder=tmp_path)
    assert subprocess.run(ask, capture_output=True, check=False).returncode == 0
    plug(second, "down")
    assert subprocess.run(ask, capture_output=True, check=False).returncode != 0
    plug(second, "up")
    assert subprocess.run(ask, capture_output=True, check=False).returncode == 0


# A closed port that refuses is a host that answers.
REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=1)
except ConnectionRefusedError:
    pass
"""
