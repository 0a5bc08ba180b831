"""From nothing to a model that PPO has taught, on this machine's CPU: what `make demo-chain` runs.

Corpus, tokenizer, data and pre-training as `make demo` has them -> fine-tuning on conversations -> a reward model from
pairs of answers -> PPO with four roles on 4 ranks -> HF folders of the models before and after it, in bf16 and in 8
bits -> a report. The stages are examples/tiny's files as they stand but for their run folders; every step is a command
that is printed and can be typed. What PPO taught is measured by the toy preferences' own rule, which no stage is told,
on prompts that no stage has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from demo_steps import BUCKETS, RANKS, ROOT, Failed, Steps, new_folder, rows, run, tool, verb
from toy_preferences import true_score

from megatron_xy.errors import MegatronXYError
from megatron_xy.log import EVALUATIONS
from megatron_xy.report.page import ReportSection
from megatron_xy.report.verb import make_report

EXAMPLES = Path("examples/tiny")
PRETRAIN_ITERS, SFT_ITERS, PPO_ITERS = 100, 150, 40  # as in these files
ASKED = 100  # prompts on which the actor before and after PPO are compared
LONGEST = 24  # tokens of an answer
TIE_BAND = 0.05  # scores that far apart are the same
MOST_LOST = 0.01  # of the perplexity, in 8 bits


def main() -> int:
    """Runs the chain and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where a folder for this run is made")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars, which are lines here
    folder = new_folder(options.output)
    try:
        Chain(folder).run()
    except (Failed, MegatronXYError) as error:
        print(f"\nthe demo failed: {error}\nwhat it made lies in {folder}", file=sys.stderr)
        return 1
    return 0


