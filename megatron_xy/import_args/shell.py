"""The commands of a bash script: what they set, what they read, which programs they start."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_xy.errors import DataError
from megatron_xy.import_args.conditions import truth_of_words
from megatron_xy.import_args.flow import Broke, Continued, Exited, Flow, Returned
from megatron_xy.import_args.launchers import Script, program_of, script_of
from megatron_xy.import_args.settings import READERS, SETTING, assign, carry_out, declare
from megatron_xy.import_args.state import NUMBER, UNKNOWN_MARK, State, shortened
from megatron_xy.import_args.syntax import Node, NotBash, statements

MOST_DEPTH = 20


@dataclass
class Shell:
    """What reading a script changes."""

    folder: Path
    state: State = field(default_factory=State)
    programs: list[list[str]] = field(default_factory=list)  # each from its .py file on
    calls: list[tuple[str, dict[str, list[str] | None]]] = field(default_factory=list)  # and what was before
    num_sourced: int = 0  # files that are open
    depth: int = 0  # of files, and strings that are scripts, in each other
    has_moved: bool = False

    def __post_init__(self) -> None:
        self.flow = Flow(self.state, self._command)

    def read_script(self, path: Path) -> None:
        """All of it, or up to its exit. Raises DataError for what is no script, or has no end."""
        self.flow.apart(lambda: self._read_file(path))

    def _read_file(self, path: Path) -> bool | None:
        try:
            return self._read(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} must be a bash script in UTF-8: {error}") from None

    def _read(self, text: str, name: str) -> bool | None:
        if self.depth == MOST_DEPTH:
            raise DataError(f"{text[:60]!r} starts itself again; import-args reads {MOST_DEPTH} scripts in each other")
        self.depth += 1
        try:
            return self.flow.run(statements(text, name))
        finally:
            self.depth -= 1

    def _command(self, node: Node) -> bool | None:
        if node["Type"] == "DeclClause":
            declare(node, self.flow.expansion, self.calls[-1][1] if self.calls else None)
            return True
        words = [word for each in node.get("Args", []) for word in self.flow.expansion.words(each)]
        assigned = node.get("Assigns", [])
        if not words:
            for each in assigned:
                assign(each, self.flow.expansion)
            return None if re.search(r"\$\((?!\()|`", node.told) else True
        with self.state.borrowed(each["Name"]["Value"] for each in assigned):
            for each in assigned:
                assign(each, self.flow.expansion)
            return self._carry_out(words)

    def _carry_out(self, words: list[str]) -> bool | None:
        name, *rest = words
        if name in self.state.functions:
            return self._function(name, rest)
        match name:
            case "[" | "test":
                return truth_of_words(rest if name == "test" else rest[:-1])
            case "source" | "." if rest:
                return self._source(*rest)
            case "eval":
                return self._string(" ".join(rest))
            case "exit" | "return" | "break" | "continue":
                self._leave(name, rest)
            case "exec" if rest:
                self._carry_out(rest)
                raise Exited
            case "cd" | "pushd":
                self.has_moved = True
            case _ if name in SETTING:
                carry_out(words, self.state)
            case _:
                return self._start(words)
        return True if name in SETTING and name not in READERS else None

    def _leave(self, name: str, rest: list[str]) -> None:
        truth = int(rest[0]) == 0 if rest and NUMBER.fullmatch(rest[0]) else None
        if name == "exit":
            raise Exited(truth)
        if name == "return" and (self.calls or self.num_sourced):
            raise Returned(truth)
        if name != "return" and self.flow.num_loops:
            if rest not in ([], ["1"]):
                self.state.note(f"{name} {' '.join(rest)}: read as {name}")
            raise Broke if name == "break" else Continued

    def _start(self, words: list[str]) -> bool | None:
        """Something that is not bash's own."""
        if script := script_of(words):
            return self.flow.apart(lambda: self._new_shell(script))
        if words[0].startswith("--"):
            self.state.note(f"{' '.join(words)}: passed to nothing, the line before it does not go on")
        elif words == [UNKNOWN_MARK]:
            self.state.note(f"{UNKNOWN_MARK}: a command; what it sets is not known either")
        elif program := program_of(words):
            self.state.matters(is_program=True)
            self.programs.append(program)
        return {"true": True, ":": True, "echo": True, "false": False}.get(words[0])

    def _new_shell(self, script: Script) -> bool | None:
        """Of its own variables and functions it has those that are exported."""
        self.state.values = {name: value for name, value in self.state.values.items() if name in self.state.exported}
        self.state.functions = {}
        self.state.arguments = script.arguments
        return self._string(script.text)

    def _string(self, text: str) -> bool | None:
        """One that is a script."""
        try:
            return self._read(text, "it")
        except NotBash as error:
            self.state.note(f"{shortened(text)}: not read, {error}")
            return None

    def _source(self, name: str, *arguments: str) -> bool | None:
        path, outer = self.folder / name, self.state.arguments
        if UNKNOWN_MARK in name or not path.is_file():
            self.state.note(f"source {name}: no such file here; what it sets is not known")
            return None
        if self.has_moved and path != Path(name):
            self.state.note(f"source {name}: {path} is read, wherever `cd` went before")
        self.state.arguments = list(arguments) or outer
        self.num_sourced += 1
        try:
            return self._read_file(path)
        except Returned as left:
            return left.truth
        finally:
            self.num_sourced -= 1
            self.state.arguments = outer if arguments else self.state.arguments

    def _function(self, name: str, arguments: list[str]) -> bool | None:
        told = " ".join([name, *arguments])
        if any(name == called for called, _ in self.calls):
            self.state.note(f"{shortened(told)}: calls itself; how often is not known without running it")
            return None
        outer, self.state.arguments = self.state.arguments, arguments
        self.calls.append((name, {}))
        try:
            return self.flow.statement(self.state.functions[name])
        except Returned as left:
            return left.truth
        finally:
            self.state.give_back(self.calls.pop()[1])
            self.state.arguments = outer
