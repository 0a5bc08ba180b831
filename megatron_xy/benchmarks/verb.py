"""`megatron-xy evaluate`: a model in a folder -> lm-eval's metrics of the benchmarks asked for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.benchmarks.backend import MegatronXYLM
from megatron_xy.benchmarks.suite import DIGEST_LENGTH, Benchmarks, Metrics
from megatron_xy.data.encoding.tokenizer import tokenizer_file
from megatron_xy.storage import file_sha256


@dataclass(frozen=True)
class Placement:
    """On how many ranks, in which layout, with which tokenizer and chat template a model is asked."""

    nproc_per_node: int
    overrides: list[str]
    tokenizer: str | None
    chat_template: str | None

    @property
    def facts(self) -> dict[str, Any]:
        """What an evaluation is known by besides the benchmarks: files with a digest; None: the model's own."""
        template = Path(self.chat_template or "")
        return {
            "chat_template": _with_digest(template) if template.is_file() else self.chat_template,
            "tokenizer": None if self.tokenizer is None else _with_digest(tokenizer_file(self.tokenizer)),
        }


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


def _with_digest(path: Path) -> str:
    return f"{path.name} {file_sha256(path)[:DIGEST_LENGTH]}"
