"""The main job end to end on real input, on this machine's CPU: what `make demo` runs.

A corpus that every Python installation holds -> tokenizer -> packed buckets -> training on 4 ranks (tensor parallel 2
x pipeline parallel 2) -> the same training again, killed half-way and resumed, compared bit for bit -> HF export,
opened by transformers -> a report. Every step is a command that is printed and can be typed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_xy.errors import MegatronXYError
from megatron_xy.log import METRICS
from megatron_xy.report.page import ReportSection
from megatron_xy.report.verb import make_report
from megatron_xy.run_folder import read_heartbeats

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path("examples/tiny/pretrain.yaml")
RANKS = 4
BUCKETS = "128,256,512,1024"
VOCAB_SIZE = 4096
PROMPT = "Returns the number of"
QUIET_SECONDS = 4.0  # after which a working command is said to be still working
COMPARED = ("iteration", "data_step", "bucket", "loss", "loss_by_source", "grad_norm", "lr", "consumed_tokens")


class Failed(Exception):
    """A step of the demo did not do what it must."""


def main() -> int:
    """Runs the demo and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where a folder for this run is made")
    parser.add_argument("--train-iters", type=int, default=100, help="steps of each of the two trainings")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = new_folder(options.output)
    try:
        Demo(folder, train_iters=options.train_iters).run()
    except (Failed, MegatronXYError) as error:
        print(f"\nthe demo failed: {error}\nwhat it made lies in {folder}", file=sys.stderr)
        return 1
    return 0


def new_folder(base: Path) -> Path:
    """A folder of this run's own under `base`, named by the time; `base`/latest leads to it."""
    folder = base / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    link = base / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.rename(base / "latest")
    return folder


class Demo:
    """The steps in their order, each timed."""

    def __init__(self, folder: Path, *, train_iters: int) -> None:
        self.folder = folder
        self.train_iters = train_iters
        self.timings: dict[str, float] = {}
        self.statements: list[str] = []

    def run(self) -> None:
        """All steps, then the report."""
        began = time.monotonic()
        data, unbroken, killed, released = (self.folder / name for name in ("data", "unbroken", "killed", "hf"))
        corpus, tokenizer = self.folder / "corpus", self.folder / "tokenizer.model"
        with self._step("corpus", "a corpus from this Python installation: code and prose"):
            run(tool("collect_corpus"), "--output", corpus)
        with self._step("tokenizer", "a Llama-style SentencePiece BPE with byte fallback"):
            run(tool("train_tokenizer"), "--input", corpus, "--output", tokenizer, "--vocab-size", VOCAB_SIZE)
        with self._step("data", "tokenise and pack into buckets, as Megatron's .bin/.idx"):
            options = ["--buckets", BUCKETS, "--source-field", "source", "--append-eod", "--workers", "2"]
            run(*verb("data", "build"), "--input", corpus, "--tokenizer", tokenizer, "--output", data, *options)
        with self._step(
            "training", f"{self.train_iters} steps on {RANKS} ranks: tensor parallel 2 x pipeline parallel 2"
        ):
            run(*self._train(unbroken, data))
        with self._step("training, killed and resumed", "the same again; one rank is killed with SIGKILL half-way"):
            self._train_killed(killed, data)
        with self._step("comparison", "the killed and resumed run against the unbroken one"):
            self._compare(unbroken, killed)
        with self._step("export", "to HF format, opened by transformers in a process of its own"):
            last = f"ckpt:{unbroken}/checkpoints/iter_{self.train_iters:07d}"
            said = run(*verb("convert"), "--from", last, "--to", f"hf:{released}", "--tokenizer", tokenizer, "--verify")
            self.statements.append(next(line for line in said if line.startswith("logits of transformers")))
        with self._step("generation", "by transformers, from the exported folder"):
            text = "\n".join(run(tool("generate_with_transformers"), released, "--prompt", PROMPT))
        self.timings["in all"] = time.monotonic() - began
        self._report(unbroken, killed, released, text)

    def _train(self, run_dir: Path, data: Path) -> list[str]:
        overrides = [f"run_dir={run_dir}", f"data.path={data}", f"training.train_iters={self.train_iters}"]
        return [*verb("run"), str(CONFIG), "--nproc-per-node", str(RANKS), "--restarts", "1", *overrides]

    def _train_killed(self, run_dir: Path, data: Path) -> None:
        half = self.train_iters // 2
        victim = RANKS - 1
        killed: list[int] = []

        def kill_half_way() -> None:
            beat = read_heartbeats(run_dir).get(victim) if (run_dir / "heartbeats").is_dir() else None
            if beat is not None and beat.iteration > half and not killed:
                killed.append(beat.iteration)
                os.kill(beat.pid, signal.SIGKILL)
                print(
                    f"*** killed rank {victim} (pid {beat.pid}) with SIGKILL at step {beat.iteration} ***", flush=True
                )

        run(*self._train(run_dir, data), meanwhile=kill_half_way)
        if not killed:
            raise Failed("the run was over before it could be killed; give more --train-iters")
        self.statements.append(
            f"rank {victim} was killed with SIGKILL at step {killed[0]}; the supervisor went on by itself"
        )

    def _compare(self, unbroken: Path, killed: Path) -> None:
        curves = [[{key: row[key] for key in COMPARED} for row in rows(run_dir)] for run_dir in (unbroken, killed)]
        if len(curves[0]) != self.train_iters or curves[0] != curves[1]:
            different = [a["iteration"] for a, b in zip(*curves, strict=False) if a != b]
            raise Failed(f"the curves differ: {len(curves[0])} and {len(curves[1])} steps, first at {different[:1]}")
        last = f"checkpoints/iter_{self.train_iters:07d}"
        hashes = [
            json.loads("".join(run(*verb("checkpoint", "hash"), run_dir / last, "--json", quiet=True)))
            for run_dir in (unbroken, killed)
        ]
        if hashes[0] != hashes[1]:
            raise Failed("the curves are equal, the final weights or optimizer states are not")
        first, final = curves[0][0]["loss"], curves[0][-1]["loss"]
        self.statements += [
            f"loss {first:.3f} at the first step, {final:.3f} at the last",
            f"killed and resumed = unbroken, bit for bit: {self.train_iters} losses, gradient norms and learning "
            f"rates, and all {len(hashes[0])} tensors of weights and optimizer",
        ]
        for statement in self.statements:
            print(statement)

    def _report(self, unbroken: Path, killed: Path, released: Path, text: str) -> None:
        places = [
            ("what", "where"),
            ("corpus, tokenizer, packed data", str(self.folder)),
            ("the unbroken run: metrics, logs, checkpoints, TensorBoard", str(unbroken)),
            ("the run that was killed", str(killed)),
            ("the release in HF format", str(released)),
        ]
        page = make_report(
            unbroken,
            timings=self.timings,
            sections=[
                ReportSection("What was shown", statements=self.statements),
                ReportSection("Where everything lies", rows=places),
                ReportSection("Generated by transformers from the exported model", text=text),
                ReportSection("What to try next", statements=next_steps(self.folder, released)),
            ],
        )
        print("\n=== done ===")
        for name, seconds in self.timings.items():
            print(f"  {name:<30} {seconds:6.1f} s")
        for what, where in places[1:]:
            print(f"  {what:<60} {where}")
        print(f"  {'the report, with pictures':<60} {page}")
        print("What to try next:")
        for step in next_steps(self.folder, released):
            print(f"  {step}")

    @contextmanager
    def _step(self, name: str, title: str) -> Iterator[None]:
        print(f"\n=== {name}: {title} ===", flush=True)
        began = time.monotonic()
        yield
        self.timings[name] = time.monotonic() - began
        print(f"--- {name}: {self.timings[name]:.1f} s ---", flush=True)


