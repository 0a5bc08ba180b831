"""A training job small enough to be run many times: its data and RUN.yaml, started and looked at as a user would."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.run_folder import read_heartbeats
from megatron_xy.runtime.orphans import is_running
from tests.building import build_dataset

BUCKETS = (32, 64, 128, 256)
VOCAB_SIZE = 400
TRAIN_ITERS = 16
SAVE_INTERVAL = 4
ONE_RANK = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1")
CLOCK_KEYS = {  # differ from run to run
    "step_seconds", "data_wait_seconds", "seconds_by_phase", "tokens_per_second", "mfu", "hfu", "peak_memory_bytes",
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


def make_data(folder: Path) -> Path:
    """A data folder of two sources with a long tail of lengths, so that every bucket is filled and drawn."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from train_tokenizer import train

    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 7))) for _ in range(400)]
    texts = []
    with (folder / "corpus.jsonl").open("w") as stream:
        for number in range(800):
            name, known, blank = (("code", words[:200], "\n    "), ("prose", words[200:], " "))[number % 2]
            length = source.choice((6, 12, 25, 60, 60, 120)) + source.randint(0, 4)
            texts.append(blank.join(source.choices(known, k=length)))
            stream.write(json.dumps({"text": texts[-1], "source": name}) + "\n")
    (folder / "tokenizer.model").write_bytes(train(texts, vocab_size=VOCAB_SIZE))
    data = folder / "data"
    build_dataset(
        [folder / "corpus.jsonl"],
        tokenizer=folder / "tokenizer.model",
        output=data,
        buckets=BUCKETS,
        source_field="source",
    )
    return data


def write_config(path: Path, *, data: Path) -> None:
    """A RUN.yaml for 4 ranks, tensor parallel 2 x pipeline parallel 2; its run_dir is to be overridden."""
    config = {
        "task": "pretrain",
        "run_dir": str(path.parent / "never-made"),
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": BUCKETS[-1],
        },
        "parallel": {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        "data": {"path": str(data), "tokenizer": str(data / "tokenizer.model")},
        "training": {"train_iters": TRAIN_ITERS, "global_batch_tokens": 1024, "micro_batch_tokens": BUCKETS[-1]},
        "optimizer": {"lr": 1.0e-2, "min_lr": 1.0e-3, "lr_warmup_iters": 2},
        "checkpoint": {"save_interval": SAVE_INTERVAL, "keep_latest": 2},
        "runtime": {"timeout_seconds": 60},
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def run_command(config: Path, *overrides: str, ranks: int, restarts: int = 0) -> list[str]:
    """`megatron-xy run`, as argv."""
    options = ["--nproc-per-node", str(ranks), "--restarts", str(restarts)]
    return [sys.executable, "-m", "megatron_xy", "run", str(config), *options, *overrides]


def trained(folder: Path, *overrides: str, ranks: int = 1) -> Path:
    """FOLDER/run, a run that has ended, on one rank or in RUN.yaml's layout; run.yaml and data lie beside it."""
    write_config(folder / "run.yaml", data=make_data(folder))
    layout = ONE_RANK if ranks == 1 else ()
    options = (f"run_dir={folder / 'run'}", *layout, *overrides)
    ended = run_to_end(run_command(folder / "run.yaml", *options, ranks=ranks))
    assert ended.code == 0, ended
    return folder / "run"


def torchrun_command(config: Path, *overrides: str) -> list[str]:
    """A bare torchrun of one rank, as argv."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    return [*launcher, "-m", "megatron_xy", "pretrain", str(config), *ONE_RANK, *overrides]


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The command while it runs; ended, should the block leave before it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_end(process: subprocess.Popen[str], *, seconds: float = 90) -> Ended:
    out, err = process.communicate(timeout=seconds)
    return Ended(process.returncode, out, err)


def run_to_end(command: Sequence[str]) -> Ended:
    with started(command) as process:
        return wait_for_end(process)


def wait_until(holds: Callable[[], Any], *, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Looks again every few milliseconds; fails once the process has ended or the time is up."""
    deadline = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None:
            raise AssertionError(f"it ended before: {wait_for_end(process)}")
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.01)


def live_rank_at(run_dir: Path, *, rank: int, iteration: int) -> int | None:
    """The process id of a rank that runs and has come as far as `iteration`."""
    beat = read_heartbeats(run_dir).get(rank)
    return beat.pid if beat and beat.iteration >= iteration and is_running(beat.pid) else None


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be the same in every run of one config, bit for bit."""
    return [{key: value for key, value in record.items() if key not in CLOCK_KEYS} for record in records]


def hash_of(checkpoint: Path) -> dict[str, Any]:
    """`megatron-xy checkpoint hash --json`."""
    result = CliRunner().invoke(app, ["checkpoint", "hash", str(checkpoint), "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def copy_run(source: Path, target: Path, *, iterations: Sequence[int]) -> Path:
    """A run folder of its own with some of another's checkpoints and its metrics."""
    for iteration in iterations:
        name = f"iter_{iteration:07d}"
        shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    shutil.copy(source / "metrics.jsonl", target)
    return target


def flip_bit(path: Path, *, offset: int) -> None:
    """One bit of one byte; a negative offset counts from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def processes_naming(text: str) -> list[str]:
    """Command lines of running processes in which `text` occurs."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_running(int(entry.name)):
            try:
                line = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
            if text in line:
                lines.append(f"{entry.name}: {line}")
    return lines
