"""Which statements of a script run, and in which order: lists, branches, loops, groups and subshells.

Each gives its truth, None where it is not known; what hangs on one that is not known is read, with a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_xy.errors import DataError
from megatron_xy.import_args.conditions import negated, truth_of_clause
from megatron_xy.import_args.expansion import Expansion
from megatron_xy.import_args.state import NAME, UNKNOWN_MARK, State, has_unknown, shortened
from megatron_xy.import_args.syntax import Node

MOST_STATEMENTS = 100_000
_UNREAD = "not known without running it; "


class Left(Exception):
    """What is read ends before its end."""

    def __init__(self, truth: bool | None = None) -> None:
        self.truth = truth


class Exited(Left):
    """By exit, or exec."""


class Returned(Left):
    """From a function or a sourced file."""


class Broke(Left):
    """Out of a loop."""


class Continued(Left):
    """With a loop's next round."""


@dataclass
class Flow:
    """command: what an assignment, a declaration or a call does."""

    state: State
    command: Callable[[Node], bool | None]
    num_statements: int = 0
    num_loops: int = 0  # that are open
    undecided: str = ""  # the last one whose truth is not known

    @property
    def expansion(self) -> Expansion:
        """With the variables as they are."""
        return Expansion(self.state)

    def run(self, nodes: list[Node]) -> bool | None:
        """In their order."""
        truth: bool | None = True
        for node in nodes:
            truth = self.statement(node)
        return truth

    def statement(self, node: Node) -> bool | None:
        """Raises DataError after MOST_STATEMENTS of a script, as loops in loops can have for ever."""
        self.num_statements += 1
        if self.num_statements > MOST_STATEMENTS:
            raise DataError(f"{shortened(node.told)}: import-args reads {MOST_STATEMENTS} statements, loops unrolled")
        if "Cmd" not in node:  # > file
            return True
        if node.get("Background"):
            self.apart(lambda: self._command(node["Cmd"]))
            return True
        truth = self._command(node["Cmd"])
        if truth is None and node["Cmd"]["Type"] != "BinaryCmd":
            self.undecided = shortened(node.told)
        return negated(truth) if node.get("Negated") else truth

    def _command(self, node: Node) -> bool | None:
        match node["Type"]:
            case "CallExpr" | "DeclClause":
                return self.command(node)
            case "BinaryCmd":
                return self._joined(node)
            case "IfClause":
                return self._if(node, "if")
            case "CaseClause":
                return self._case(node)
            case "ForClause":
                self._for(node)
                return None
            case "WhileClause":
                self._while(node)
                return None
            case "TestClause":
                return truth_of_clause(node["X"], self.expansion)
            case "ArithmCmd" | "LetClause":
                expressions = node["Exprs"] if node["Type"] == "LetClause" else [node["X"]]
                number = [self.expansion.number(each) for each in expressions][-1]
                return None if number is None else number != 0
            case "Block":
                return self.run(node["Stmts"])
            case "Subshell":
                return self.apart(lambda: self.run(node["Stmts"]))
            case "TimeClause":
                return self.statement(node["Stmt"]) if "Stmt" in node else True
            case "FuncDecl":
                self.state.matters()
                self.state.functions[node["Name"]["Value"]] = node["Body"]
                return True
        self.state.note(f"{shortened(node.told)}: not read")
        return None

    def apart(self, run: Callable[[], bool | None]) -> bool | None:
        """In a shell of its own."""
        with self.state.apart():
            try:
                return run()
            except Left as left:
                return left.truth

    @contextmanager
    def _doubt(self, note: str, *, has_programs: bool = True) -> Iterator[None]:
        """Around what may not run, or not as often; a script that ends in it is read as if it had not come there."""
        before = self.state.kept()
        with self.state.doubt(note, has_programs=has_programs):
            try:
                yield
            except Exited:
                self.state.restore(before)
            except Left:
                self.state.matters()

    def _joined(self, node: Node) -> bool | None:
        """X && Y, X || Y, X | Y."""
        sign: str = node["Op"]
        left, right = node["X"], node["Y"]
        if sign not in ("&&", "||"):
            self.apart(lambda: self.statement(left))
            self.apart(lambda: self.statement(right))
            return None
        truth = self.statement(left)
        if truth is (sign == "||"):
            return truth
        if truth is not None:
            return self.statement(right)
        note = f"{self.undecided}: {_UNREAD}what hangs on it is read"
        with self._doubt(note, has_programs=self.undecided.lstrip("! ").startswith(("[", "test ", "(("))):
            self.statement(right)
        return None

    def _if(self, node: Node, word: str) -> bool | None:
        truth = self.run(node["Cond"]) if "Cond" in node else True
        if truth:
            return self.run(node["Then"])
        condition = "; ".join(each.told for each in node.get("Cond", []))
        note = f"{word} {shortened(condition)}: {_UNREAD}all its branches are read"
        if truth is None:
            with self._doubt(note):
                self.run(node["Then"])
        if "Else" not in node:
            return negated(truth)
        if truth is False:
            return self._if(node["Else"], "elif")
        with self._doubt(note):
            self._if(node["Else"], "elif")
        return None

    def _case(self, node: Node) -> bool | None:
        subject = self.expansion.text(node["Word"])
        note = f"case {shortened(node['Word'].told)}: {_UNREAD}all its branches are read"
        is_sure = True
        for item in node.get("Items", []):
            fits = self._fits(subject, item["Patterns"]) if item["Op"] == ";;" else None
            if fits and is_sure:
                return self.run(item.get("Stmts", []))
            if fits is not False:
                is_sure = False
                with self._doubt(note):
                    self.run(item.get("Stmts", []))
            if fits:
                break
        return True if is_sure else None

    def _fits(self, subject: str, words: list[Node]) -> bool | None:
        patterns = [self.expansion.pattern(word) for word in words]
        if UNKNOWN_MARK in subject:
            return None
        if any(pattern is not None and pattern.fullmatch(subject) for pattern in patterns):
            return True
        return None if None in patterns else False

    def _for(self, node: Node) -> None:
        """Over words that are known as often as it runs; else once."""
        loop = node["Loop"]
        note = f"for {shortened(loop.told)}: what is inside is read once"
        if loop["Type"] == "CStyleLoop":
            with self._doubt(note):
                for part in ("Init", "Cond", "Post"):
                    if part in loop:
                        self.expansion.number(loop[part])
                for name in NAME.findall(loop["Post"].told if "Post" in loop else ""):
                    self.state.set(name, [UNKNOWN_MARK])
                self._round(node["Do"])
            return
        name, values = loop["Name"]["Value"], self.state.arguments
        if "InPos" in loop:
            values = [word for item in loop.get("Items", []) for word in self.expansion.words(item)]
        if values is None or has_unknown(values) or node.get("Select"):
            self.state.set(name, [UNKNOWN_MARK])
            with self._doubt(note):
                self._round(node["Do"])
            return
        for value in values:
            self.state.assign(name, value)
            if not self._round(node["Do"]):
                break

    def _while(self, node: Node) -> None:
        """Once, unless it surely does not run."""
        is_until = node.get("Until", False)
        condition = shortened("; ".join(each.told for each in node["Cond"]))
        with self._doubt(f"{'until' if is_until else 'while'} {condition}: what is inside is read once"):
            if self.run(node["Cond"]) is not is_until:
                self._round(node["Do"])

    def _round(self, body: list[Node]) -> bool:
        """Of a loop; whether it goes on."""
        self.num_loops += 1
        try:
            self.run(body)
        except Continued:
            return True
        except Broke:
            return False
        finally:
            self.num_loops -= 1
        return True
