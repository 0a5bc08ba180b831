"""What the demos are made of: commands that are printed, run and watched, each step timed, in a folder of its own."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_xy.log import METRICS

ROOT = Path(__file__).resolve().parent.parent
RANKS = 4
BUCKETS = "128,256,512,1024"
VOCAB_SIZE = 4096
PRETRAIN = Path("examples/tiny/pretrain.yaml")
QUIET_SECONDS = 4.0  # after which a working command is said to be still working


class Failed(Exception):
    """A step of a demo did not do what it must."""


class Steps:
    """Steps in their order, each timed, and what they have shown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.timings: dict[str, float] = {}
        self.statements: list[str] = []
        self._began = time.monotonic()

    def pretrain(self, train_iters: int) -> Path:
        """Corpus, tokenizer, packed data and a model trained on it; returns the run's folder, `unbroken`."""
        corpus, tokenizer, data = (self.folder / name for name in ("corpus", "tokenizer.model", "data"))
        with self.step("corpus", "a corpus from this Python installation: code and prose"):
            run(tool("collect_corpus"), "--output", corpus)
        with self.step("tokenizer", "a Llama-style SentencePiece BPE with byte fallback"):
            run(tool("train_tokenizer"), "--input", corpus, "--output", tokenizer, "--vocab-size", VOCAB_SIZE)
        with self.step("data", "tokenise and pack into buckets, as Megatron's .bin/.idx"):
            options = ["--buckets", BUCKETS, "--source-field", "source", "--append-eod", "--workers", "2"]
            run(*verb("data", "build"), "--input", corpus, "--tokenizer", tokenizer, "--output", data, *options)
        with self.step("training", f"{train_iters} steps on {RANKS} ranks: tensor parallel 2 x pipeline parallel 2"):
            unbroken = self.folder / "unbroken"
            run(*self.training(unbroken, train_iters))
        return unbroken

    def training(self, run_dir: Path, train_iters: int) -> list[str]:
        """The command of the pre-training in a run folder."""
        overrides = [f"run_dir={run_dir}", f"data.path={self.folder / 'data'}", f"training.train_iters={train_iters}"]
        return [*verb("run"), str(PRETRAIN), "--nproc-per-node", str(RANKS), "--restarts", "1", *overrides]

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Says what is done, and how long it took."""
        print(f"\n=== {name}: {title} ===", flush=True)
        began = time.monotonic()
        yield
        self.timings[name] = time.monotonic() - began
        print(f"--- {name}: {self.timings[name]:.1f} s ---", flush=True)

    def end(self, *, places: Sequence[tuple[str, object]], next_steps: Sequence[str]) -> None:
        """Says what was done, where it lies, and what to try."""
        print("\n=== done ===")
        for name, seconds in self.timings.items():
            print(f"  {name:<30} {seconds:6.1f} s")
        for what, where in places:
            print(f"  {what:<60} {where}")
        print("What to try next:")
        for step in next_steps:
            print(f"  {step}")

    def stop_the_clock(self) -> None:
        """The time of all steps together is that so far."""
        self.timings["in all"] = time.monotonic() - self._began


def new_folder(base: Path) -> Path:
    """A folder of this run's own under `base`, named by the time; `base`/latest leads to it."""
    folder = base / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    link = base / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.rename(base / "latest")
    return folder


def tool(name: str) -> str:
    """A script of this folder."""
    return str(Path("tools") / f"{name}.py")


def verb(*words: str) -> list[str]:
    """The command line of `megatron-xy WORDS`."""
    return ["-m", "megatron_xy", *words]


def rows(run_dir: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The records of a run's metrics, or of another file of its folder."""
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


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
