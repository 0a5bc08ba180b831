"""What a command starts, by its words: a Python program, or a script in a string."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_NO_LAUNCHERS = ("echo", "printf", "cat", "chmod", "cp", "grep", "ls", "mv", "rm", "sed", "touch", "wc")


class Script(NamedTuple):
    """bash -c TEXT NAME ARGUMENTS"""

    text: str
    arguments: list[str]


def program_of(words: list[str]) -> list[str] | None:
    """From the .py file on."""
    if Path(words[0]).name in _NO_LAUNCHERS:
        return None
    return next((words[place:] for place, word in enumerate(words) if re.fullmatch(r"\S+\.py", word)), None)


def script_of(words: list[str]) -> Script | None:
    """What bash or sh gets with -c, whoever starts it."""
    shell = next((place for place, word in enumerate(words) if Path(word).name in ("bash", "sh")), len(words))
    for place in range(shell + 1, len(words) - 1):
        if re.fullmatch(r"-[a-z]*c", words[place]):
            return Script(words[place + 1], words[place + 3 :])
        if not words[place].startswith(("-", "+")):
            break
    return None
