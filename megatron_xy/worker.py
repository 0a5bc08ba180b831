"""The life of one worker process: from its command line to its exit code, which it leaves in RUN/exit.json."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_xy import environment, orphans, run_folder, signals
from megatron_xy.config import RunConfig, load_config, run_dir_of
from megatron_xy.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_IO,
    EXIT_STOPPED,
    ConfigError,
    MegatronXYError,
    PeerLost,
)

Work = Callable[[RunConfig, signals.StopRequest], None]


def run_worker(task: str, *, config_path: Path, overrides: list[str], work: Work) -> None:
    """Runs `work` and ends the process with the documented exit code. Does not return.

    A failed rank leaves without waiting for anything: its peers' collectives then fail at once instead of hanging.
    """
    signals.block_stop_signals()
    orphans.die_with_parent()
    rank = environment.rank()
    run_dir = run_dir_of(config_path, overrides=overrides)

    def on_leave(message: str) -> None:
        _record(run_dir, code=EXIT_STOPPED, message=message, rank=rank)

    stop = signals.StopRequest(on_leave=on_leave)
    code, message = EXIT_DONE, "done"
    try:
        config = load_config(config_path, overrides=overrides)
        if config.task != task:
            raise ConfigError(
                f"task ({config.task}) in {config_path} does not agree with the verb {task}; use that verb"
            )
        work(config, stop)
    except MegatronXYError as error:
        code, message = error.exit_code, str(error)
        _say(error, rank=rank)
    except OSError as error:
        code, message = EXIT_IO, f"{type(error).__name__}: {error}"
        print(f"rank {rank}: {message}", file=sys.stderr)
    except BaseException as error:  # a bug of ours: the traceback, once, and the documented code
        code, message = EXIT_BUG, f"{type(error).__name__}: {error}"
        print(f"rank {rank}: this is a bug in megatron_xy\n{traceback.format_exc()}", file=sys.stderr)
    _record(run_dir, code=code, message=message, rank=rank)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own shutdown: it would wait for threads whose peers are gone.
    os._exit(code)


def _say(error: MegatronXYError, *, rank: int) -> None:
    """A cause in full; what every rank finds alike, once; a lost peer in one line a rank."""
    if rank == 0 or isinstance(error, PeerLost):
        print(f"rank {rank}: {error}" if isinstance(error, PeerLost) else str(error), file=sys.stderr)


def _record(run_dir: Path | None, *, code: int, message: str, rank: int) -> None:
    """RUN/exit.json, where there is a run folder that can be written."""
    if run_dir is None:
        return
    try:
        run_folder.prepare(run_dir)
        run_folder.record_exit(run_dir, code=code, message=message, rank=rank)
    except (MegatronXYError, OSError) as error:
        print(f"rank {rank}: exit code {code} could not be recorded: {error}", file=sys.stderr)
