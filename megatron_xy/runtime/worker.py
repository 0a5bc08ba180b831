"""The life of one worker process: from its command line to its exit code, which it leaves in RUN/exit.json."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_xy import run_folder
from megatron_xy.config import RunConfig, load_config, run_dir_of
from megatron_xy.errors import (
    EXIT_BAD_CONFIG,
    EXIT_BUG,
    EXIT_DONE,
    EXIT_IO,
    EXIT_PEER_LOST,
    EXIT_STOPPED,
    ConfigError,
    MegatronXYError,
    PeerLost,
    memory_error,
)
from megatron_xy.inference.model_job import ModelJob
from megatron_xy.runtime import environment, orphans, signals
from megatron_xy.runtime.watchdog import END, Watchdog

Work = Callable[[RunConfig, signals.StopRequest, Watchdog], None]


def run_worker(task: str, *, config_path: Path, overrides: list[str], work: Work) -> None:
    """Runs `work` and ends the process with the documented exit code. Does not return.

    A failed rank leaves without waiting for anything: its peers' collectives then fail at once instead of hanging.
    """

    def begin() -> RunConfig:
        config = load_config(config_path, overrides=overrides)
        if config.task != task:
            raise ConfigError(
                f"task ({config.task}) in {config_path} does not agree with the verb {task}; use that verb"
            )
        if not environment.is_set():
            raise ConfigError(
                f"{task} runs in the ranks of a torchrun world; start it with `megatron-xy run {config_path}`, or with "
                f"torchrun --standalone --nproc-per-node N -m megatron_xy {task} {config_path}"
            )
        run_folder.prepare(config.run_dir)
        run_folder.refuse_if_busy(config.run_dir)  # before this rank's own files there are touched
        return config

    _live(begin, work, run_dir_at_start=partial(run_dir_of, config_path, overrides=overrides))


def run_model_rank(job: ModelJob, *, work: Work) -> None:
    """Likewise, for one rank of a verb over a model; its work folder is the run folder. Does not return."""
    run_dir = Path(job.run_dir)
    _live(lambda: job.options().model_copy(update={"run_dir": run_dir}), work, run_dir_at_start=lambda: run_dir)


def _live(begin: Callable[[], RunConfig], work: Work, *, run_dir_at_start: Callable[[], Path | None]) -> None:
    signals.block_stop_signals()
    orphans.die_with_parent()
    environment.allow_open_files()
    rank = environment.rank()
    run_dir = run_dir_at_start()

    def on_leave(message: str) -> None:
        _record(run_dir, code=EXIT_STOPPED, message=message, rank=rank)

    stop = signals.StopRequest(on_leave=on_leave)
    code, message, trace = EXIT_DONE, "done", ""
    watchdog: Watchdog | None = None
    try:
        config = begin()
        watchdog = Watchdog(
            config.run_dir,
            rank=rank,
            world_size=environment.world_size(),
            timeout_seconds=config.runtime.timeout_seconds,
            phase="import",
            stop=stop,
        )
        work(config, stop, watchdog)
    except MegatronXYError as error:
        if isinstance(error, PeerLost) and watchdog is not None:
            watchdog.await_report()
        code, message = error.exit_code, str(error)
    except OSError as error:
        code, message = EXIT_IO, f"{type(error).__name__}: {error}"
    except MemoryError as error:
        code, message = EXIT_BAD_CONFIG, str(memory_error(error))
    except BaseException as error:  # a bug of ours: the traceback, and the documented code
        code, message, trace = EXIT_BUG, f"{type(error).__name__}: {error}", traceback.format_exc()
    standing = _record(run_dir, code=code, message=message, rank=rank)
    if code != EXIT_DONE and not _is_told(standing, message=message, rank=rank, is_bug=bool(trace)):
        print(_in_words(code, message, trace=trace, rank=rank), file=sys.stderr)
    if watchdog is not None:
        watchdog.close(phase=END)
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own shutdown: it would wait for threads whose peers are gone.
    os._exit(code)


def _record(run_dir: Path | None, *, code: int, message: str, rank: int) -> run_folder.ExitRecord | None:
    """What RUN/exit.json says then; None where there is no run folder that this run may and can write."""
    if run_dir is None:
        return None
    try:
        run_folder.prepare(run_dir)
        return run_folder.record_exit(run_dir, code=code, message=message, rank=rank)
    except (MegatronXYError, OSError) as error:
        print(f"rank {rank}: exit code {code} could not be recorded: {error}", file=sys.stderr)
        return None


def _is_told(standing: run_folder.ExitRecord | None, *, message: str, rank: int, is_bug: bool) -> bool:
    """Whether somebody else says this: the rank that found it first, or the supervisor, who shows exit.json."""
    if standing is None:
        return rank != 0  # what leaves no record is the same on all ranks
    if standing.message != message:
        return False
    is_shown_later = orphans.SUPERVISOR_VARIABLE in os.environ and not is_bug  # a bug's traceback is not in exit.json
    return standing.rank != rank or is_shown_later


def _in_words(code: int, message: str, *, trace: str, rank: int) -> str:
    if trace:
        return f"rank {rank}: this is a bug in megatron_xy\n{trace}"
    return f"rank {rank}: {message}" if code in (EXIT_IO, EXIT_PEER_LOST) else f"error ({code}): {message}"
