"""A sheet filled in by machine: by a reward model's scores, or by a language model behind an OpenAI-like endpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from annotation import asked_in, lines_of, shown_prompt
from chat_endpoint import endpoint_of, keep_results
from side_by_side_verdict import verdict_of

from megatron_xy.data.corpus.rows import SHOWN_PROBLEMS, BadRow, read_rows
from megatron_xy.errors import ConfigError, DataError, UsageError
from megatron_xy.storage import file_sha256, write_text

UNREADABLE_SHARE = 0.05  # of the questions may be counted as ties because a reply is unreadable
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
    Raises UsageError, ConfigError, DataError or StorageError; where `score` ends badly, ends with its exit code.
    """
    if not tie_band >= 0:
        raise UsageError(f"--tie-band ({tie_band}): must not be below 0")
    if output.is_dir():
        raise ConfigError(f"--output ({output}) is a folder; name a file")
    rows = _rows(sheet)
    answers, scores = (output.with_name(f"{output.name}.{what}.jsonl") for what in ("answers", "scores"))
    said = [(asked_in(row), row[side]) for row in rows for side in "AB"]
    write_text(answers, lines_of({**asked, "response": text} for asked, text in said if text.strip()))
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


def grade_by_endpoint(
    sheet: Path, output: Path, *, url: str, model: str | None, key_variable: str, most_tokens: int
) -> list[str]:
    """Grades a sheet by a language model that sees each pair in both orders; returns what is to be said of it.

    A question of which a reply is unreadable is a tie, told; where they are more than UNREADABLE_SHARE, they stay
    without a grade and DataError is raised. Raises UsageError, ConfigError or StorageError too; what was graded until
    then is kept.
    """
    if most_tokens < 1:
        raise UsageError(f"--most-tokens ({most_tokens}) must be 1 or more")
    if output.exists():
        raise ConfigError(
            f"--output ({output}) is there already, and nothing is overwritten, which may be graded by hand; "
            "name another file, or remove this one"
        )
    endpoint = endpoint_of(url, model, key_variable=key_variable)
    rows = _rows(sheet)

    def graded(row: dict[str, Any]) -> dict[str, Any]:
        return _graded(row, ask=lambda text: endpoint.ask(text, max_tokens=most_tokens).text)

    facts = {"sheet": file_sha256(sheet), "url": url, "model": model, "most_tokens": most_tokens}
    keep_results(output, rows, graded, facts=facts, what="grades")
    return [f"wrote {output}: {len(rows):,} grades", *_unreadable_settled(output)]


def _unreadable_settled(output: Path) -> list[str]:
    """Makes ties of the few questions without a grade and says so. Raises DataError where they are not few."""
    rows = [row.value for row in read_rows(output, option="grades", parse=dict)]
    unreadable = [row for row in rows if row["grade"] is None]
    if not unreadable:
        return []
    shown = ", ".join(row["id"] for row in unreadable[:SHOWN_PROBLEMS])
    counted = f"of {len(rows):,} questions {len(unreadable):,} have a reply that says neither A, B nor same: {shown}"
    if len(unreadable) > UNREADABLE_SHARE * len(rows):
        raise DataError(
            f"{counted}; more than {UNREADABLE_SHARE:.0%}, so they have no grade in {output}, which holds the replies; "
            "ask with more --most-tokens or another --model, or fill the grades in"
        )
    write_text(output, lines_of({**row, "grade": row["grade"] or "same"} for row in rows))
    return [f"{counted}; counted as same"]


def _graded(row: dict[str, Any], *, ask: Callable[[str], str]) -> dict[str, Any]:
    """The row's grade: what is said in both orders, or a tie; none where a reply is unreadable."""
    prompt = shown_prompt(row)
    orders = ((row["A"], row["B"]), (row["B"], row["A"]))
    replies = [ask(QUESTION.format(prompt=prompt, a=first, b=second)) for first, second in orders]
    verdicts = [verdict_of(reply) for reply in replies]
    grade = {"AB": "good", "BA": "bad"}.get("".join(map(str, verdicts)), "same")
    known = {name: row[name] for name in ("id", "annotator", "pair")}
    return {**known, "grade": None if None in verdicts else grade, "verdicts": verdicts, "replies": replies}


def _rows(sheet: Path) -> list[dict[str, Any]]:
    def parse(row: dict[str, Any]) -> dict[str, Any]:
        if not {"id", "annotator", "pair", "prompt", "A", "B"} <= row.keys():
            raise BadRow("is no row of a sheet that `export` wrote")
        return row

    return [row.value for row in read_rows(sheet, option="--sheet", parse=parse)]
