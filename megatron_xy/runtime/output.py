"""stdout takes any text: a source's name or a sampled answer that its encoding lacks must not end a run."""

from __future__ import annotations

import io
import sys


def escape_what_stdout_lacks() -> None:
    """From now on characters that stdout cannot encode are written as backslash escapes, as stderr does by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
