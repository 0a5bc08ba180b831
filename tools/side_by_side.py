"""Two models side by side: their answers -> blinded pairs for annotators -> grades -> good / same / bad per category.

    python tools/side_by_side.py export --answers ppo=A.jsonl sft=B.jsonl --prompts F.jsonl --output DIR
    python tools/side_by_side.py grade --sheet DIR/3.jsonl --reward-model ckpt:DIR --output GRADES.jsonl
    python tools/side_by_side.py report --key DIR/key.jsonl --grades GRADES... --output DIR

export takes what `megatron-xy generate` wrote, the model to be judged first, then the one it is measured against;
domain and category come from the file of prompts. Every question goes to three annotators (or N), who each get a sheet,
NAME.jsonl and NAME.csv, and NAME.html, a page to grade on that needs nothing else. Which model said what is in
key.jsonl alone: the places are drawn for each annotator. A grade says what A is beside B: good, same or bad. Nothing
is overwritten: a folder that holds anything but this very export is refused (78).

grade fills in a sheet by machine: by a reward model, whose scores at most --tie-band apart are the same, or by a
language model behind an OpenAI-compatible endpoint (--endpoint URL --model NAME), asked in both orders; where it
contradicts itself, the answers are the same. Replies that say neither A, B nor same are counted and kept; where more
than 5% of the questions have one, these stay without a grade (65). Both go on where a killed run stopped.

report takes all sheets and writes report.json, bars.png and index.html: the shares of good, same and bad grades and the
win-and-tie rate, in all, by domain and by category, in percent with 95% intervals; how far annotators agree; the
questions that were lost most clearly. Grades that are missing, doubled, contradictory or of another export are named
(65).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from annotation import (
    KEY,
    begin_export,
    lines_of,
    named_file,
    pair_shown,
    prompt_of,
    response_of,
    shown_prompt,
    write_sheet,
)

from megatron_xy.data.corpus.rows import read_rows
from megatron_xy.errors import ConfigError, DataError, UsageError, with_exit_code
from megatron_xy.storage import write_text

UNNAMED = "unnamed"  # the domain or category of prompts that name none
PAGE = Path(__file__).with_name("side_by_side_page.html")
SHOWN_PROMPTS = 5


@dataclass(frozen=True)
class Exported:
    """What an export wrote, or found: was_there says that nothing was missing.

    idle: the annotators who get no question, and no sheet. unknown: prompts that the file of prompts does not have.
    """

    questions: int
    was_there: bool
    idle: list[str]
    unknown: int


@with_exit_code
def main() -> None:
    """The exit code: 0, 2 (wrong options), 65 (bad rows or grades), 74 (no storage) or 78 (no such file)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    export = verbs.add_parser("export")
    export.add_argument("--answers", nargs=2, required=True, metavar="MODEL=FILE", help="the judged model's first")
    export.add_argument("--prompts", type=Path, metavar="F.jsonl", help="rows with prompt, category and domain")
    export.add_argument("--annotators", nargs="+", default=["1", "2", "3"], metavar="NAME", help="1 2 3 unless given")
    export.add_argument("--annotators-a-question", type=int, default=3, metavar="N")
    export.add_argument("--output", type=Path, required=True, metavar="DIR")
    export.add_argument("--seed", type=int, default=0)
    grade = verbs.add_parser("grade")
    grade.add_argument("--sheet", type=Path, required=True, metavar="NAME.jsonl")
    grade.add_argument("--output", type=Path, required=True, metavar="FILE")
    by = grade.add_mutually_exclusive_group(required=True)
    by.add_argument("--reward-model", metavar="ckpt:DIR|hf:DIR")
    by.add_argument("--endpoint", metavar="URL", help="such as http://localhost:8000/v1")
    grade.add_argument("--tie-band", type=float, default=0.0, help="scores that far apart are the same")
    grade.add_argument("--model", metavar="NAME", help="of the endpoint")
    grade.add_argument("--key-variable", default="OPENAI_API_KEY", help="the environment variable with its key, if any")
    grade.add_argument("--most-tokens", type=int, default=1024, help="of the endpoint's reply, reasoning included")
    report = verbs.add_parser("report")
    report.add_argument("--key", type=Path, required=True)
    report.add_argument("--grades", type=Path, nargs="+", required=True, metavar="FILE")
    report.add_argument("--output", type=Path, required=True, metavar="DIR")
    report.add_argument("--losses", type=int, default=10, metavar="N", help="clearly lost questions to show")
    options = parser.parse_args()
    for line in _carry_out(options):
        print(line)


def _carry_out(options: argparse.Namespace) -> list[str]:
    """What the verb has to say."""
    if options.verb == "export":
        files = [named_file(text) for text in options.answers]
        kinds = {} if options.prompts is None else kinds_in(options.prompts)
        written = export_pairs(
            files,
            options.output,
            kinds=kinds,
            annotators=options.annotators,
            per_question=options.annotators_a_question,
            seed=options.seed,
        )
        return _told(written, options)
    if options.verb == "grade":
        from side_by_side_graders import grade_by_endpoint, grade_by_reward_model

        if options.reward_model:
            count = grade_by_reward_model(
                options.sheet, options.output, model=options.reward_model, tie_band=options.tie_band
            )
            return [f"wrote {options.output}: {count:,} grades"]
        return grade_by_endpoint(
            options.sheet,
            options.output,
            url=options.endpoint,
            model=options.model,
            key_variable=options.key_variable,
            most_tokens=options.most_tokens,
        )
    if find_spec("krippendorff") is None:
        raise ConfigError("report needs krippendorff, which comes with the extra: pip install 'megatron-xy[judge]'")
    from side_by_side_report import write_report

    return write_report(options.key, options.grades, options.output, num_losses=options.losses)


