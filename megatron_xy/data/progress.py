"""How `data build` and `data stats` look in a terminal: progress with rate and time to go, and the final table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.table import Table

SECONDS_BETWEEN_LINES = 2.0
Progress = Callable[[str, int, int, str], None]


@contextmanager
def showing_progress() -> Iterator[Progress]:
    """A callback (phase, done, total, unit) that says on stderr how far a phase is, at most every two seconds."""
    phases: dict[str, tuple[float, float]] = {}
    told: dict[str, int] = {}  # how far a phase was when it was last told

    def progress(phase: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
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
    """What `dataset_stats` gives, one row a (source, bucket), the ratios in the caption."""
    table = Table(title=title)
    for heading in ("source", "bucket", "samples", "tokens", "padding"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for source, entry in stats["sources"].items():
        for bucket, part in entry["buckets"].items():
            cells = (source, bucket, f"{part['samples']:,}", f"{part['tokens']:,}", f"{part['padding_ratio']:.3%}")
            table.add_row(*cells)
    table.caption = (
        f"{stats['documents']:,} documents, {stats['tokens']:,} tokens, {stats['samples']:,} samples; "
        f"padding {stats['padding_ratio']:.3%}, truncation {stats['truncation_ratio']:.3%}, "
        f"concatenation {stats['concatenation_ratio']:.2f} documents a sample"
    )
    return table
