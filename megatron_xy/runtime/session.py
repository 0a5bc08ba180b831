"""What every training task does around its work: the run folder's files, torch.distributed, and errors in our words."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_xy import device, parallel, run_folder
from megatron_xy.config import RunConfig, dump_config
from megatron_xy.errors import ConfigError
from megatron_xy.log import RunLog
from megatron_xy.runtime import environment, waits
from megatron_xy.runtime.liveness import went_forward
from megatron_xy.runtime.watchdog import Watchdog, backend_timeout
from megatron_xy.storage import write_text


@contextlib.contextmanager
def session(config: RunConfig, *, log: RunLog, watchdog: Watchdog, began: float) -> Iterator[None]:
    """Inside, this rank is in torch.distributed's world, and rank 0 holds the run folder. `log` is closed at the end.

    began: time.monotonic() at the process's start. Raises ConfigError where the ranks see different run folders
    or the device's memory runs out, PeerLost where a collective fails.
    """
    rank, world_size = environment.rank(), environment.world_size()
    log.say(f"  {'import':<28} {time.monotonic() - began:6.1f} s")
    with contextlib.ExitStack() as stack:
        stack.enter_context(log)
        if rank == 0:
            stack.enter_context(run_folder.lock(config.run_dir))
            run_folder.clear_exit(config.run_dir, began=time.time() - (time.monotonic() - began))
            run_folder.clear_heartbeats(config.run_dir, from_rank=world_size)
            write_text(config.run_dir / "run.yaml", dump_config(config))
            run_folder.write_env(config.run_dir, extra={"device": device.name(), "world_size": world_size})
        remedy = (
            "lower training.micro_batch_tokens, set model.recompute_granularity to full, or split the model further"
        )
        with parallel.errors_told(when_memory_runs_out=remedy):
            timeout = backend_timeout(config.runtime.timeout_seconds)
            waits.install()
            watchdog.beat(iteration=0, phase="rendezvous")
            with log.phase("rendezvous"):
                parallel.start_distributed(timeout_seconds=timeout)
                # Below the timeout: nodes that do not see each other's heartbeats would take the waiting for a hang.
                check_is_shared(config.run_dir, patience_seconds=min(60.0, config.runtime.timeout_seconds / 2))
            yield
            parallel.stop_distributed()


def check_is_shared(run_dir: Path, *, patience_seconds: float) -> None:
    """That all ranks see the folder that rank 0 holds, and not each node its own. Collective over the world.

    patience_seconds: for a network file system that does not show what another node wrote at once. Raises ConfigError
    on all ranks, naming those that do not see it.
    """
    world = dist.group.WORLD
    assert world is not None, "the world has begun"
    seen = torch.zeros(hashlib.sha256().digest_size, dtype=torch.int64)
    if dist.get_rank() == 0:
        seen = _digest(run_dir)
    expected = parallel.sum_over(seen.to(device.current()), world).cpu()
    deadline = time.monotonic() + patience_seconds
    while not (same := torch.equal(_digest(run_dir), expected)) and time.monotonic() < deadline:
        went_forward()
        time.sleep(0.1)
    mine = torch.tensor([-1 if same else dist.get_rank()], device=device.current())
    blind = [rank for rank in parallel.gathered_over(mine, world).flatten().tolist() if rank >= 0]
    if blind:
        ranks = f"rank {blind[0]} does" if len(blind) == 1 else f"{len(blind)} ranks, the first is {blind[0]}, do"
        raise ConfigError(
            f"run_dir ({run_dir}) must be one folder that all nodes share; {ranks} not see what rank 0 wrote there: "
            f"name one on a shared file system, by its absolute path"
        )


def _digest(run_dir: Path) -> torch.Tensor:
    told = run_folder.told_by_holder(run_dir)
    return torch.tensor(list(hashlib.sha256(told or b"").digest()), dtype=torch.int64)
