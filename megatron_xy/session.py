"""What every training task does around its work: the run folder's files, torch.distributed, and errors in our words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from megatron_xy import device, environment, parallel, run_folder, waits
from megatron_xy.config import RunConfig, dump_config
from megatron_xy.log import RunLog
from megatron_xy.storage import write_text
from megatron_xy.watchdog import Watchdog, backend_timeout


@contextlib.contextmanager
def session(config: RunConfig, *, log: RunLog, watchdog: Watchdog, began: float) -> Iterator[None]:
    """Inside, this rank is in torch.distributed's world, and rank 0 holds the run folder. `log` is closed at the end.

    began: time.monotonic() at the process's start. Raises ConfigError where the device's memory runs out, PeerLost
    where a collective fails.
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
            yield
            parallel.stop_distributed()
