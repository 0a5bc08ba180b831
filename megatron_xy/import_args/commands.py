"""What commands are made of, as lists of tokens: tests, assignments in front, functions, where a part of one ends."""

from __future__ import annotations

import re

from megatron_xy.import_args.tokens import LITERAL_DOLLAR, Token, closing_mark

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
END, PIPE, BEHIND = (Token(mark, is_mark=True) for mark in (";", "|", "&"))
_BEFORE_A_COMMAND = {"then", "do", "else", "{", "}", "!", "time", "fi", "done", "esac"}


def spelt(word: str, command: list[Token]) -> str:
    """A command as text, to be told."""
    return " ".join([word, *(token.text.replace(LITERAL_DOLLAR, "$") for token in command)]).rstrip(" ;")


def is_test(command: list[Token]) -> bool:
    """Whether it is [, [[ or test."""
    return bool(command) and command[0].text in ("[", "[[", "test")


def passed(command: list[Token]) -> list[str]:
    """Variables that are set for a command only, in front of it."""
    names: list[str] = []
    for token in command:
        match = ASSIGNMENT.fullmatch(token.text)
        if match is None:
            return [] if any(token.is_mark for token in command) else names
        names.append(match[1])
    return []


def definition(tokens: list[Token], place: int) -> tuple[str, list[Token], int] | None:
    """(a function's name, its commands, where it ends), where one is defined at `place`."""
    has_word = tokens[place] == Token("function")
    at = place + has_word
    name = tokens[at] if at < len(tokens) else END
    at += 1
    has_brackets = tokens[at : at + 2] == [Token("(", is_mark=True), Token(")", is_mark=True)]
    if name.is_mark or not (has_word or has_brackets):
        return None
    at += 2 * has_brackets
    while tokens[at : at + 1] == [END]:
        at += 1
    if tokens[at : at + 1] == [Token("{")]:
        end = _group_end(tokens, at)
        return name.text, [*tokens[at + 1 : end - 1], END], end
    if tokens[at : at + 1] == [Token("(", is_mark=True)]:
        end = closing_mark(tokens, at)
        return name.text, [*tokens[at:end], END], end
    return None


def arithmetic_end(tokens: list[Token], place: int) -> int | None:
    """Behind the )) of a (( at `place`, or behind the word there."""
    at = place if tokens[place].is_mark else place + 1
    if tokens[at : at + 2] != [Token("(", is_mark=True)] * 2:
        return None
    end = closing_mark(tokens, at)
    return end if closing_mark(tokens, at + 1) == end - 1 else None


def _group_end(tokens: list[Token], place: int) -> int:
    """Behind the } of the { at `place`."""
    depth = 0
    for at in range(place, len(tokens)):
        before = tokens[at - 1]
        if before.is_mark or at == place or before.text in _BEFORE_A_COMMAND:
            depth += (tokens[at] == Token("{")) - (tokens[at] == Token("}"))
        if not depth:
            return at + 1
    return len(tokens)


def then_of(tokens: list[Token], place: int) -> int | None:
    """Where the `then` of an `if` at `place` stands."""
    ends = (at for at in range(place + 1, len(tokens)) if tokens[at] == Token("then") and tokens[at - 1].is_mark)
    return next(ends, None)
