"""What a run tells: a line and a metrics record each step, phases with their seconds, boards, a log file per rank.

RUN/metrics.jsonl holds one JSON object a step with floats unrounded, eval.jsonl one an evaluation, events.jsonl one a
step that was skipped or stands out, samples.jsonl answers of PPO; after a resume each iteration still stands once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO

from megatron_xy.boards import Board, open_boards
from megatron_xy.errors import Stopped
from megatron_xy.record_files import cut_records, read_records
from megatron_xy.storage import without_non_finite

METRICS = "metrics.jsonl"
EVALUATIONS = "eval.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples.jsonl"
_SCALARS = (
    "loss", "grad_norm", "lr", "tokens_per_second", "step_seconds", "data_wait_seconds", "padding_ratio", "mfu", "hfu",
    "consumed_tokens", "peak_memory_bytes",
)  # fmt: skip


class RunLog:
    """This rank's voice: every rank writes its file in RUN/logs, the leader also terminal, metrics, boards."""

    def __init__(self, run_dir: Path, *, rank: int, is_leader: bool, wandb_project: str | None = None) -> None:
        self.run_dir = run_dir
        self._wandb_project = wandb_project
        self.is_leader = is_leader
        self._has_steps = is_leader or rank == 0  # a thousand files need not say the same for weeks
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (run_dir / "logs" / f"rank-{rank:05d}.log").open("a", encoding="utf-8")
        self._records: dict[str, TextIO] = {}  # open files of the leader by name
        self._boards: list[Board] = []  # of the leader, once records are asked for

    def say(self, text: str, *, aloud: bool = False) -> None:
        """One line to this rank's log file, and on the leader, or aloud, to the terminal."""
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=self._file, flush=True)
        if self.is_leader or aloud:
            print(text, file=sys.stdout, flush=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Says how many seconds the block took."""
        began = time.monotonic()
        yield
        self.say(f"  {name:<28} {time.monotonic() - began:6.1f} s")

    def open_metrics(self, *, iteration: int) -> None:
        """Makes ready to add records after `iteration`: what an abandoned course wrote beyond it is cut off."""
        if not self.is_leader:
            return
        for name in (METRICS, EVALUATIONS, EVENTS, SAMPLES):
            cut_records(self.run_dir / name, iteration=iteration)
        self._boards = open_boards(self.run_dir, iteration=iteration, wandb_project=self._wandb_project, say=self.say)

    def step(self, record: dict[str, Any], *, train_iters: int) -> None:
        """One finished step: a line of the leader and of rank 0, an object in metrics.jsonl, scalars on the boards."""
        if self._has_steps:
            self.say(step_line(record, train_iters=train_iters))
        self._write(METRICS, record)
        scalars = {name: record[name] for name in _SCALARS if record.get(name) is not None}
        scalars[f"loss_by_bucket/{record['bucket']}"] = record["loss"]
        scalars |= {f"loss_by_source/{source}": loss for source, loss in record["loss_by_source"].items()}
        self._draw(scalars, record["iteration"])

    def ppo_step(self, record: dict[str, Any], *, train_iters: int) -> None:
        """One finished PPO step, likewise."""
        if self._has_steps:
            self.say(ppo_line(record, train_iters=train_iters))
        self._write(METRICS, record)
        scalars = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for field in ("seconds_by_phase", "seconds_by_role", "idle_share_by_role", "tokens_per_second_by_phase"):
            scalars |= {f"{field}/{name}": value for name, value in record[field].items()}
        self._draw(scalars, record["iteration"])

    def samples(self, samples: Sequence[dict[str, Any]], *, iteration: int) -> None:
        """Answers of a PPO step, an object each in samples.jsonl."""
        for sample in samples:
            self._write(SAMPLES, {"iteration": iteration, **sample})

    def evaluation(self, record: dict[str, Any], *, seconds: float) -> None:
        """One evaluation: a line, an object in eval.jsonl, scalars on the boards."""
        by_source = ", ".join(f"{source} {loss:.4f}" for source, loss in record["loss_by_source"].items())
        self.say(
            f"evaluation after step {record['iteration']}: loss {record['loss']:.4f}, perplexity "
            f"{record['perplexity']:,.2f} ({by_source}) | {record['num_loss_tokens']:,} tokens | {seconds:.2f} s"
        )
        self._write(EVALUATIONS, record)
        scalars = {f"eval/{name}": record[name] for name in ("loss", "perplexity")}
        for field in ("loss_by_bucket", "loss_by_source", "loss_by_position"):
            scalars |= {f"eval/{field}/{name}": loss for name, loss in record[field].items()}
        self._draw(scalars, record["iteration"])

    def pair_evaluation(self, record: dict[str, Any], *, lines: Sequence[str]) -> None:
        """One evaluation of a reward model: lines, an object in eval.jsonl, scalars on the boards."""
        for line in lines:
            self.say(line)
        self._write(EVALUATIONS, record)
        scalars: dict[str, float] = {}
        for part in ("held_out", "training"):
            numbers = record[part] or {}
            scalars |= {f"eval/{part}/{name}": value for name, value in numbers.items() if isinstance(value, float)}
        self._draw(scalars, record["iteration"])

    def has_evaluation(self, iteration: int) -> bool:
        """Whether eval.jsonl holds one of this iteration; only the leader can say yes."""
        records = read_records(self.run_dir / EVALUATIONS) if self._boards else []
        return any(record["iteration"] == iteration for record in records)

    def event(self, record: dict[str, Any]) -> None:
        """A step that was skipped or stands out: a line that says why, an object in events.jsonl."""
        self.say(f"  step {record['iteration']}, data step {record['data_step']}: {'; '.join(record['reasons'])}")
        self._write(EVENTS, record)

    def epochs(self, begun: Sequence[tuple[str, int, int]], *, data_step: int) -> None:
        """A line where a data step went beyond the end of some data: (source, bucket, number of the new epoch)."""
        if begun:
            names = ", ".join(f"{number} of {source} in bucket {bucket}" for source, bucket, number in begun)
            self.say(f"  data step {data_step} begins epoch {names}")

    def straggler(self, rank: int, factor: float, busy_seconds: float, *, iteration: int) -> None:
        """A rank that computes for much longer than the others: a line, and an object in events.jsonl."""
        self.say(
            f"  rank {rank} is slow: by step {iteration} it is busy for {busy_seconds:.3f} s a step, "
            f"{factor:.1f} times the other ranks' median for the work that its stage has"
        )
        self._write(EVENTS, {"iteration": iteration, "straggler": rank, "factor": factor, "busy_seconds": busy_seconds})

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self._boards:
            if name not in self._records:
                self._records[name] = (self.run_dir / name).open("a", encoding="utf-8")
            self._records[name].write(json.dumps(without_non_finite(record)) + "\n")
            self._records[name].flush()

    def _draw(self, scalars: dict[str, float], iteration: int) -> None:
        for board in self._boards:
            board.add(scalars, iteration=iteration)

    def close(self, *, at_once: bool = False) -> None:
        """Closes all files; `at_once` where the run fails: no board is waited for."""
        for board in self._boards:
            board.close(at_once=at_once)
        for stream in (*self._records.values(), self._file):
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(at_once=not (error is None or isinstance(error, Stopped)))


def step_line(record: dict[str, Any], *, train_iters: int) -> str:
    """A step as one line: step, bucket, loss, grad norm, lr, tokens/s, seconds, time to go."""
    width = len(str(train_iters))
    remaining = (train_iters - record["iteration"]) * record["step_seconds"]
    line = (
        f"step {record['iteration']:>{width}}/{train_iters} | bucket {record['bucket']:>5} | "
        f"loss {record['loss']:8.4f} | grad norm {record['grad_norm']:7.3f} | lr {record['lr']:.2e} | "
        f"{record['tokens_per_second']:>9,.0f} tokens/s | "
        f"{record['step_seconds']:6.2f} s | ETA {_duration(remaining)}"
    )
    if record["spike"]:
        return f"{line} | {'SKIPPED: spike' if record['skipped'] else 'SPIKE'}"
    return f"{line} | SKIPPED: {why_skipped(record)}" if record["skipped"] else line


def why_skipped(record: dict[str, Any]) -> str:
    """Why a step that is no spike left the weights as they were."""
    return "gradient not finite" if record["num_loss_tokens"] else "no label to learn from"


def ppo_line(record: dict[str, Any], *, train_iters: int) -> str:
    """A PPO step as one line: score, KL, entropy, losses, answers, what each role idles, time to go."""
    width = len(str(train_iters))
    remaining = (train_iters - record["iteration"]) * record["step_seconds"]
    idle = ", ".join(f"{name} {share:.0%}" for name, share in record["idle_share_by_role"].items())
    actor = "warm-up of the critic" if record["actor_loss"] is None else f"actor loss {record['actor_loss']:+.4f}"
    return (
        f"step {record['iteration']:>{width}}/{train_iters} | score {record['score_mean']:+.4f} | "
        f"kl {record['kl']:.4f} | entropy {record['entropy']:.3f} | {actor} | "
        f"critic loss {record['critic_loss']:.4f} | {record['response_length_mean']:.1f} tokens, "
        f"{record['end_rate']:.0%} ended | {record['step_seconds']:.2f} s | idle: {idle} | ETA {_duration(remaining)}"
    )


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