class Chain(Steps):
    """The stages in their order, each from the last one's checkpoint."""

    def run(self) -> None:
        """All stages, then the report."""
        conversations, preferences = self.folder / "conversations", self.folder / "preferences"
        base, tokenizer = self.pretrain(PRETRAIN_ITERS), self.folder / "tokenizer.model"
        common = [f"data.tokenizer={tokenizer}"]
        with self.step("fine-tuning", "answers only, packed conversations, with a share of the pre-training text"):
            run(tool("toy_conversations"), "--output", conversations)
            run(tool("toy_preferences"), "--output", preferences, "--messages")
            paths = [conversations / "train.jsonl", preferences / "answers.jsonl", self.folder / "data"]
            load = f"model.load=ckpt:{base}/checkpoints/iter_{PRETRAIN_ITERS:07d}"
            held_out = f"data.eval_path={conversations / 'held_out.jsonl'}"
            sft = self._stage("sft", load, f"data.path={json.dumps([str(path) for path in paths])}", held_out, *common)
        actor = f"ckpt:{sft}/checkpoints/iter_{SFT_ITERS:07d}"
        with self.step("reward model", "pairs of answers, token by token; the epoch that is fit is selected"):
            pairs = [f"data.path={preferences / 'train.jsonl'}", f"data.eval_path={preferences / 'held_out.jsonl'}"]
            reward = self._stage("reward", f"model.load={actor}", *pairs, *common)
            selected = run(*verb("select"), reward)[-1]
        with self.step("PPO", "actor, critic, reference and reward model on ranks of their own"):
            prompts = self.folder / "prompts.jsonl"
            files = ["--preferences", preferences / "train.jsonl", "--new", preferences / "new_prompts.jsonl"]
            run(tool("build_prompts"), *files, "--output", prompts)
            models = [f"roles.{role}.model.load={selected}" for role in ("critic", "reward")]
            ppo = self._stage("ppo", f"model.load={actor}", *models, f"ppo.prompts={prompts}", *common)
        taught = f"ckpt:{ppo}/checkpoints/iter_{PPO_ITERS:07d}/actor"
        with self.step("comparison", "the model before and after PPO, by the rule that nobody told it"):
            samples = self._compare(actor, taught, preferences / "held_out.jsonl")
        with self.step(
            "side by side", "both models' answers, blinded, in the eyes of the reward model and of the rule"
        ):
            self._side_by_side(selected)
        with self.step("release", "both models as HF folders, in bf16 and in 8 bits, opened by transformers"):
            table = self._release({"sft": actor, "ppo": taught}, held_out=conversations / "held_out.jsonl")
        self.stop_the_clock()
        self._report(base, sft, reward, ppo, samples=samples, table=table)

    def _stage(self, name: str, *overrides: str) -> Path:
        """Runs the example of that name in a run folder of that name, and makes its report."""
        run_dir = self.folder / name
        example = EXAMPLES / f"{name}.yaml"
        run(*verb("run"), example, "--nproc-per-node", RANKS, "--restarts", "1", f"run_dir={run_dir}", *overrides)
        run(*verb("report"), run_dir, quiet=True)
        return run_dir

    def _compare(self, before: str, after: str, held_out: Path) -> str:
        """Answers of both to the same new prompts, and what the rule says of them; returns some of them."""
        questions = [{"prompt": json.loads(line)["prompt"]} for line in held_out.read_text("utf-8").splitlines()]
        asked = self.folder / "asked.jsonl"
        asked.write_text("".join(json.dumps(row) + "\n" for row in questions[:ASKED]), encoding="utf-8")
        answers: list[list[str]] = []
        for name, model in (("before", before), ("after", after)):
            written = self.folder / f"answers-{name}.jsonl"
            options = ["--tokenizer", self.folder / "tokenizer.model", "--chat-template", "xuanyuan"]
            limits = ["--max-response-length", LONGEST, "--nproc-per-node", 2]
            run(*verb("generate"), model, "--prompts", asked, "--output", written, *options, *limits)
            answers.append([json.loads(line)["response"] for line in written.read_text("utf-8").splitlines()])
        prompts = [row["prompt"][-1]["content"] for row in questions[:ASKED]]
        first, last = (
            sum(true_score(prompt, text) for prompt, text in zip(prompts, said, strict=True)) / len(prompts)
            for said in answers
        )
        scores = [row["score_mean"] for row in rows(self.folder / "ppo")]
        self.statements += [
            f"the rule's share of right words on {len(prompts)} prompts that no stage has seen: {first:.3f} before "
            f"PPO, {last:.3f} after",
            f"the reward model's score {scores[0]:+.3f} at the first step, {scores[-1]:+.3f} at the last",
        ]
        for statement in self.statements:
            print(statement)
        if last <= first:
            raise Failed("PPO has taught nothing")
        return "\n\n".join(
            f"{prompt}\n  before: {one}\n  after:  {other}"
            for prompt, one, other in list(zip(prompts, *answers, strict=True))[:5]
        )

    def _side_by_side(self, reward_model: str) -> None:
        """Grades of both models' answers by two annotators, apart; says how often the model after PPO wins or ties."""
        named = [f"{name}={self.folder / f'answers-{name}.jsonl'}" for name in ("after", "before")]
        for annotator in ("reward", "rule"):
            folder = self.folder / f"side_by_side-{annotator}"
            sheet, grades = folder / f"{annotator}.jsonl", folder / "grades.jsonl"
            alone = ["--annotators", annotator, "--annotators-a-question", 1]
            run(tool("side_by_side"), "export", "--answers", *named, *alone, "--output", folder)
            if annotator == "reward":
                by = ["--reward-model", reward_model, "--tie-band", TIE_BAND]
                run(tool("side_by_side"), "grade", "--sheet", sheet, *by, "--output", grades)
            else:
                graded = [graded_by_the_rule(json.loads(line)) for line in sheet.read_text("utf-8").splitlines()]
                grades.write_text("".join(json.dumps(row) + "\n" for row in graded), encoding="utf-8")
            files = ["--key", folder / "key.jsonl", "--grades", grades]
            run(tool("side_by_side"), "report", *files, "--output", folder / "report")
            in_all = json.loads((folder / "report" / "report.json").read_text("utf-8"))["groups"][0]
            shares = ", ".join(f"{name} {in_all[name]['percent']:.0f} %" for name in ("good", "same", "bad"))
            self.statements.append(f"after PPO beside before, in the eyes of the {annotator}: {shares}")

    def _release(self, models: dict[str, str], *, held_out: Path) -> list[str]:
        """Writes hf-NAME and hf-NAME-int8 of each; returns how they compare on conversations that none has seen."""
        tokenizer, data = self.folder / "tokenizer.model", self.folder / "held_out"
        packed = ["--buckets", BUCKETS, "--source-field", "source", "--chat-template", "xuanyuan"]
        run(*verb("data", "build"), "--input", held_out, "--tokenizer", tokenizer, "--output", data, *packed)
        for name, model in models.items():
            released = ["--to", f"hf:{self.folder / f'hf-{name}'}", "--dtype", "bf16", "--tokenizer", tokenizer]
            said = run(*verb("convert"), "--from", model, *released, "--verify")
        self.statements.append(next(line for line in said if line.startswith("logits of transformers")))
        if missing := [name for name in ("accelerate", "bitsandbytes") if find_spec(name) is None]:
            self.statements.append(
                f"not released in 8 bits: {', '.join(missing)} not installed; pip install 'megatron-xy[int8]'"
            )
            print(self.statements[-1])
            return []
        table: list[str] = []
        for name in models:
            plain, int8 = (f"hf:{self.folder / f'hf-{name}{form}'}" for form in ("", "-int8"))
            run(*verb("quantize"), "--from", plain, "--to", int8, "--scheme", "int8")
            said = run(*verb("compare"), plain, int8, "--data", data, "--write-cards")
            head, *lines = [line for line in said if line.startswith(("form ", plain))]
            of_plain, of_int8 = (
                float(re.split("  +", line)[re.split("  +", head).index("perplexity")]) for line in lines
            )
            table += [head, *lines]
            self.statements.append(f"{name}: perplexity of answers {of_plain:.3f} in bf16, {of_int8:.3f} in 8 bits")
            print(self.statements[-1])
            if of_int8 > of_plain * (1 + MOST_LOST):
                raise Failed(f"8 bits cost {name} more than {MOST_LOST:.0%} of its perplexity")
        return table

    def _report(self, base: Path, sft: Path, reward: Path, ppo: Path, *, samples: str, table: list[str]) -> None:
        losses = [(row["iteration"], row["loss"]) for row in rows(sft, EVALUATIONS)]
        accuracy = rows(reward, EVALUATIONS)[-1]["held_out"]["accuracy"]
        self.statements[:0] = [
            "pre-training: loss {:.3f} at the first step, {:.3f} at the last".format(
                *(rows(base)[place]["loss"] for place in (0, -1))
            ),
            "fine-tuning: loss on held-out answers " + ", ".join(f"{loss:.3f} after {n}" for n, loss in losses),
            f"reward model: {accuracy:.1%} of the held-out pairs in the right order",
        ]
        places = [
            ("what", "where"),
            ("corpus, tokenizer, data, conversations, preferences", str(self.folder)),
            ("pre-training", str(base)),
            ("fine-tuning, with its report", str(sft)),
            ("reward model, with its report", str(reward)),
            ("PPO: metrics, checkpoints of actor and critic", str(ppo)),
            ("the model before PPO in HF format; -int8: in 8 bits", str(self.folder / "hf-sft")),
            ("the actor in HF format; -int8: in 8 bits", str(self.folder / "hf-ppo")),
            ("side by side with the model before PPO, by the reward model", str(self.folder / "side_by_side-reward")),
            ("the same by the rule", str(self.folder / "side_by_side-rule")),
        ]
        steps = [
            "examples/tiny's files run as they stand now, from what lies in runs/demo/latest: megatron-xy run "
            "examples/tiny/ppo.yaml --nproc-per-node 4",
            "the same step in another placement: the same, with roles.actor.ranks=0-3 run_dir=runs/shared",
            f"all curves in TensorBoard: .venv/bin/tensorboard --logdir {self.folder}",
        ]
        page = make_report(
            ppo,
            timings=self.timings,
            sections=[
                ReportSection("What was shown", statements=self.statements),
                *([ReportSection("Released forms", text="\n".join(table))] if table else []),
                ReportSection("Where everything lies", rows=places),
                ReportSection("Answers before and after PPO", text=samples),
                ReportSection("What to try next", statements=steps),
            ],
        )
        self.end(places=[*places[1:], ("the report, with pictures", str(page))], next_steps=steps)


def graded_by_the_rule(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a sheet with the grade that the toy preferences' rule gives: which answer has more right words."""
    prompt = row["prompt"][-1]["content"]
    first, second = (true_score(prompt, row[side]) for side in "AB")
    return {**row, "grade": "same" if first == second else "good" if first > second else "bad"}


if __name__ == "__main__":
    sys.exit(main())
