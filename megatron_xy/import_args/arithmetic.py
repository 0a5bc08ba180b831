"""bash's arithmetic of whole numbers: $((...)), ((...)), let."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_xy.import_args.state import NAME, NUMBER, UNKNOWN_MARK, State
from megatron_xy.import_args.syntax import Node

_NUMBERS = ((NUMBER, 10), (re.compile("-?0[0-7]{1,20}"), 8), (re.compile("-?0[xX][0-9a-fA-F]{1,15}"), 16))
_WIDTH = 64
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def _quotient(one: int, other: int) -> int:
    """Towards 0."""
    quotient = abs(one) // abs(other)
    return quotient if (one < 0) == (other < 0) else -quotient


def _power(one: int, other: int) -> int:
    if other < 0:
        raise ValueError("bash has no fractions")
    return int(one ** min(other, _WIDTH + other % 2))  # what is larger has no number here


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": _quotient,
    "%": lambda one, other: one - other * _quotient(one, other),
    "**": _power,
    **COMPARISONS,
}  # fmt: skip


@dataclass(frozen=True)
class Arithmetic:
    """What is assigned in it is set."""

    state: State
    text: Callable[[Node], str]  # of a word

    def number(self, node: Node) -> int | None:
        """An expression's; None where it is not known."""
        if node["Type"] == "Word":
            return self._value(self.text(node))
        if node["Type"] == "ParenArithm":
            return self.number(node["X"])
        sign = node["Op"]
        if node["Type"] == "UnaryArithm":
            return self._stepped(node) if sign in ("++", "--") else _signed(sign, self.number(node["X"]))
        if sign in ("?", "&&", "||"):
            return self._chosen(node)
        if sign.endswith("=") and sign not in COMPARISONS:
            number = self.number(node["Y"])
            if sign != "=":
                number = _calculated(sign[:-1], self.number(node["X"]), number)
            return self._set(node["X"], number)
        return _calculated(sign, self.number(node["X"]), self.number(node["Y"]))

    def _value(self, text: str) -> int | None:
        if NAME.fullmatch(text):
            values = self.state.get(text)
            text = UNKNOWN_MARK if values is None else "".join(values[:1])
        text = text.strip() or "0"
        return next((int(text, base) for form, base in _NUMBERS if form.fullmatch(text)), None)

    def _stepped(self, node: Node) -> int | None:
        """i++ and the like."""
        before = self.number(node["X"])
        after = _calculated(node["Op"][0], before, 1)
        self._set(node["X"], after)
        return before if node.get("Post") else after

    def _chosen(self, node: Node) -> int | None:
        """a ? b : c, a && b and a || b, of which only what counts is computed."""
        truth = self.number(node["X"])
        if node["Op"] == "?":
            return None if truth is None else self.number(node["Y"]["X" if truth else "Y"])
        if truth is None or bool(truth) == (node["Op"] == "||"):
            return None if truth is None else int(bool(truth))
        other = self.number(node["Y"])
        return other if other is None else int(bool(other))

    def _set(self, target: Node, number: int | None) -> int | None:
        part = target["Parts"][0]
        if part["Type"] == "Lit":
            self.state.assign(part["Value"], UNKNOWN_MARK if number is None else str(number))
        elif part["Type"] == "ParamExp":  # an element
            self.state.set(part["Param"]["Value"], [UNKNOWN_MARK])
        return number


def _signed(sign: str, number: int | None) -> int | None:
    """None for ~ too."""
    return None if number is None else {"-": -number, "+": number, "!": int(not number)}.get(sign)


def _calculated(sign: str, one: int | None, other: int | None) -> int | None:
    if one is None or other is None or sign not in _OPERATIONS:
        return None
    try:
        number = int(_OPERATIONS[sign](one, other))
    except (ArithmeticError, ValueError):
        return None
    return number if abs(number) < 2 ** (_WIDTH - 1) else None
