"""The truth of bash's tests, as far as it is known without running anything."""

from __future__ import annotations

import re

from megatron_xy.import_args.arithmetic import COMPARISONS
from megatron_xy.import_args.expansion import Expansion
from megatron_xy.import_args.state import NUMBER, UNKNOWN_MARK, has_unknown
from megatron_xy.import_args.syntax import Node

_NUMERIC = {"-eq": "==", "-ne": "!=", "-lt": "<", "-le": "<=", "-gt": ">", "-ge": ">="}
_SORTED_ALIKE = re.compile(r"[0-9a-z]*")  # but for a few languages


def negated(truth: bool | None) -> bool | None:
    """Not `truth`."""
    return None if truth is None else not truth


def truth_of_words(words: list[str]) -> bool | None:
    """Of test's, which are those between [ and ] too."""
    for sign, joint in (("-o", "||"), ("-a", "&&")):
        if sign in words[1:-1] and len(words) > 3:
            at = words.index(sign, 1)
            return _joined(joint, truth_of_words(words[:at]), truth_of_words(words[at + 1 :]))
    if has_unknown(words):
        return None
    match words:
        case []:
            return False
        case [text]:
            return bool(text)
        case [one, ("=" | "==" | "!=") as sign, other]:
            return (one == other) == (sign != "!=")
        case [one, sign, other] if sign in _NUMERIC or sign in ("<", ">"):
            return _compared(one, sign, other)
        case ["!", *others]:
            return negated(truth_of_words(others))
        case [("-n" | "-z") as sign, text]:
            return bool(text) == (sign == "-n")
    return None


def truth_of_clause(node: Node, expansion: Expansion) -> bool | None:
    """Of what stands between [[ and ]]."""
    sign = str(node.get("Op", ""))
    match node["Type"]:
        case "ParenTest":
            return truth_of_clause(node["X"], expansion)
        case "UnaryTest" if sign == "!":
            return negated(truth_of_clause(node["X"], expansion))
        case "UnaryTest":
            return truth_of_words([sign, expansion.text(node["X"])])
        case "BinaryTest" if sign in ("&&", "||"):
            truth = truth_of_clause(node["X"], expansion)
            return truth if truth is (sign == "||") else _joined(sign, truth, truth_of_clause(node["Y"], expansion))
        case "BinaryTest" if sign in ("=", "==", "!="):
            text, pattern = expansion.text(node["X"]), expansion.pattern(node["Y"])
            if pattern is None or UNKNOWN_MARK in text:
                return None
            return (pattern.fullmatch(text) is not None) == (sign != "!=")
        case "BinaryTest":
            words = [expansion.text(node["X"]), sign, expansion.text(node["Y"])]
            return None if has_unknown(words) else _compared(*words)
    text = expansion.text(node)
    return None if UNKNOWN_MARK in text else bool(text)


def _compared(one: str, sign: str, other: str) -> bool | None:
    if sign in ("<", ">") and _SORTED_ALIKE.fullmatch(one + other):
        return one < other if sign == "<" else one > other
    if sign in _NUMERIC and NUMBER.fullmatch(one) and NUMBER.fullmatch(other):
        return COMPARISONS[_NUMERIC[sign]](int(one), int(other))
    return None


def _joined(joint: str, one: bool | None, other: bool | None) -> bool | None:
    decisive = joint == "||"
    return decisive if decisive in (one, other) else None if None in (one, other) else not decisive
