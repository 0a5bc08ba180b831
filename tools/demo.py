"""The main job end to end on real input, on this machine's CPU: what `make demo` runs.

A corpus that every Python installation holds -> tokenizer -> packed buckets -> training on 4 ranks (tensor parallel 2
x pipeline parallel 2) -> the same training again, killed half-way and resumed, compared bit for bit -> HF export,
opened by transformers -> a report. Every step is a command that is printed and can be typed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from demo_steps import PRETRAIN, RANKS, ROOT, Failed, Steps, new_folder, rows, run, tool, verb

from megatron_xy.errors import MegatronXYError
from megatron_xy.report.page import ReportSection
from megatron_xy.report.verb import make_report
from megatron_xy.run_folder import read_heartbeats

PROMPT = "Returns the number of"
COMPARED = ("iteration", "data_step", "bucket", "loss", "loss_by_source", "grad_norm", "lr", "consumed_tokens")


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


class Demo(Steps):
    """The steps in their order, each timed."""

    def __init__(self, folder: Path, *, train_iters: int) -> None:
        super().__init__(folder)
        self.train_iters = train_iters

    def run(self) -> None:
        """All steps, then the report."""
        killed, released = self.folder / "killed", self.folder / "hf"
        unbroken = self.pretrain(self.train_iters)
        with self.step("training, killed and resumed", "the same again; one rank is killed with SIGKILL half-way"):
            self._train_killed(killed)
        with self.step("comparison", "the killed and resumed run against the unbroken one"):
            self._compare(unbroken, killed)
        with self.step("export", "to HF format, opened by transformers in a process of its own"):
            last = f"ckpt:{unbroken}/checkpoints/iter_{self.train_iters:07d}"
            options = ["--tokenizer", self.folder / "tokenizer.model", "--verify"]
            said = run(*verb("convert"), "--from", last, "--to", f"hf:{released}", *options)
            self.statements.append(next(line for line in said if line.startswith("logits of transformers")))
        with self.step("generation", "by transformers, from the exported folder"):
            text = "\n".join(run(tool("generate_with_transformers"), released, "--prompt", PROMPT))
        self.stop_the_clock()
        self._report(unbroken, killed, released, text)

    def _train_killed(self, run_dir: Path) -> None:
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

        run(*self.training(run_dir, self.train_iters), meanwhile=kill_half_way)
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
        self.end(
            places=[*places[1:], ("the report, with pictures", page)], next_steps=next_steps(self.folder, released)
        )


def next_steps(folder: Path, released: Path) -> list[str]:
    """Commands worth typing after the demo."""
    command = ".venv/bin/megatron-xy"
    return [
        f"another layout of the same model: {command} run {PRETRAIN} --nproc-per-node 2 "
        "parallel.pipeline_model_parallel_size=1 run_dir=runs/tp2",
        f"a look at the data: {command} data stats {folder}/data",
        f"go on training from the release: {command} run {PRETRAIN} --nproc-per-node 4 model.load=hf:{released} "
        "run_dir=runs/continued",
        f"all curves in TensorBoard: .venv/bin/tensorboard --logdir {folder}",
    ]


if __name__ == "__main__":
    sys.exit(main())
