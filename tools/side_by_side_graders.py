"""A sheet filled in by machine: by a reward model's scores, or by a language model behind an OpenAI-like endpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from annotation import lines_of, shown_prompt
from chat_endpoint import endpoint_of

from megatron_xy.data.rows import BadRow, read_rows
from megatron_xy.errors import ConfigError
from megatron_xy.partial_results import PartialResults
from megatron_xy.storage import file_sha256, write_text

QUESTION = """\
Compare two answers to a prompt. Say which one is better: more helpful, more correct, more fitting.
Reply with one word: A, B, or same.

[Prompt]
{prompt}

[Answer A]
{a}

[Answer B]
{b}
"""


def grade_by_reward_model(sheet: Path, output: Path, *, model: str, tie_band: float) -> int:
    """Grades a sheet by what `megatron-xy score` says of both answers; returns the number of grades.

    An answer that says nothing is not scored: it is worse than one that says something, and the same as another one.
    Raises ConfigError, DataError or StorageError; where `score` ends badly, ends with its exit code.
    """
    if tie_band < 0:
        raise ConfigError(f"--tie-band ({tie_band}): must not be below 0")
    rows = _rows(sheet)
    answers, scores = (output.with_name(f"{output.name}.{what}.jsonl") for what in ("answers", "scores"))
    said = [(row["prompt"], row[side]) for row in rows for side in "AB"]
    write_text(answers, lines_of({"prompt": prompt, "response": text} for prompt, text in said if text.strip()))
    command = [sys.executable, "-m", "megatron_xy", "score", model, "--input", str(answers), "--output", str(scores)]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)  # it has said what is wrong
    scored = iter(read_rows(scores, option="scores", parse=lambda row: float(row["score"])))
    values = [next(scored).value if text.strip() else None for _, text in said]
    grades = [
        {
            "id": row["id"],
            "annotator": row["annotator"],
            "pair": row["pair"],
            "grade": grade_of(*pair, tie_band=tie_band),
            "scores": pair,
        }
        for row, *pair in zip(rows, values[::2], values[1::2], strict=True)
    ]
    write_text(output, lines_of(grades))
    answers.unlink()
    scores.unlink()
    return len(grades)


def grade_of(a: float | None, b: float | None, *, tie_band: float) -> str:
    """Of two scores, None for an answer that says nothing: good where A is better."""
    if a is None or b is None:
        return "same" if a is b else "bad" if a is None else "good"
    return "same" if abs(a - b) <= tie_band else "good" if a > b else "bad"


def grade_by_endpoint(sheet: Path, output: Path, *, url: str, model: str | None, key_variable: str) -> int:
    """Grades a sheet by a language model that sees each pair in both orders; returns the number of grades.

    Raises ConfigError, DataError or StorageError; what was graded until then is kept.
    """
    endpoint = endpoint_of(url, model, key_variable=key_variable)
    rows, results = _rows(sheet), PartialResults(output)

    def work() -> int:
        done = results.done()
        writer = results.writer(0)
        try:
            for number, row in enumerate(rows):
                if number not in done:
                    writer.add(number, _graded(row, ask=lambda text: endpoint.ask(text, max_tokens=8).text))
                    print(f"  {number + 1:,} of {len(rows):,} graded", file=sys.stderr, flush=True)
        finally:
            writer.close()
        return 0

    facts = {"sheet": file_sha256(sheet), "url": url, "model": model}
    results.complete(facts, wanted=len(rows), what="grades", work=work, say=lambda text: print(text, file=sys.stderr))
    return len(rows)


def _graded(row: dict[str, Any], *, ask: Callable[[str], str]) -> dict[str, Any]:
    """The row's grade: what is said in both orders, or a tie."""
    prompt = shown_prompt(row["prompt"])
    straight = _side(ask(QUESTION.format(prompt=prompt, a=row["A"], b=row["B"])))
    turned = _side(ask(QUESTION.format(prompt=prompt, a=row["B"], b=row["A"])))
    grade = {("A", "B"): "good", ("B", "A"): "bad"}.get((straight, turned), "same")
    known = {name: row[name] for name in ("id", "annotator", "pair")}
    return {**known, "grade": grade, "replies": [straight, turned]}


def _side(reply: str) -> str:
    """A, B or same; a reply that says none of them is one that prefers none."""
    word = reply.strip().strip(".*\"'[]() ").upper()
    return word if word in ("A", "B") else "same"


def _rows(sheet: Path) -> list[dict[str, Any]]:
    def parse(row: dict[str, Any]) -> dict[str, Any]:
        if not {"id", "annotator", "pair", "prompt", "A", "B"} <= row.keys():
            raise BadRow("is no row of a sheet that `export` wrote")
        return row

    return [row.value for row in read_rows(sheet, option="--sheet", parse=parse)]
