"""bash's variables in words: $name, ${name:-value}, arrays, arithmetic, and what a function is called with."""

from __future__ import annotations

import re

from megatron_xy.import_args.tokens import LITERAL_DOLLAR, UNKNOWN_MARK, Token, closing
from megatron_xy.import_args.values import computed

Variables = dict[str, list[str]]
_NAME = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?!$-]")


def expanded(token: Token, variables: Variables) -> list[str]:
    """A token's words: one where it is quoted, an array's elements, else as many as its value has."""
    if match := re.fullmatch(r"\$\{([A-Za-z_]\w*)\[([@*])\]\}|\$\{?([@*])\}?", token.text):
        values = variables.get(match[1] or match[3], [UNKNOWN_MARK])
        if token.is_quoted:
            return list(values) if (match[2] or match[3]) == "@" else [" ".join(values)]
        return [word for value in values for word in ([value] if UNKNOWN_MARK in value else value.split())]
    text = substituted(token.text, variables)
    is_split = "$" in token.text and not token.is_quoted and UNKNOWN_MARK not in text
    words = text.split() if is_split else [text]
    return [word.replace(LITERAL_DOLLAR, "$") for word in words]


def substituted(text: str, variables: Variables) -> str:
    """With the values of its variables."""
    parts: list[str] = []
    place = 0
    while (dollar := text.find("$", place)) >= 0:
        parts.append(text[place:dollar])
        if text.startswith("$((", dollar):
            place = closing(text, dollar + 1, "(", ")")
            parts.append(_computed(text[dollar + 3 : place - 2], variables))
        elif text.startswith("${", dollar):
            place = closing(text, dollar + 1, "{", "}")
            parts.append(_value(text[dollar + 2 : place - 1], variables))
        elif match := _NAME.match(text, dollar + 1):
            place = match.end()
            parts.append(_value(match[0], variables))
        else:
            place = dollar + 1
            parts.append("$")
    return "".join(parts) + text[place:]


def _value(inside: str, variables: Variables) -> str:
    """Of ${inside}."""
    match = re.fullmatch(r"([A-Za-z_]\w*|\d+|[@*#?!$-])(?:\[(\d+|[@*])\])?(?:(:?[-=+?])(.*))?", inside, re.DOTALL)
    if match is None:
        return UNKNOWN_MARK
    known = variables.get(match[1])
    if known is not None and (match[2] or "@") not in "@*":
        known = known[int(match[2]) : int(match[2]) + 1]
    way = match[3] or ""
    is_there = known is not None and (bool(" ".join(known)) or not way.startswith(":"))
    if way.endswith("+"):
        return _bare(match[4], variables) if is_there else UNKNOWN_MARK if known is None else ""
    if is_there:
        return " ".join(known or [])
    return _bare(match[4], variables) if way.endswith(("-", "=")) else UNKNOWN_MARK if known is None else ""


def _bare(text: str, variables: Variables) -> str:
    return substituted(text.replace('"', "").replace("'", ""), variables)


def _computed(text: str, variables: Variables) -> str:
    """Of $((text)), whole numbers."""
    return computed(re.sub(r"\b[A-Za-z_]\w*", lambda match: _value(match[0], variables), substituted(text, variables)))


def set_arguments(variables: Variables, values: list[str]) -> None:
    """$1, $2 and so on, $#, $@ and $*; behind one that is not known, none is."""
    forget_arguments(variables)
    variables |= {"@": values, "*": values}
    known = next((place for place, value in enumerate(values) if UNKNOWN_MARK in value), None)
    variables |= {str(place): [value] for place, value in enumerate(values[:known], 1)}
    if known is None:
        variables |= {"#": [str(len(values))]} | {str(n): [] for n in range(len(values) + 1, 10)}


def forget_arguments(variables: Variables) -> None:
    """None of them is known any more."""
    for name in [name for name in variables if is_argument(name)]:
        del variables[name]


def is_argument(name: str) -> bool:
    """Whether it is $1 and so on, $#, $@ or $*."""
    return name in ("@", "*", "#") or name.isdigit()
