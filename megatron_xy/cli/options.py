"""What verbs have in common: arguments of the same meaning, a rank's device, and how they say how it goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_xy.config import InvalidConfig, RunConfig

RunYaml = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="the run's config")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="override keys of RUN.yaml")
]
Layout = Annotated[
    list[str] | None, typer.Argument(metavar="[parallel.key=value]...", help="the layout, as in a RUN.yaml")
]
NprocPerNode = Annotated[int, typer.Option("--nproc-per-node", min=1, help="ranks on this machine")]
OtherTokenizer = Annotated[Path | None, typer.Option("--tokenizer", help="the model's own unless given")]
OtherTemplate = Annotated[
    str | None, typer.Option("--chat-template", metavar="NAME|FILE", help="for messages; the model's unless given")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]


def say(text: str) -> None:
    """Tells how long work goes, on stderr: stdout has the result."""
    print(text, file=sys.stderr, flush=True)


def start_rank_device(config: RunConfig) -> None:
    """What a rank computes on, as its config says; torch is imported here."""
    from megatron_xy import device
    from megatron_xy.runtime import environment

    device.start(
        local_rank=environment.local_rank(),
        num_threads=config.runtime.num_threads,
        deterministic=config.runtime.deterministic,
    )


def tell_whole(directory: Path, *, as_json: bool) -> None:
    """What a verify verb says where nothing is wrong."""
    print(json.dumps({"ok": True, "exit_code": 0}) if as_json else f"{directory}: whole and as it was written")


def failure(error: Exception, *, code: int) -> str:
    """The document of a verb that was asked for --json and failed: what stderr says, and each problem by itself."""
    problems = [str(problem) for problem in error.problems] if isinstance(error, InvalidConfig) else [str(error)]
    return json.dumps({"ok": False, "exit_code": code, "problem": str(error), "problems": problems})
