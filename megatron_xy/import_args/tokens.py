"""A bash script's text -> words and marks; quotes, comments, continuations, redirections and here-documents are read.

Variables are put in later: of what stands in ${...} and $((...)) the text is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

UNKNOWN_MARK = "\x02"  # in place of $(command), while a script is read
LITERAL_DOLLAR = "\x01"  # in single quotes, or behind a backslash
_HERE_DOCUMENT = re.compile(r"<<-?[ \t]*(['\"]?)(\w+)\1")


@dataclass(frozen=True)
class Token:
    """A word, or with `is_mark` one of ( ) and what ends a command: ; ;; & && | ||"""

    text: str
    is_quoted: bool = False
    is_mark: bool = False


def _without_here_documents(text: str) -> str:
    kept: list[str] = []
    end = None
    for line in text.split("\n"):
        if end is not None:
            end = None if line.strip() == end else end
            continue
        kept.append(line)
        if "<<<" not in line and (match := _HERE_DOCUMENT.search(line)):
            end = match[2]
    return "\n".join(kept)


def tokens_of(text: str) -> Iterator[Token]:
    """Words and marks, with a mark at the end. Command substitutions become UNKNOWN_MARK."""
    word: list[str] = []
    is_quoted = has_word = False
    place = 0
    text = _without_here_documents(text.replace("\r\n", "\n")) + "\n"
    while place < len(text):
        character = text[place]
        if text.startswith("\\\n", place):
            place += 2
        elif character in " \t\n;&|()<>" or (character == "#" and not has_word):
            if has_word and not (character in "<>" and "".join(word).isdigit()):  # 2> is no word
                yield Token("".join(word), is_quoted=is_quoted)
            word, is_quoted, has_word = [], False, False
            if character == "#":
                place = text.index("\n", place)
            elif match := re.compile(r"&>>?|\d?>&\d?|<<<|[<>]+").match(text, place):
                place = match.end()
                place = _end_of_word(text, place) if text[place - 1] in "<>" else place
            elif match := re.compile(r";;|&&|\|\||[;&|()]").match(text, place):
                yield Token(match[0], is_mark=True)
                place = match.end()
            else:
                if character == "\n":
                    yield Token(";", is_mark=True)
                place += 1
        else:
            has_word = True
            part, place, quotes = _part(text, place)
            word.append(part)
            is_quoted = is_quoted or quotes


def _end_of_word(text: str, place: int) -> int:
    """Behind a redirection's file."""
    while place < len(text) and text[place] in " \t":
        place += 1
    while place < len(text) and text[place] not in " \t\n;&|()<>":
        _, place, _ = _part(text, place)
    return place


def _part(text: str, place: int) -> tuple[str, int, bool]:
    """(the next part of a word, where it ends, whether it stands in quotes)."""
    character = text[place]
    if character == "'":
        end = text.find("'", place + 1)
        end = len(text) if end < 0 else end
        return text[place + 1 : end].replace("$", LITERAL_DOLLAR), end + 1, True
    if character == '"':
        parts = []
        place += 1
        while place < len(text) and text[place] != '"':
            if text.startswith("\\\n", place):
                place += 2
                continue
            part, place, _ = ("'", place + 1, True) if text[place] == "'" else _part(text, place)
            parts.append(part)
        return "".join(parts), place + 1, True
    if character == "\\":
        following = text[place + 1 : place + 2]
        return LITERAL_DOLLAR if following == "$" else following, place + 2, False
    if text.startswith("$((", place):
        end = closing(text, place + 1, "(", ")")
        return text[place:end], end, False
    if text.startswith("$(", place):
        return UNKNOWN_MARK, closing(text, place + 1, "(", ")"), False
    if character == "`":
        end = text.find("`", place + 1)
        return UNKNOWN_MARK, len(text) if end < 0 else end + 1, False
    if text.startswith("${", place):
        end = closing(text, place + 1, "{", "}")
        return text[place:end], end, False
    return character, place + 1, False


def closing(text: str, place: int, opening: str, closing: str) -> int:
    """Behind the mark that closes the one at `place`."""
    depth = 0
    for at in range(place, len(text)):
        depth += (text[at] == opening) - (text[at] == closing)
        if not depth:
            return at + 1
    return len(text)


def closing_mark(found: list[Token], place: int) -> int:
    """Behind the mark that closes the ( at `place`."""
    depth = 0
    for at in range(place, len(found)):
        depth += (found[at] == Token("(", is_mark=True)) - (found[at] == Token(")", is_mark=True))
        if not depth:
            return at + 1
    return len(found)
