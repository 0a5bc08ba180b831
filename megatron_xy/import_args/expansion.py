"""A word of a script as the words, the text or the pattern that bash makes of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_xy.import_args.arithmetic import Arithmetic
from megatron_xy.import_args.patterns import compiled, trimmed
from megatron_xy.import_args.state import MOST_TEXT, NAME, UNKNOWN_MARK, State, count, element, has_unknown
from megatron_xy.import_args.syntax import Node

_ANSI = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
_HOME = re.compile(r"(?<![^:])~[^/:]*")
_FILES = re.compile(r"[*?]|\[.*\]", re.DOTALL)
_LIST = re.compile(r"\{.*(,|\.\.).*\}", re.DOTALL)


class _Piece(NamedTuple):
    """Of a word. A value is split at its blanks, a break ends a word, what is quoted is one even if it is empty."""

    text: str
    kind: Literal["written", "quoted", "value", "break"]


_BREAK = _Piece(" ", "break")


@dataclass(frozen=True)
class Expansion:
    """With a shell's variables, some of which it sets: ${A:=1}, $((A++))."""

    state: State

    def words(self, word: Node) -> list[str]:
        """As many as it is split into."""
        fields: list[list[_Piece]] = [[]]
        for piece in self._pieces(word):
            if piece.kind == "value":
                first, *others = re.split(r"[ \t\n]+", piece.text)
                fields[-1].append(_Piece(first, "value"))
                fields += [[_Piece(other, "value")] for other in others]
            elif piece is _BREAK:
                fields.append([])
            else:
                fields[-1].append(piece)
        return [_filled_in(field) for field in fields if any(piece.text or piece.kind == "quoted" for piece in field)]

    def text(self, word: Node) -> str:
        """Not split: what is assigned, say."""
        return _joined(self._pieces(word))

    def pattern(self, word: Node) -> re.Pattern[str] | None:
        """What is quoted in it stands for itself; None where it is not known."""
        return compiled((piece.text, piece.kind == "quoted") for piece in self._pieces(word))

    def number(self, node: Node) -> int | None:
        """Of an arithmetic expression; None where it is not known."""
        return Arithmetic(self.state, self.text).number(node)

    def _pieces(self, word: Node, *, is_quoted: bool = False) -> Iterator[_Piece]:
        for part in word.get("Parts", []):
            match part["Type"]:
                case "Lit":
                    yield from _written(part["Value"], is_quoted=is_quoted)
                case "SglQuoted":
                    yield _Piece(_single_quoted(part, is_quoted=is_quoted), "quoted")
                case "DblQuoted" if "Parts" in part:
                    yield from self._pieces(part, is_quoted=True)
                case "DblQuoted":
                    yield _Piece("", "quoted")
                case "ParamExp":
                    yield from self._parameter(part, is_quoted=is_quoted)
                case "ArithmExp":
                    number = self.number(part["X"])
                    yield _Piece(UNKNOWN_MARK if number is None else str(number), "quoted" if is_quoted else "value")
                case _:  # $(command) and the like
                    yield _Piece(UNKNOWN_MARK, "quoted")

    def _parameter(self, node: Node, *, is_quoted: bool) -> Iterator[_Piece]:
        """$A, ${A:-word} and the like."""
        if is_quoted and _list_sign(node) != "@":
            yield _Piece("", "quoted")
        values, expansion = self._variable(node), node.get("Exp", {})
        word, way = expansion.get("Word", {}), expansion.get("Op", "")
        match way[-1:], _is_set(values, way):
            case ("+", True) | ("-", False):
                yield from self._pieces(word, is_quoted=is_quoted)
                return
            case ("+", False):
                return
            case ("=", False):
                values = [self.text(word)]
                is_plain = "Index" not in node and "Excl" not in node
                self.state.assign(node["Param"]["Value"], values[0] if is_plain else UNKNOWN_MARK)
            case ("+" | "?", None | False):
                values = None
        values = [UNKNOWN_MARK] if values is None else self._changed(node, values)
        for number, value in enumerate([" ".join(values)] if is_quoted and _list_sign(node) != "@" else values):
            if number:
                yield _BREAK
            yield _Piece(value, "quoted" if is_quoted else "value")

    def _variable(self, node: Node) -> list[str] | None:
        """What is in braces first: a name, an element, with ! the name of a name; None where it may be unset."""
        name = node["Param"]["Value"]
        if "Excl" in node:
            name = "".join((self.state.get(name) or [UNKNOWN_MARK])[:1])
            if "Index" in node or "Names" in node or not NAME.fullmatch(name):
                return [UNKNOWN_MARK]
        known = self.state.get(name)
        if known is None or _list_sign(node):
            return known
        place = self.number(node["Index"]) if "Index" in node else 0
        return [UNKNOWN_MARK] if place is None else element(known, place)

    def _changed(self, node: Node, values: list[str]) -> list[str]:
        """${#A}, ${A:1:2}, ${A%.*}, ${A,,}; [UNKNOWN_MARK] for ways that are not read."""
        expansion = node.get("Exp", {})
        way = expansion.get("Op", "")
        if "Length" in node and _list_sign(node):
            return count(values)
        if way.lstrip(":") in ("", "-", "+", "=", "?") and not node.keys() & {"Length", "Slice", "Repl"}:
            return values
        if has_unknown(values):
            return [UNKNOWN_MARK]
        if "Length" in node:
            return [str(len("".join(values)))]
        if "Slice" in node:
            return self._sliced(node, values)
        if way in ("#", "##", "%", "%%"):
            pattern = self.pattern(expansion.get("Word", {}))
            return [UNKNOWN_MARK] if pattern is None else [trimmed(value, way, pattern) for value in values]
        if way in ("^^", ",,") and "Word" not in expansion:
            return [value.upper() if way == "^^" else value.lower() for value in values]
        return [UNKNOWN_MARK]

    def _sliced(self, node: Node, values: list[str]) -> list[str]:
        first = self.number(node["Slice"]["Offset"])
        length = self.number(node["Slice"]["Length"]) if "Length" in node["Slice"] else MOST_TEXT
        is_scalar = "Index" in node and len(values) == 1  # or may be one, which bash slices as a text
        if node["Param"]["Value"] in ("@", "*") and first is not None:  # $1 is the first
            first = first - 1 if first > 0 else None
        if first is None or length is None or length < 0 or (is_scalar and first != 0):
            return [UNKNOWN_MARK]
        whole = values if _list_sign(node) else "".join(values)
        place = first if first >= 0 else len(whole) + first
        part = whole[place : place + length] if place >= 0 else whole[:0]
        return [part] if isinstance(part, str) else part


