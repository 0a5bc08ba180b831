"""bash's patterns: * and ? and simple [...]; of others it is not known what they match."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_xy.import_args.state import UNKNOWN_MARK

_SPECIAL = re.compile(r"(\*|\?|\[[!^]?(?:[A-Za-z0-9_](?:-[A-Za-z0-9_])?)+\])")
_NOT_READ = re.compile(r"[\[\\()|~" + UNKNOWN_MARK + "]")


def compiled(parts: Iterable[tuple[str, bool]]) -> re.Pattern[str] | None:
    """Of (text, whether it is quoted); None where it is not known."""
    expression = ""
    for text, is_quoted in parts:
        if UNKNOWN_MARK in text:
            return None
        if is_quoted:
            expression += re.escape(text)
            continue
        for number, piece in enumerate(_SPECIAL.split(text)):
            if number % 2:
                expression += {"*": ".*", "?": "."}.get(piece) or piece.replace("[!", "[^")
            elif _NOT_READ.search(piece):
                return None
            else:
                expression += re.escape(piece)
    try:
        return re.compile(expression, re.DOTALL)
    except re.error:  # [z-a]
        return None


def trimmed(value: str, way: str, pattern: re.Pattern[str]) -> str:
    """${value#pattern}, ##, % and %%."""
    shortest_first = range(len(value) + 1)
    for length in shortest_first if len(way) == 1 else reversed(shortest_first):
        place = length if "#" in way else len(value) - length
        before, behind = value[:place], value[place:]
        cut, rest = (before, behind) if "#" in way else (behind, before)
        if pattern.fullmatch(cut):
            return rest
    return value
