"""bash's syntax tree of a script, which shfmt reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_xy.errors import ConfigError, DataError

_REMEDY = "pip install 'megatron-xy[import-args]'"


class NotBash(DataError):
    """A text that is no bash script."""


class Node(dict[str, Any]):
    """A part of a script, in the words of mvdan.cc/sh/v3/syntax; what is empty or false is left out."""

    def __init__(self, fields: dict[str, Any], source: bytes) -> None:
        super().__init__(fields)
        self.source = source

    @property
    def told(self) -> str:
        """As it is written, on one line."""
        return " ".join(self.source[self["Pos"]["Offset"] : self["End"]["Offset"]].decode().split()).rstrip("; &")


def statements(text: str, name: str) -> list[Node]:
    """A script's. Raises NotBash with shfmt's line and column, ConfigError where there is no shfmt that can do this."""
    beside = Path(sys.executable).parent
    shfmt = shutil.which("shfmt", path=beside) or shutil.which("shfmt")
    if shfmt is None:
        raise ConfigError(f"import-args needs shfmt, which comes with the extra: {_REMEDY}")
    source = bytearray(text.encode())
    while True:
        found, backslashes = _parsed(shfmt, bytes(source), name)
        if not backslashes:
            return found
        for place in backslashes:
            source[place] = ord(" ")


def _parsed(shfmt: str, source: bytes, name: str) -> tuple[list[Node], list[int]]:
    """(statements, the backslashes that end comments, behind which shfmt, unlike bash, goes on with the command)."""
    answer = subprocess.run([shfmt, "-ln=bash", "--to-json"], input=source, capture_output=True, check=False)
    if answer.returncode:
        said = answer.stderr.decode(errors="replace").strip() or f"shfmt ended with {answer.returncode}"
        raise NotBash(f"{name} must be a bash script: {said}")
    backslashes: list[int] = []

    def node(fields: dict[str, Any]) -> Node:
        if isinstance(fields.get("Op"), int):  # until 3.13 a number that changed from one version to the next
            raise ConfigError(f"{shfmt} is too old, import-args needs shfmt 3.14 or later: {_REMEDY}")
        if "Hash" in fields and fields.get("Text", "").endswith("\\\n"):
            backslashes.append(fields["End"]["Offset"] - 2)
        return Node(fields, source)

    return json.loads(answer.stdout, object_hook=node).get("Stmts", []), backslashes
