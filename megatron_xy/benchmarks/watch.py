"""`megatron-xy evaluate RUN --watch`: each new checkpoint of a run -> one line in RUN/evaluations.jsonl.

A job of its own beside the training, which it neither waits for nor holds up. A checkpoint is evaluated once, however
often the watch is killed and started: what it had answered of one is kept in RUN/.evaluations until its line is there.
An iteration that a run begun anew from an earlier one saves again is another checkpoint: its manifest tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from megatron_xy import run_folder
from megatron_xy.benchmarks.answering import JobEnded
from megatron_xy.benchmarks.checkpoints import asked_folder, check_whole
from megatron_xy.benchmarks.suite import Benchmarks
from megatron_xy.benchmarks.verb import Placement, evaluate
from megatron_xy.checkpoint.files import MANIFEST
from megatron_xy.checkpoint.folders import saved_iterations
from megatron_xy.errors import EXIT_BAD_DATA, EXIT_DONE, ConfigError, DataError, StorageError
from megatron_xy.record_files import read_records
from megatron_xy.storage import file_sha256, storage_errors, sync_folder

EVALUATIONS = "evaluations.jsonl"
LOCK = ".evaluate.lock"
WORK = ".evaluations"
POLL_SECONDS = 2.0
Say = Callable[[str], None]
Saved = tuple[int, str]  # an iteration, and the digest by which its checkpoint is known


def watch(run_dir: Path, benchmarks: Benchmarks, placement: Placement, *, say: Say) -> int:
    """Evaluates every verified checkpoint as it comes, until the run is done; returns the exit code.

    Of a PPO run it is the actor's. Raises ConfigError where there is no run, or one of reward models, RunDirBusy where
    another watch is at it.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: there is no such run; name the run_dir of one that has begun")
    passed_over: dict[Saved, bool] = {}  # whether it is there, but bad
    facts = {**benchmarks.facts, **placement.facts}
    told = ""
    with run_folder.lock(run_dir, name=LOCK):
        _mend(run_dir / EVALUATIONS)
        for saved in _done(run_dir / EVALUATIONS, facts):  # a kill may have come behind the line
            shutil.rmtree(_work_folder(run_dir, saved, facts), ignore_errors=True)
        while True:
            ended = run_folder.read_exit(run_dir)  # looked at first: what is saved before the end is there then
            is_over = ended is not None and ended.code == EXIT_DONE
            done = _done(run_dir / EVALUATIONS, facts)
            there = {(number, _identity(run_dir, number)) for number in saved_iterations(run_dir / "checkpoints")}
            left = sorted(there - done - passed_over.keys())
            for saved in left:
                code = _evaluate_one(run_dir, saved, benchmarks, placement, passed_over=passed_over, say=say)
                if code:
                    return code
            if is_over and not left:
                whole = {iteration for iteration, _ in there & done}
                bad = sorted({iteration for (iteration, _), is_bad in passed_over.items() if is_bad} - whole)
                but = f" but for {', '.join(map(str, bad))}, which are bad" if bad else ""
                say(f"{run_dir}: the run is done, and its checkpoints are evaluated{but}")
                return EXIT_BAD_DATA if bad else EXIT_DONE
            if not left:
                if (waiting := _waits_for(run_dir, ended)) != told:
                    say(waiting)
                    told = waiting
                time.sleep(POLL_SECONDS)


def _evaluate_one(
    run_dir: Path,
    saved: Saved,
    benchmarks: Benchmarks,
    placement: Placement,
    *,
    passed_over: dict[Saved, bool],
    say: Say,
) -> int:
    """One checkpoint's line, or why there is none; returns the exit code of ranks that ended badly."""
    iteration, identity = saved
    folder = asked_folder(run_dir, iteration)
    facts = {**benchmarks.facts, **placement.facts}
    work = _work_folder(run_dir, saved, facts)
    try:
        check_whole(folder, run_dir=run_dir)
        with storage_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        say(f"iteration {iteration}: evaluating")
        began = time.monotonic()
        metrics = evaluate(f"ckpt:{folder}", benchmarks, placement, folder=work)
    except (ConfigError, DataError, StorageError, JobEnded) as error:
        if folder.exists() and isinstance(error, JobEnded) and error.code != EXIT_BAD_DATA:
            return error.code
        if folder.exists() and isinstance(error, ConfigError | StorageError):
            raise
        why = str(error) if folder.exists() else "it was removed meanwhile (checkpoint.keep_latest)"
        say(f"iteration {iteration} is passed over: {why}")
        passed_over[saved] = folder.exists()
        return 0
    if _identity(run_dir, iteration) not in (identity, ""):
        say(f"iteration {iteration} was saved again meanwhile, and is evaluated again")
        return 0
    record = {
        "iteration": iteration,
        "checkpoint": identity,
        **facts,
        "results": metrics,
        "seconds": round(time.monotonic() - began, 3),
    }
    _append(run_dir / EVALUATIONS, record)
    shutil.rmtree(work)
    accuracies = [
        f"{task} acc {metrics[task]['acc']:.4f}" for task in benchmarks.names if "acc" in metrics.get(task, {})
    ]
    say(f"iteration {iteration}: {', '.join(accuracies) or 'done'}")
    return 0


def _waits_for(run_dir: Path, ended: run_folder.ExitRecord | None) -> str:
    """What has to come before there is more to evaluate."""
    newest = max(saved_iterations(run_dir / "checkpoints"), default=None)
    what = "its first checkpoint" if newest is None else f"a checkpoint after iteration {newest}"
    if ended is None:
        return f"{run_dir}: waits for {what}"
    return f"{run_dir}: the run has ended with {ended.code} ({ended.name}); waits for {what} of a start that resumes it"


def _identity(run_dir: Path, iteration: int) -> str:
    """The digest of the manifest that is asked; empty where there is none."""
    path = asked_folder(run_dir, iteration) / MANIFEST
    try:
        status = path.stat()
        return _sha256(path, status.st_mtime_ns, status.st_ino)
    except FileNotFoundError:
        return ""


@cache
def _sha256(path: Path, _changed: int, _inode: int) -> str:
    """Of a manifest, which may have megabytes and is asked for at every look."""
    return file_sha256(path)


def _done(path: Path, facts: dict[str, Any]) -> set[Saved]:
    """The checkpoints whose lines are there, of the same questions put in the same way."""
    records = read_records(path)
    same = (record for record in records if all(record.get(name) == facts[name] for name in facts))
    return {(record["iteration"], str(record.get("checkpoint"))) for record in same}


def _mend(path: Path) -> None:
    """Takes away a last line that a kill left half-written."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with storage_errors(path):
            os.truncate(path, whole)


def _append(path: Path, record: dict[str, Any]) -> None:
    """One line, on the disk when this returns."""
    with storage_errors(path):
        with path.open("ab") as stream:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(path.parent)


def _work_folder(run_dir: Path, saved: Saved, facts: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps([saved[1], facts]).encode()).hexdigest()
    return run_dir / WORK / f"{saved[0]:07d}-{digest[:12]}"
