"""`megatron-xy logprobs`: token rows -> the log-probability of each token after those before it.

    IDS.jsonl -> the model's ranks, each replica its share of the rows -> OUTPUT.partial -> OUTPUT

Rows are kept as they are done; the same command goes on after a kill, also in another layout.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_xy.checkpoint.files import METADATA
from megatron_xy.config import RunConfig
from megatron_xy.data.corpus.rows import BadRow, read_rows
from megatron_xy.inference.answers import identity_of
from megatron_xy.inference.model_job import ModelJob
from megatron_xy.inference.model_ranks import complete_options, joined
from megatron_xy.inference.partial_results import PartialResults, complete_job
from megatron_xy.model.logits import logprobs_of
from megatron_xy.runtime.signals import StopRequest
from megatron_xy.runtime.watchdog import Watchdog
from megatron_xy.storage import file_sha256
from megatron_xy.tensors.files import write_tensors


def logprobs_file(job: ModelJob, *, say: Callable[[str], None]) -> int:
    """The whole verb; returns the exit code. Row i becomes tensor "i" [row length - 1] fp32.

    Raises ConfigError for arguments and paths, DataError for bad rows and damaged weights, StorageError.
    """
    config = complete_options(job.options())
    rows = _rows(job, config)
    facts = {"model": identity_of(str(config.model.load)), "input": file_sha256(Path(job.arguments["input"]))}
    return complete_job(
        job,
        facts,
        wanted=len(rows),
        what="rows",
        in_this_process=lambda job: _compute(job, config, beat=lambda: None),
        say=say,
        write=_write,
    )


def logprobs_in_rank(job: ModelJob, config: RunConfig, stop: StopRequest, watchdog: Watchdog) -> None:
    """One rank's part of the verb."""
    stop.nothing_to_save = "; the rows that were done are kept, and the same command goes on"
    watchdog.beat(iteration=0, phase="weights")
    _compute(job, complete_options(job.options()), beat=lambda: watchdog.beat(iteration=1, phase="step"))


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


def _compute(job: ModelJob, config: RunConfig, *, beat: Callable[[], None]) -> None:
    """This rank's replica's share of the rows that are missing, kept by the last stage's first rank."""
    rows = _rows(job, config)
    results = PartialResults(Path(job.arguments["output"]))
    done = results.done()  # read before a rank of this run can have written
    left = [number for number in range(len(rows)) if number not in done]
    with joined(config) as role, contextlib.ExitStack() as stack:
        groups = role.groups
        mine = left[groups.dp_rank :: groups.dp_size]
        writer = None
        if groups.is_last_stage and groups.tp_rank == 0:
            writer = results.writer(groups.dp_rank)
            stack.callback(writer.close)
        for place, values in logprobs_of(role, [rows[number] for number in mine]):
            beat()
            if writer is not None:
                writer.add(mine[place], {"logprobs": values.tolist()})


def _write(path: Path, lines: Iterable[bytes]) -> None:
    """JSON keeps every fp32 as it is."""
    values = (json.loads(line)["logprobs"] for line in lines)
    tensors = {str(number): torch.tensor(value, dtype=torch.float32) for number, value in enumerate(values)}
    write_tensors(path, tensors, metadata=METADATA)
