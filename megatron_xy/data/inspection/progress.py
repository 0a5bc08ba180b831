"""How the verbs of `data` look in a terminal: progress with rate and ETA, tables, what was left out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_xy.data.building.workers import Progress
from megatron_xy.data.manifest import BAD_LINES_NAME, HELD_OUT_NAME

SECONDS_BETWEEN_LINES = 2.0


@contextmanager
def showing_progress() -> Iterator[Progress]:
    """A callback (phase, done, total, unit) that says on stderr how far a phase is, at most every two seconds."""
    phases: dict[str, tuple[float, float]] = {}
    told: dict[str, int] = {}  # how far a phase was when it was last told

    def progress(phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if done < told.get(phase, 0):  # the phase of the next folder: held-out data are built before the others
            del phases[phase]
        began, last = phases.setdefault(phase, (now, -SECONDS_BETWEEN_LINES))
        finished = done >= total
        if told.get(phase) == done or (now - last < SECONDS_BETWEEN_LINES and not finished):
            return
        told[phase] = done
        phases[phase] = (began, now)
        elapsed = now - began
        rate = done / elapsed if elapsed > 0 else 0.0
        of_total = f"/{total:,} {unit} ({done / total:.0%})" if total else f" {unit}"
        left = f", ETA {(total - done) / rate:.0f} s" if total and rate and not finished else ""
        print(f"  {phase}: {done:,}{of_total}, {rate:,.0f} {unit}/s{left}", file=sys.stderr, flush=True)

    yield progress


def stats_table(stats: dict[str, Any], *, title: str) -> Table:
    """What `dataset_stats` gives: a row a source and one for each of its buckets, the sums in the caption."""
    table = Table(title=title)
    for heading in ("source", "bucket", "documents", "samples", "tokens", "share", "padding"):
        is_name = heading == "source"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for source, entry in stats["sources"].items():
        table.add_row(source, "all", f"{entry['documents']:,}", *_cells(entry))
        for bucket, part in entry["buckets"].items():
            table.add_row("", bucket, "", *_cells(part))
    table.caption = f"{stats['documents']:,} documents, {stats['tokens']:,} tokens, {stats['samples']:,} samples"
    return table


def ratios_table(stats: dict[str, Any]) -> Table:
    """The three ratios of the data set, and of samples of fixed length made of the same documents."""
    table = Table(title="beside samples of fixed length of the same documents")
    for heading in ("", "samples", "padding", "truncation", "documents a sample"):
        table.add_column(heading, justify="right" if heading else "left")
    fixed = {f"fixed length {size}": entry for size, entry in stats["fixed_length"].items()}
    for name, entry in {"this data set": stats, **fixed}.items():
        ratios = f"{entry['padding_ratio']:.3%}", f"{entry['truncation_ratio']:.3%}"
        table.add_row(name, f"{entry['samples']:,}", *ratios, f"{entry['concatenation_ratio']:.2f}")
    return table


def left_out(stats: dict[str, Any], *, directory: Path) -> list[str]:
    """What of the corpus is not in the data folder `directory`, or not in one piece: a line for each count over 0."""
    lines = {
        f"bad lines left out, of {stats['lines']:,}; listed in {directory / BAD_LINES_NAME}": stats["bad_lines"],
        "documents without text left out": stats["skipped_empty"],
        "duplicate documents left out": stats["duplicates"],
        f"documents held out, in {directory / HELD_OUT_NAME}": stats["held_out_documents"],
        "documents dropped, longer than the largest bucket": stats["dropped_documents"],
        "documents truncated: cut into pieces, or cut short": stats["truncated_documents"],
        "tokens lost, of dropped documents and of what was cut off": stats["tokens_lost"],
    }
    return [f"{count:,} {what}" for what, count in lines.items() if count]


def _cells(part: dict[str, Any]) -> tuple[str, ...]:
    return f"{part['samples']:,}", f"{part['tokens']:,}", f"{part['share']:.2%}", f"{part['padding_ratio']:.3%}"
