"""What sets variables: assignments, declarations and some of bash's own commands."""

from __future__ import annotations

import re

from megatron_xy.import_args.expansion import Expansion
from megatron_xy.import_args.state import NAME, NUMBER, SEVERAL_UNKNOWN, UNKNOWN_MARK, State, has_unknown
from megatron_xy.import_args.syntax import Node

_ASSIGNMENT = re.compile(rf"({NAME.pattern})=(.*)", re.DOTALL)
READERS = ("read", "mapfile", "readarray", "getopts")
SETTING = ("shift", "set", "unset", "printf", *READERS)


def assign(node: Node, expansion: Expansion) -> None:
    """A=1, A+=1, A=(1 2), A[0]=1."""
    state, name, is_added = expansion.state, node["Name"]["Value"], node.get("Append", False)
    if name == "IFS":
        state.note("IFS is set: words are split at blanks here all the same")
    if "Array" in node:
        values = _elements(node["Array"], expansion)
        state.set(name, [*state.values.get(name, []), *values] if is_added else values)
        return
    text = expansion.text(node["Value"]) if "Value" in node else ""
    if "Index" in node:
        place = expansion.number(node["Index"])
        old = state.values.get(name, [])
        if place is None or not 0 <= place <= len(old) or has_unknown(old):  # no list from 0 on, or none that is known
            state.set(name, SEVERAL_UNKNOWN)
        else:
            before = "".join(old[place : place + 1]) if is_added else ""
            state.set(name, [*old[:place], before + text, *old[place + 1 :]])
    else:
        before = "".join(state.values.get(name, [UNKNOWN_MARK])[:1]) if is_added else ""
        state.assign(name, before + text)


def _elements(array: Node, expansion: Expansion) -> list[str]:
    elements = [each for each in array.get("Elems", []) if "Value" in each]
    values = [word for each in elements for word in expansion.words(each["Value"])]
    return SEVERAL_UNKNOWN if any("Index" in each for each in elements) else values


def declare(node: Node, expansion: Expansion, own: dict[str, list[str] | None] | None) -> None:
    """export, local, declare, readonly, typeset; `own` holds what a function's own variables were outside of it."""
    state, variant = expansion.state, node["Variant"]["Value"]
    flags = "".join(each.told for each in node.get("Args", []) if each.told.startswith(("-", "+")))
    is_own = own is not None and variant not in ("export", "readonly") and "g" not in flags
    for each in node.get("Args", []):
        if "Name" not in each:
            _declare_text(expansion.text(each["Value"]), variant, state)
            continue
        name = each["Name"]["Value"]
        values = state.values.get(name)
        if not each.get("Naked"):
            assign(each, expansion)
        elif is_own:
            state.set(name, [])
        if own is not None and is_own:
            own.setdefault(name, values)
        if variant == "export" or "x" in flags:
            state.exported.add(name)
        if set(flags) & set("Ailnu"):
            state.note(f"{node.told}: not read as it says; {name} is not known")
            state.set(name, [UNKNOWN_MARK])


def _declare_text(text: str, variant: str, state: State) -> None:
    """A declaration's words that are no names or assignments until they are expanded."""
    if text.startswith(("-", "+")):
        return
    if match := _ASSIGNMENT.fullmatch(text):
        state.assign(match[1], match[2])
        if variant == "export":
            state.exported.add(match[1])
    elif not NAME.fullmatch(text):
        state.note(f"{variant} {text}: what it sets is not known")


def carry_out(words: list[str], state: State) -> None:
    """Of those in SETTING: what printf -v and read set is not known."""
    name, rest = words[0], words[1:]
    if name == "shift":
        _shift(state, rest)
    elif name == "set" and "--" in rest:
        state.set_arguments(rest[rest.index("--") + 1 :])
    elif name == "set" and rest and not rest[0].startswith(("-", "+")):
        state.set_arguments(rest)
    elif name == "unset" and "-f" in rest:
        for function in rest:
            state.functions.pop(function, None)
    elif name == "unset":
        for variable in rest:
            if match := NAME.match(variable):
                state.set(match[0], [] if match[0] == variable else [UNKNOWN_MARK])
    else:
        for variable in rest if name in READERS else rest[1:2] if rest[:1] == ["-v"] else []:
            if match := NAME.match(variable):
                state.set(match[0], [UNKNOWN_MARK])


def _shift(state: State, by: list[str]) -> None:
    arguments, number = state.arguments, int(by[0]) if by and NUMBER.fullmatch(by[0]) else 1
    if arguments is None:
        return
    if has_unknown([*arguments[:number], *by]):
        state.set_arguments([UNKNOWN_MARK])
    elif 0 <= number <= len(arguments):
        state.set_arguments(arguments[number:])
