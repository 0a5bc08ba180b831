"""Runs a function on N real gloo ranks and hands back what each returned.

The ranks are forked from one server process that has already imported torch and megatron.core (importing them anew
would cost seconds a rank), so a spawn takes about 0.1 s. A rank that fails shows its traceback under its number; one
that hangs is killed at the time limit.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preload"])
os.environ.setdefault("OMP_NUM_THREADS", "1")


def run_ranks(
    function: Callable[..., Any], *arguments: Any, world_size: int, timeout_seconds: float = 120.0
) -> list[Any]:
    """`function(*arguments)` on ranks 0 to world_size - 1 of one gloo world; results by rank.

    Fails the test on any error.
    """
    # Hosted here on a port that the system picks: no rank has to win a free port for itself.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = _context.Queue()
    ranks = [
        _context.Process(
            target=_rank_main, args=(rank, world_size, store.port, function, arguments, results), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    answers: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout_seconds
    try:
        while len(answers) < world_size and time.monotonic() < deadline:
            try:
                rank, ok, value = results.get(timeout=0.2)
                answers[rank] = (ok, value)
                if not ok:
                    deadline = min(deadline, time.monotonic() + 5.0)  # the others' share of the story
            except queue.Empty:
                if any(process.exitcode not in (None, 0) for process in ranks):
                    deadline = min(deadline, time.monotonic() + 5.0)
    finally:
        for process in ranks:
            process.join(timeout=2.0 if len(answers) == world_size else 0.0)
            if process.is_alive():
                process.kill()
    failures = [f"--- rank {rank} ---\n{value}" for rank, (ok, value) in sorted(answers.items()) if not ok]
    silent = [rank for rank in range(world_size) if rank not in answers]
    if silent:
        failures.append(
            f"ranks {silent} gave no answer within {timeout_seconds:.0f} s, exit codes "
            f"{[ranks[rank].exitcode for rank in silent]}"
        )
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return [answers[rank][1] for rank in range(world_size)]


def _rank_main(
    rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # as under torchrun: the store is there, every rank is its client
        GLOO_SOCKET_IFNAME="lo",
    )
    from megatron_xy import device, parallel

    try:
        device.start(num_threads=1)
        parallel.start_distributed(timeout_seconds=60)
        value = function(*arguments)
        results.put((rank, True, value))
        parallel.stop_distributed()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)
