"""`megatron-xy logprobs`: token rows -> the log-probability of each token after those before it.

    IDS.jsonl -> the model's ranks, each replica its share of the rows -> OUTPUT.partial -> OUTPUT

Rows are kept as they are done; the same command goes on after a kill, also in another layout.
"""

from __future__ import annotations

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
from megatron_xy.inference.model_ranks import complete_options, joined, replica_writer
from megatron_xy.inference.partial_results import PartialResults, complete_job
from megatron_xy.model.logits import logprobs_of
from megatron_xy.storage import file_sha256
from megatron_xy.tensors.files import write_tensors


def run(job: ModelJob, *, say: Callable[[str], None]) -> int:
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
        in_this_process=lambda: _compute(job, config, beat=lambda: None),
        say=say,
        write=_write,
    )


def run_in_rank(job: ModelJob, *, beat: Callable[[], None]) -> None:
    """One rank's part of the verb. beat: called at every pass."""
    _compute(job, complete_options(job.options()), beat=beat)


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
    left = results.left(len(rows))
    with joined(config) as role, results.writing(replica_writer(role.groups)) as writer:
        mine = left[role.groups.dp_rank :: role.groups.dp_size]
        for place, values in logprobs_of(role, [rows[number] for number in mine]):
            beat()
            if writer is not None:
                writer.add(mine[place], {"logprobs": values.tolist()})


def _write(path: Path, lines: Iterable[bytes]) -> None:
    """JSON keeps every fp32 as it is."""
    values = (json.loads(line)["logprobs"] for line in lines)
    tensors = {str(number): torch.tensor(value, dtype=torch.float32) for number, value in enumerate(values)}
    write_tensors(path, tensors, metadata=METADATA)
