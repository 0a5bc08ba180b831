"""One file of prompts for PPO: those of the preference pairs and new ones, de-duplicated as a whole.

    python tools/build_prompts.py --preferences PAIRS.jsonl... [--new PROMPTS.jsonl...] --output prompts.jsonl
                                  [--ratio 1.0] [--most N] [--seed 0]

Rows of all files hold a `prompt`, a text or messages, and `system` and `tools` beside these, if any; what the system
says is not compared. Of prompts that are the same, or nearly (as the split of a reward model's pairs has it), the first
stays, those of the preferences before new ones. Then as many are kept as the ratio of new to preference prompts lets
stand, at most N in all, chosen by the seed; they are written in the order of the files, each with its `source` and its
`kind`, preference or new. The report is printed, and written as prompts.report.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_xy.data.chat.conversations import BadConversation, parse_prompt
from megatron_xy.data.chat.renderer import PROMPT_FIELDS
from megatron_xy.data.corpus.rows import BadRow, read_rows
from megatron_xy.errors import UsageError, with_exit_code
from megatron_xy.reward.split import clusters_of
from megatron_xy.storage import write_json, write_text

KINDS = ("preference", "new")
OUTCOMES = ("read", "same", "alike", "left", "written")


@dataclass(frozen=True)
class Candidate:
    """PROMPT_FIELDS of a row that was read, and the text by which it is compared."""

    asked: dict[str, Any]
    text: str
    source: str
    kind: str


@with_exit_code
def main() -> None:
    """The exit code: 0, 2 (wrong option), 65 (bad rows), 74 (a file cannot be written) or 78 (no such file)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preferences", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--new", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--ratio", type=float, default=1.0, help="new prompts for each of the preferences'")
    parser.add_argument("--most", type=int, help="prompts in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = build(
        options.preferences,
        options.new,
        options.output,
        ratio=options.ratio,
        most=options.most,
        seed=options.seed,
    )
    Console().print(table_of(report))


def build(
    preferences: Sequence[Path], new: Sequence[Path], output: Path, *, ratio: float, most: int | None, seed: int
) -> dict[str, dict[str, dict[str, int]]]:
    """Writes the file and its report, {kind: {source: {outcome: number}}}; read = same + alike + left + written.

    Raises UsageError, ConfigError, DataError or StorageError.
    """
    if not 0 <= ratio < float("inf"):
        raise UsageError(f"--ratio ({ratio}) must be 0 or more: new prompts for each of the preferences'")
    if most is not None and most < 1:
        raise UsageError(f"--most ({most}) must be 1 or more")
    if not preferences and not new:
        raise UsageError("no files of prompts are named; give --preferences, --new or both")
    read = [row for path in preferences for row in _read(path, option="--preferences", kind="preference")]
    read += [row for path in new for row in _read(path, option="--new", kind="new")]
    outcomes = _outcomes(read)
    _leave_out(read, outcomes, ratio=ratio if preferences and new else None, most=most, seed=seed)
    counts: dict[str, dict[str, Counter[str]]] = {kind: {} for kind in KINDS}
    for row, outcome in zip(read, outcomes, strict=True):
        counts[row.kind].setdefault(row.source, Counter(dict.fromkeys(OUTCOMES, 0))).update(["read", outcome])
    lines = [
        json.dumps({**row.asked, "source": row.source, "kind": row.kind}, ensure_ascii=False) + "\n"
        for row, outcome in zip(read, outcomes, strict=True)
        if outcome == "written"
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(lines))
    report = {kind: {source: dict(number) for source, number in sources.items()} for kind, sources in counts.items()}
    write_json(output.with_suffix(".report.json"), report)
    return report


def table_of(report: dict[str, dict[str, dict[str, int]]]) -> Table:
    """The report as a table, a line a kind and source, and their sum."""
    table = Table(title="prompts", title_justify="left")
    for name in ("kind", "source"):
        table.add_column(name)
    for name in ("read", "same", "alike", "left out", "written"):
        table.add_column(name, justify="right")
    lines = [(kind, source, number) for kind, sources in report.items() for source, number in sources.items()]
    for kind, source, number in lines:
        table.add_row(kind, source, *(f"{number[outcome]:,}" for outcome in OUTCOMES))
    table.add_section()
    table.add_row("in all", "", *(f"{sum(line[2][outcome] for line in lines):,}" for outcome in OUTCOMES))
    return table


def _read(path: Path, *, option: str, kind: str) -> list[Candidate]:
    def parse(row: dict[str, Any]) -> Candidate:
        prompt = row.get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            text = prompt
        else:
            try:
                messages = [message for message in parse_prompt(row).messages if message["role"] != "system"]
            except BadConversation as error:
                raise BadRow(f"prompt is no text and no messages: {error}") from None
            text = "\n".join(message["content"] or "" for message in messages)
        source = row.get("source", path.name.partition(".")[0])
        if not isinstance(source, str):
            raise BadRow(f"source ({source!r}) must be a name")
        asked = {name: row[name] for name in PROMPT_FIELDS if name in row}
        return Candidate(asked, text, source, kind)

    return [row.value for row in read_rows(path, option=option, parse=parse)]


def _outcomes(read: Sequence[Candidate]) -> list[str]:
    """For each prompt `written`, or what keeps it out: it is the `same` as an earlier one, or `alike`."""
    clusters, seen = clusters_of([row.text for row in read]), set[str]()
    outcomes = []
    for number, (row, cluster) in enumerate(zip(read, clusters, strict=True)):
        outcomes.append("written" if cluster == number else "same" if row.text in seen else "alike")
        seen.add(row.text)
    return outcomes


def _leave_out(
    read: Sequence[Candidate], outcomes: list[str], *, ratio: float | None, most: int | None, seed: int
) -> None:
    """Marks as `left` what the ratio (None: any) and the number in all let not stand."""
    chance = random.Random(seed)
    places = {
        kind: [n for n, row in enumerate(read) if row.kind == kind and outcomes[n] == "written"] for kind in KINDS
    }
    have = {kind: len(numbers) for kind, numbers in places.items()}
    if ratio is None:
        kept = {kind: min(have[kind], most or have[kind]) for kind in KINDS}
    else:
        preference = have["preference"] if ratio == 0 else min(have["preference"], int(have["new"] / ratio))
        preference = preference if most is None else min(preference, int(most / (1 + ratio)))
        kept = {"preference": preference, "new": min(have["new"], int(preference * ratio))}
    for kind, numbers in places.items():
        chosen = set(chance.sample(numbers, kept[kind]))
        for number in numbers:
            if number not in chosen:
                outcomes[number] = "left"


if __name__ == "__main__":
    sys.exit(main())