def next_steps(folder: Path, released: Path) -> list[str]:
    """Commands worth typing after the demo."""
    command = ".venv/bin/megatron-xy"
    return [
        f"another layout of the same model: {command} run {CONFIG} --nproc-per-node 2 "
        "parallel.pipeline_model_parallel_size=1 run_dir=runs/tp2",
        f"a look at the data: {command} data stats {folder}/data",
        f"go on training from the release: {command} run {CONFIG} --nproc-per-node 4 model.load=hf:{released} "
        "run_dir=runs/continued",
        f"all curves in TensorBoard: .venv/bin/tensorboard --logdir {folder}",
    ]


def tool(name: str) -> str:
    """A script of this folder."""
    return str(Path("tools") / f"{name}.py")


def verb(*words: str) -> list[str]:
    """The command line of `megatron-xy WORDS`."""
    return ["-m", "megatron_xy", *words]


def rows(run_dir: Path) -> list[dict[str, object]]:
    """The records of a run's metrics."""
    return [json.loads(line) for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines()]


def run(*arguments: object, meanwhile: Callable[[], None] | None = None, quiet: bool = False) -> list[str]:
    """Runs Python with `arguments`, shows and returns what it prints; says so when it is long silent.

    meanwhile: called every fifth of a second. Raises Failed where the command does.
    """
    command = [sys.executable, *map(str, arguments)]
    shown = shlex.join(["python", *command[1:]]).replace("python -m megatron_xy", "megatron-xy")
    print(f"$ {shown}", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    said: list[str] = []
    began = spoke = time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=0.2)
                if line is None:
                    break
                said.append(line)
                if not quiet:
                    print(line, flush=True)
                    spoke = time.monotonic()
            except queue.Empty:
                now = time.monotonic()
                if now - spoke > QUIET_SECONDS:
                    print(f"  ... working, {now - began:.0f} s", flush=True)
                    spoke = now
            if meanwhile is not None:
                meanwhile()
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    if process.returncode:
        raise Failed(f"`{shown}` ended with {process.returncode}")
    return said


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None, "the command was started with a pipe"
    for line in process.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


if __name__ == "__main__":
    sys.exit(main())
