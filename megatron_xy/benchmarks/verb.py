"""`megatron-xy evaluate`: a model in a folder -> lm-eval's metrics of the benchmarks asked for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_xy.benchmarks.backend import MegatronXYLM
from megatron_xy.benchmarks.suite import Benchmarks, Metrics


@dataclass(frozen=True)
class Placement:
    """On how many ranks, in which layout, with which tokenizer and chat template a model is asked."""

    nproc_per_node: int
    overrides: list[str]
    tokenizer: str | None
    chat_template: str | None


def evaluate(origin: str, benchmarks: Benchmarks, placement: Placement, *, folder: Path | None = None) -> Metrics:
    """What the model in `origin` answers to the benchmarks.

    folder: where a killed evaluation is gone on with; None: it starts afresh. Raises JobEnded where the model's ranks
    ended badly, ConfigError, DataError, StorageError.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-xy-evaluate-") as temporary:
        backend = MegatronXYLM(
            origin,
            folder=folder or Path(temporary),
            nproc_per_node=placement.nproc_per_node,
            overrides=placement.overrides,
            tokenizer=placement.tokenizer,
            chat_template=placement.chat_template,
        )
        return benchmarks.ask(backend)
