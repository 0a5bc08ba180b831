"""The truth of bash's tests and the value of its arithmetic, as far as they are known without running anything."""

from __future__ import annotations

import ast
import fnmatch
import operator
from collections.abc import Callable

from megatron_xy.import_args.tokens import UNKNOWN_MARK

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.Div: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le, "-gt": operator.gt,
    "-ge": operator.ge,
}  # fmt: skip


def truth_of(words: list[str]) -> bool | None:
    """Of a test; None where a run would tell."""
    if not words or words[0] not in ("[", "[[", "test") or any(UNKNOWN_MARK in word for word in words):
        return None
    words = [word for word in words[1:] if word not in ("]", "]]")]
    is_negated = bool(words) and words[0] == "!"
    value: bool | None = None
    match words[1:] if is_negated else words:
        case ["-z", text]:
            value = not text
        case ["-n", text] | [text]:
            value = bool(text)
        case [one, "=" | "==", other]:
            value = fnmatch.fnmatchcase(one, other)
        case [one, "!=", other]:
            value = not fnmatch.fnmatchcase(one, other)
        case [one, comparison, other] if comparison in _COMPARISONS and (one + other).isdigit():
            value = _COMPARISONS[comparison](int(one), int(other))
    return value if value is None or not is_negated else not value


def both(one: bool | None, other: bool | None) -> bool | None:
    """one && other, either of which may not be known."""
    return False if one is False or other is False else None if one is None or other is None else True


def either(one: bool | None, other: bool | None) -> bool | None:
    """one || other, either of which may not be known."""
    return True if one or other else None if one is None or other is None else False


def computed(text: str) -> str:
    """Of whole numbers; UNKNOWN_MARK of anything else."""
    try:
        return str(_number(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return UNKNOWN_MARK


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _ARITHMETIC:
            one, other = _number(left), _number(right)
            if isinstance(sign, ast.Pow) and other > 64:
                raise ValueError("too large to be meant")
            return _ARITHMETIC[type(sign)](one, other)
    raise ValueError("no arithmetic of whole numbers")
