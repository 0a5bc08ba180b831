"""stdout takes any text: a source's name or a sampled answer that its encoding lacks must not end a run, nor may a
terminal that is closed."""

from __future__ import annotations

import errno
import io
import sys
from typing import Any


def escape_what_stdout_lacks() -> None:
    """From now on characters that stdout cannot encode are written as backslash escapes, as stderr does by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def outlive_the_terminal() -> None:
    """From now on what is said to a terminal that is closed is dropped: a run that is stopped by that still saves."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.isatty():
            stream.flush()
            raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


class _Terminal(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes
