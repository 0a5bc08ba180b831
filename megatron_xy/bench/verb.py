"""`megatron-xy bench cpu|gpu`: the parts one after the other, their results on the disk after each, a table at the end.

A part that fails is a result like another: its error is written down, and the next part runs.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_xy.bench.parts import has_gpu, parts_of
from megatron_xy.errors import ConfigError
from megatron_xy.packages import installed_versions
from megatron_xy.storage import write_json


def run(suite: str, *, only: Sequence[str], output: Path, tiny: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the suite, or the parts of it named by `only`; writes `output` after each part. Raises ConfigError."""
    parts = parts_of(suite, tiny=tiny)
    if unknown := [name for name in only if name not in parts]:
        raise ConfigError(f"--only {unknown[0]}: {suite} has no such part; it has {', '.join(parts)}")
    if suite == "gpu" and not tiny and not has_gpu():
        raise ConfigError("bench gpu: there is no GPU here; take `bench cpu`, or --tiny to see that its parts run")
    results: dict[str, Any] = {
        "suite": suite,
        "tiny": tiny,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "packages": installed_versions(),
        "parts": {},
    }
    for name, part in parts.items():
        if only and name not in only:
            continue
        say(f"{name} ...")
        began = time.monotonic()
        try:
            outcome: dict[str, Any] = {"ok": True, "result": part()}
        except Exception as error:  # one part's failure is its result; the others still run
            outcome = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        outcome["seconds"] = time.monotonic() - began
        results["parts"][name] = outcome
        write_json(output, results)
        say(f"{name}: {'done' if outcome['ok'] else outcome['error']} ({outcome['seconds']:.1f} s)")
    say(f"wrote {output}")
    return results


def tables(results: dict[str, Any]) -> list[Table]:
    """What people want to see of the results: one table a part."""
    found = []
    for name, outcome in results["parts"].items():
        if not outcome["ok"]:
            table = Table("error", title=name)
            table.add_row(outcome["error"])
            found.append(table)
            continue
        rows = _rows(outcome["result"])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = Table(*columns, title=name)
        for row in rows:
            table.add_row(*(_shown(row.get(column)) for column in columns))
        found.append(table)
    return found


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the part's list and, below, its single values: whatever is neither list nor object."""
    rows: list[dict[str, Any]] = []
    for key, value in result.items():
        if isinstance(value, dict):
            rows.append({"": key, **{name: item for name, item in value.items() if not isinstance(item, list | dict)}})
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for row in value:
                inner = next((item for item in row.values() if isinstance(item, list) and item), None)
                flat = {name: item for name, item in row.items() if not isinstance(item, list)}
                spread = [{**flat, **item} for item in inner] if inner and isinstance(inner[0], dict) else [flat]
                rows.extend(spread)
    single = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
    return rows or [single]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