def _list_sign(node: Node) -> str:
    """@ or * of $@, ${A[*]} and the like."""
    if node["Param"]["Value"] in ("@", "*"):
        return str(node["Param"]["Value"])
    index = node["Index"].told if "Index" in node else ""
    return index if index in ("@", "*") else ""


def _is_set(values: list[str] | None, way: str) -> bool | None:
    """None where it is not known; where there is a word instead, what the script does not set is taken to be unset."""
    if values is None:
        return False if way[-1:] in ("-", "=") else None
    text = "".join(values)
    if ":" in way and text and not text.strip(UNKNOWN_MARK):
        return None
    return bool(text) if ":" in way else bool(values)


def _written(text: str, *, is_quoted: bool) -> Iterator[_Piece]:
    """Without backslashes, and what they quote."""
    for number, piece in enumerate(re.split(r'\\([$`"\\\n])' if is_quoted else r"\\(.|\n)", text)):
        if piece and not (number % 2 and piece == "\n"):
            yield _Piece(piece, "quoted" if is_quoted or number % 2 else "written")


def _single_quoted(part: Node, *, is_quoted: bool) -> str:
    text = str(part.get("Value", ""))
    if is_quoted:  # in "${A:-'b'}", where they are text
        return f"'{text}'" if not re.search(r"[$`\\]", text) and "Dollar" not in part else UNKNOWN_MARK
    if "Dollar" not in part:
        return text
    return "".join(
        _ANSI.get(piece, UNKNOWN_MARK) if number % 2 else piece for number, piece in enumerate(re.split(r"\\(.)", text))
    )


def _filled_in(field: list[_Piece]) -> str:
    """A word; not known where bash puts others in its place, of {1..3}, or the files that there are of *."""
    files = "".join("_" if piece.kind == "quoted" else piece.text for piece in field)
    lists = "".join(piece.text if piece.kind == "written" else "_" for piece in field)
    return UNKNOWN_MARK if _FILES.search(files) or _LIST.search(lists) else _joined(field)


def _joined(pieces: Iterable[_Piece]) -> str:
    return "".join(_HOME.sub(UNKNOWN_MARK, piece.text) if piece.kind == "written" else piece.text for piece in pieces)
