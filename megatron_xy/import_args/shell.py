"""What a bash script hands to its Python program: arrays, variables, continuations, quotes are read; nothing is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_xy.errors import DataError

UNKNOWN = "(not known)"  # in place of $1, $(command) and variables of the environment

_LITERAL_DOLLAR = "\x01"  # in single quotes, or behind a backslash
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_ARRAY = re.compile(r"\$\{([A-Za-z_]\w*)\[[@*]\]\}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::?[-=]([^}]*))?\}|\$([A-Za-z_]\w*)|\$\{[^}]*\}|\$[\d@*#?!]")


@dataclass(frozen=True)
class _Token:
    """A word, or with `is_mark` one of ( ) and the end of a command."""

    text: str
    is_quoted: bool = False
    is_mark: bool = False


def program_arguments(path: Path) -> list[str]:
    """What the last command with a .py file in `path` passes to it. Raises DataError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be a bash script in UTF-8: {error}") from None
    found = None
    for words in _commands(list(_tokens(text))):
        programs = [place for place, word in enumerate(words) if word.endswith(".py")]
        if programs:
            found = words[programs[0] + 1 :]
    if found is None:
        raise DataError(f"{path} must start a Python program, such as `torchrun ... pretrain_gpt.py --num-layers 80`")
    return found


def _commands(tokens: list[_Token]) -> Iterator[list[str]]:
    """The words of each command, variables put in; assignments act on those that follow."""
    variables: dict[str, list[str]] = {}
    words: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        place += 1
        if token.is_mark:
            yield words
            words = []
            continue
        match = None if words and words[0] not in ("export", "local") else _ASSIGNMENT.fullmatch(token.text)
        if match is None:
            words += _expanded(token, variables)
            continue
        name, adds, value = match.groups()
        values: list[str] = []
        if not value and place < len(tokens) and tokens[place] == _Token("(", is_mark=True):
            place += 1
            while place < len(tokens) and tokens[place] != _Token(")", is_mark=True):
                if not tokens[place].is_mark:
                    values += _expanded(tokens[place], variables)
                place += 1
            place += 1
        else:
            values = _expanded(_Token(value, is_quoted=True), variables)
        variables[name] = [*variables.get(name, []), *values] if adds else values
    yield words


def _expanded(token: _Token, variables: dict[str, list[str]]) -> list[str]:
    if match := _ARRAY.fullmatch(token.text):
        return variables.get(match[1], [UNKNOWN])

    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        known = variables.get(name or "")
        if known is not None:
            return " ".join(known)
        return default if default is not None else UNKNOWN

    text = _VARIABLE.sub(value, token.text)
    is_split = text != token.text and not token.is_quoted and UNKNOWN not in text
    return [word.replace(_LITERAL_DOLLAR, "$") for word in (text.split() if is_split else [text])]


def _tokens(text: str) -> Iterator[_Token]:
    """Words and marks. Command substitutions become UNKNOWN."""
    word: list[str] = []
    is_quoted = has_word = False
    place = 0
    text = text.replace("\\\r\n", "").replace("\\\n", "") + "\n"
    while place < len(text):
        character = text[place]
        if character in " \t\r\n;&|()<>" or (character == "#" and not has_word):
            if has_word and not (character in "<>" and "".join(word).isdigit()):  # 2> is no word
                yield _Token("".join(word), is_quoted=is_quoted)
            word, is_quoted, has_word = [], False, False
            if character == "#":
                place = text.index("\n", place) - 1
            elif character in "()":
                yield _Token(character, is_mark=True)
            elif character not in " \t\r":
                yield _Token(";", is_mark=True)
            place += 1
            continue
        has_word = True
        part, place, quotes = _part(text, place)
        word.append(part)
        is_quoted = is_quoted or quotes
    # The newline at the end has closed the last word.


def _part(text: str, place: int) -> tuple[str, int, bool]:
    """(the next part of a word, where it ends, whether it stands in quotes)."""
    character = text[place]
    if character == "'":
        end = _closing(text, place + 1, "'")
        return text[place + 1 : end].replace("$", _LITERAL_DOLLAR), end + 1, True
    if character == '"':
        parts = []
        place += 1
        while place < len(text) and text[place] != '"':
            part, place, _ = ("'", place + 1, True) if text[place] == "'" else _part(text, place)
            parts.append(part)
        return "".join(parts), place + 1, True
    if character == "\\":
        following = text[place + 1 : place + 2]
        return _LITERAL_DOLLAR if following == "$" else following, place + 2, False
    if text.startswith("$(", place):
        depth, place = 1, place + 2
        while place < len(text) and depth:
            depth += {"(": 1, ")": -1}.get(text[place], 0)
            place += 1
        return UNKNOWN, place, False
    if character == "`":
        return UNKNOWN, _closing(text, place + 1, "`") + 1, False
    if text.startswith("${", place):
        end = _closing(text, place, "}")
        return text[place : end + 1], end + 1, False
    return character, place + 1, False


def _closing(text: str, place: int, mark: str) -> int:
    end = text.find(mark, place)
    return len(text) if end < 0 else end