def _told(written: Exported, options: argparse.Namespace) -> list[str]:
    if written.was_there:
        return [f"{options.output} holds these {written.questions:,} questions already; it stays as it is"]
    names = ", ".join(name for name in options.annotators if name not in written.idle)
    lines = [
        f"wrote {written.questions:,} questions to {options.output}: a jsonl, csv and html file each for {names}; "
        "key.jsonl"
    ]
    if written.idle:
        lines.append(f"there are too few questions for annotators {', '.join(written.idle)}: they get none")
    if written.unknown:
        lines.append(f"{written.unknown:,} prompts are not in --prompts: their domain and category are {UNNAMED}")
    return lines


def kinds_in(prompts: Path) -> dict[str, tuple[str, str]]:
    """{what a row asks, as JSON: (domain, category)}. Raises ConfigError or DataError."""

    def parse(row: dict[str, Any]) -> tuple[str, tuple[str, str]]:
        return prompt_of(row), (str(row.get("domain", UNNAMED)), str(row.get("category", UNNAMED)))

    return dict(row.value for row in read_rows(prompts, option="--prompts", parse=parse))


def export_pairs(
    files: Sequence[tuple[str, Path]],
    folder: Path,
    *,
    kinds: dict[str, tuple[str, str]],
    annotators: Sequence[str],
    per_question: int,
    seed: int,
) -> Exported:
    """Writes key, sheets and pages of (model, file of answers), two of them; of the very same export what is missing.

    Raises UsageError for annotators that do not do, ConfigError for a folder that holds something else, DataError
    where the files do not answer the same prompts, or `kinds`, unless empty, has none of them.
    """
    _check(annotators, per_question=per_question)
    (candidate, candidate_answers), (baseline, baseline_answers) = (
        (name, _first_answers(path)) for name, path in files
    )
    if candidate == baseline:
        raise UsageError(f"--answers {candidate}=... {baseline}=...: the two models must have different names")
    if unpaired := candidate_answers.keys() ^ baseline_answers.keys():
        shown = "; ".join(shown_prompt(json.loads(prompt))[:60] for prompt in sorted(unpaired)[:SHOWN_PROMPTS])
        raise DataError(f"{len(unpaired):,} prompts are answered in one of the files only, such as: {shown}")
    prompts = sorted(candidate_answers)
    unknown = len(candidate_answers.keys() - kinds.keys()) if kinds else 0
    if unknown == len(prompts):
        raise DataError(
            f"--prompts has none of the {unknown:,} prompts that are answered; name the file that `generate` was given"
        )
    random.Random(seed).shuffle(prompts)
    key = []
    for place, prompt in enumerate(prompts):
        domain, category = kinds.get(prompt, (UNNAMED, UNNAMED))
        chance = random.Random(f"{seed}/{prompt}")
        asked = [annotators[(place + step) % len(annotators)] for step in range(per_question)]
        key.append(
            {
                "id": f"q{place + 1:06d}",
                "domain": domain,
                "category": category,
                **json.loads(prompt),
                "candidate": {"model": candidate, "response": candidate_answers[prompt]},
                "baseline": {"model": baseline, "response": baseline_answers[prompt]},
                "A": {name: chance.choice(("candidate", "baseline")) for name in asked},
            }
        )
    begin_export(folder, lines_of(key))
    busy = [name for name in annotators if any(name in row["A"] for row in key)]
    missing = [name for name in busy if not (folder / f"{name}.html").exists()]
    for name in missing:
        rows = _sheet(key, name)
        random.Random(f"{seed}/{name}").shuffle(rows)
        write_sheet(folder, name, rows)
        write_text(folder / f"{name}.html", page_of(rows, annotator=name))  # last: where it lies, the sheets do
    idle = [name for name in annotators if name not in busy]
    return Exported(len(key), was_there=not missing, idle=idle, unknown=unknown)


def _check(annotators: Sequence[str], *, per_question: int) -> None:
    if not 1 <= per_question <= len(annotators):
        raise UsageError(
            f"--annotators-a-question ({per_question}): must be 1 to the number of annotators ({len(annotators)})"
        )
    if len(set(annotators)) != len(annotators):
        raise UsageError(f"--annotators {' '.join(annotators)}: must be different names")
    for name in annotators:
        if not re.fullmatch(r"[\w-]+", name) or name == KEY:
            raise UsageError(f"--annotators {name}: must be letters, digits, _ and -, as it names files; not {KEY}")


def page_of(rows: Sequence[dict[str, Any]], *, annotator: str) -> str:
    """The page on which an annotator grades these pairs; the browser keeps the grades under the pairs' digest."""
    shown = [{**row, "prompt": shown_prompt(row)} for row in rows]
    digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    content = json.dumps({"annotator": annotator, "digest": digest, "pairs": shown}, ensure_ascii=False)
    return PAGE.read_text(encoding="utf-8").replace("__SHEET__", content.replace("<", "\\u003c"))


def _first_answers(path: Path) -> dict[str, str]:
    """{what is asked, as JSON: response}; of several answers to a prompt the first."""
    answers: dict[str, str] = {}
    for row in read_rows(path, option="--answers", parse=lambda row: (prompt_of(row), response_of(row))):
        answers.setdefault(*row.value)
    return answers


def _sheet(key: Sequence[dict[str, Any]], annotator: str) -> list[dict[str, Any]]:
    """The questions of one annotator, blinded."""
    rows = []
    for row in key:
        if annotator in row["A"]:
            asked = {"id": row["id"], "annotator": annotator, "category": row["category"]}
            rows.append({**asked, **pair_shown(row, annotator), "grade": None})
    return rows


if __name__ == "__main__":
    sys.exit(main())
