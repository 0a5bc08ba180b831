"""`megatron-xy logprobs`: token rows -> the log-probability of each token after those before it.

IDS.jsonl -> the model's ranks, each replica its share of the rows -> parts in the work folder -> OUTPUT
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_xy import run_folder
from megatron_xy.checkpoint.files import METADATA
from megatron_xy.config import RunConfig
from megatron_xy.data.rows import BadRow, read_rows
from megatron_xy.inference.model_job import ModelJob, run_job
from megatron_xy.inference.model_ranks import complete_options, joined
from megatron_xy.inference.partial_results import make_beside
from megatron_xy.model.logits import logprobs_of
from megatron_xy.run_folder import RunDirBusy
from megatron_xy.runtime import environment
from megatron_xy.runtime.signals import StopRequest
from megatron_xy.runtime.watchdog import Watchdog
from megatron_xy.storage import replace, storage_errors, temporary_name
from megatron_xy.tensors.files import read_tensor, write_tensors
from megatron_xy.tensors.safetensors_file import SafetensorsFile

_PARTS = "part-*.safetensors"


def logprobs_file(job: ModelJob, *, say: Callable[[str], None]) -> int:
    """The whole verb; returns the exit code. Row i becomes tensor "i" [row length - 1] fp32.

    Raises ConfigError for arguments and paths, DataError for bad rows and damaged weights, StorageError.
    """
    output, folder = Path(job.arguments["output"]), Path(job.run_dir)
    make_beside(output, folder)
    try:
        rows = _rows(job, complete_options(job.options()))
        code = run_job(job, in_this_process=lambda job: _compute(job, beat=lambda: None))
        if code == 0:
            with run_folder.lock(folder, name=run_folder.SUPERVISOR_LOCK):
                _join(folder, output, num_rows=len(rows))
            say(f"wrote {output}: {len(rows):,} rows, {sum(map(len, rows)):,} tokens")
    except RunDirBusy:  # the folder is another's, who is at work in it
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return code


def logprobs_in_rank(job: ModelJob, config: RunConfig, stop: StopRequest, watchdog: Watchdog) -> None:
    """One rank's part of the verb."""
    stop.nothing_to_save = "; nothing is kept, and the same command starts afresh"
    watchdog.beat(iteration=0, phase="weights")
    _compute(job, beat=lambda: watchdog.beat(iteration=1, phase="step"))


def _rows(job: ModelJob, config: RunConfig) -> list[list[int]]:
    vocab_size = config.model.vocab_size or 0

    def parse(row: dict[str, Any]) -> list[int]:
        tokens = row.get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
            raise BadRow('must be {"tokens": [...]} with at least one token id')
        if unknown := [token for token in tokens if not 0 <= token < vocab_size]:
            raise BadRow(f"holds token {unknown[0]}; the model knows 0..{vocab_size - 1}; leave the row out")
        return tokens

    return [row.value for row in read_rows(Path(job.arguments["input"]), option="--input", parse=parse)]


def _compute(job: ModelJob, *, beat: Callable[[], None]) -> None:
    """This rank's replica's share of the rows, left in the work folder by the last stage's first rank."""
    config = complete_options(job.options())
    rows = _rows(job, config)
    folder = Path(job.run_dir)
    if environment.rank() == 0:  # before any rank goes on from here: what a killed run has left
        for part in folder.glob(_PARTS):
            part.unlink()
    with joined(config) as role:
        groups = role.groups
        mine = range(groups.dp_rank, len(rows), groups.dp_size)
        found: dict[str, torch.Tensor] = {}
        for place, values in logprobs_of(role, [rows[number] for number in mine]):
            beat()
            found[str(mine[place])] = values.cpu()
        if found and groups.is_last_stage and groups.tp_rank == 0:
            write_tensors(folder / f"part-{groups.dp_rank:05d}.safetensors", found, metadata=METADATA)


def _join(folder: Path, output: Path, *, num_rows: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob(_PARTS):
        part = SafetensorsFile(path)
        tensors |= {name: read_tensor(part, name) for name in part.tensors}
        part.close()
    assert tensors.keys() == set(map(str, range(num_rows))), "the parts are those of this run, and of all its rows"
    temporary = output.with_name(temporary_name(output.name))
    try:
        write_tensors(temporary, tensors, metadata=METADATA)
        with storage_errors(output):
            replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
