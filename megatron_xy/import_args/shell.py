"""What a bash script hands to its Python program: variables, arrays, tests and sourced files are read; nothing is run.

    text -> tokens -> commands, of the branches that are taken -> the words behind the program

What only a run would tell stands as UNKNOWN, and branches that hang on it are all read, with a note.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_xy.errors import DataError
from megatron_xy.import_args.branches import Branch, CommandList
from megatron_xy.import_args.commands import (
    ASSIGNMENT,
    BEHIND,
    END,
    PIPE,
    arithmetic_end,
    definition,
    is_test,
    passed,
    spelt,
    then_of,
)
from megatron_xy.import_args.expansion import expanded, forget_arguments, is_argument, set_arguments, substituted
from megatron_xy.import_args.tokens import UNKNOWN_MARK, Token, closing_mark, tokens_of
from megatron_xy.import_args.values import both, either, truth_of

UNKNOWN = "(not known)"  # in place of $1, $(command) and variables of the environment

MOST_DEPTH = 20
MOST_TOLD = 80  # characters of a command
_DECLARING = {"export", "local", "declare", "readonly", "typeset"}
_NO_FAILURE = {"echo", "true", ":", "export", "local", "declare", "readonly", "typeset", "set", "shift"}


class _Returned(Exception):
    def __init__(self, truth: bool | None) -> None:
        self.truth = truth


@dataclass(frozen=True)
class Program:
    """What a script starts. notes: what was read otherwise than it would run, or may."""

    arguments: list[str]
    notes: list[str]


def program_arguments(path: Path) -> Program:
    """What the command in `path` passes to a .py file that has most flags. Raises DataError where there is none."""
    reader = _Reader(path.parent)
    reader.read(_text_of(path))
    if not reader.programs:
        raise DataError(f"{path} must start a Python program, such as `torchrun ... pretrain_gpt.py --num-layers 80`")
    program = max(reversed(reader.programs), key=_flags)
    for other in reader.programs:
        if Path(other[0]).name == Path(program[0]).name and other[1:] != program[1:]:
            told = " ".join(other)
            told = told if len(told) <= MOST_TOLD else told[:MOST_TOLD] + "..."
            reader.notes.append(f"{told}: a second start of it; the one with most flags, the last of such, is read")
    notes = list(dict.fromkeys(reader.notes))
    return Program(*([text.replace(UNKNOWN_MARK, UNKNOWN) for text in texts] for texts in (program[1:], notes)))


def _flags(words: list[str]) -> int:
    return sum(word.startswith("--") for word in words)


@dataclass
class _Reader:
    """Goes through commands in their order; assignments act on those that follow."""

    folder: Path
    variables: dict[str, list[str]] = field(default_factory=dict)
    programs: list[list[str]] = field(default_factory=list)  # each from its .py file on
    notes: list[str] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    functions: dict[str, list[Token]] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)  # that are open, and how many branches were then
    locals: list[dict[str, list[str] | None]] = field(default_factory=list)  # of each call, what they were before
    depth: int = 0  # of files, and strings that are scripts, in each other

    def read(self, text: str) -> None:
        """All commands of a script, or a string that is one. Raises DataError where they start each other for ever."""
        if self.depth == MOST_DEPTH:
            raise DataError(f"{text[:60]!r} starts itself again; import-args reads {MOST_DEPTH} scripts in each other")
        self.depth += 1
        try:
            self._run(list(tokens_of(text)))
        finally:
            self.depth -= 1

    def _run(self, tokens: list[Token]) -> bool | None:
        """The commands in their order; the truth of the last, as far as it is known."""
        bottom = len(self.branches)
        so_far, is_negated = CommandList(), False
        closed: tuple[bool | None, str] | None = None  # the truth of a group or the like, and what tells it
        start = place = 0
        while place < len(tokens):
            token = tokens[place]
            top = self.branches[-1] if len(self.branches) > bottom else None
            word = token.text if place == start and not token.is_quoted else ""
            if top is not None and top.awaits and word != "esac":
                if token == Token(")", is_mark=True):
                    self._pattern(tokens[start:place])
                    so_far = CommandList()
                place += 1
                start = place if token.text in (")", ";") and token.is_mark else start
                continue
            if word and (defined := definition(tokens, place)):
                name, body, start = defined
                place = start
                self._define(name, body, so_far)
            elif word in ("if", "elif") and (then := then_of(tokens, place)):
                self._if(word, tokens[place + 1 : then], so_far)
                start = place = then
            elif word == "case" and tokens[place + 2 : place + 3] == [Token("in")]:
                self._case(tokens[place + 1], so_far)
                start = place = place + 3
            elif word in ("(", "for") and (end := arithmetic_end(tokens, place)):
                if word == "for":
                    self._loop(word, tokens[place + 1 : end], so_far)
                self._computes(tokens[place:end], so_far)
                closed = None, spelt("", tokens[place:end]).strip()
                start = place = end
            elif word in ("while", "until"):
                marks = (at for at in range(place, len(tokens)) if tokens[at].is_mark)
                self._loop(word, tokens[place + 1 : next(marks, place + 1)], so_far)
                so_far = CommandList()
                start = place = place + 1
            elif word in ("{", "("):
                self._open(Branch(runs=True, opened=word), so_far)
                so_far, is_negated = CommandList(), False
                start = place = place + 1
            elif word in ("then", "do", "else"):
                if word == "else":
                    self._else(True)
                so_far = CommandList()
                start = place = place + 1
            elif word in ("!", "time", "exec"):
                is_negated = is_negated != (word == "!")
                start = place = place + 1
            elif word in ("fi", "done", "esac", "}") or (top and top.opened == "(" and word == ")"):
                start = place = place + 1
                if top is not None:
                    self.branches.pop()
                    closed = (so_far.truth, so_far.told) if top.opened in ("{", "(") else (None, f"... {word}")
                    so_far = top.before
                    if top.opened == "(" or tokens[place : place + 1] in ([PIPE], [BEHIND]):
                        self.variables = top.variables
            elif not token.is_mark:
                is_array = re.fullmatch(r"[A-Za-z_]\w*\+?=", token.text) and tokens[place + 1].text == "("
                place = closing_mark(tokens, place + 1) if is_array and tokens[place + 1].is_mark else place + 1
            elif tokens[start] == Token("[[") and Token("]]") not in tokens[start:place] and place > start:
                place += 1
            else:
                command, mark = tokens[start:place], token.text
                start = place if mark == ")" and command else place + 1  # which also closes
                place = start
                if command and command[0] == Token("for"):
                    self._loop("for", command[1:], so_far)
                    so_far = CommandList()
                    continue
                if command or closed:
                    value = self._in_list(command, so_far, mark) if command or not closed else closed[0]
                    value = value if value is None or not is_negated else not value
                    told = [Token(closed[1])] if closed and not command else command
                    so_far, closed, is_negated = so_far.then(value, told, mark), None, False
                if mark == ";;" and top is not None and top.subject is not None:
                    top.runs, top.awaits = False, True
        del self.branches[bottom:]
        return so_far.truth

    def _in_list(self, command: list[Token], so_far: CommandList, mark: str) -> bool | None:
        """Does what a command says where the list goes on to it; what a pipe sets stays in it."""
        variables = self.variables
        if mark in ("|", "&") or so_far.is_piped:
            self.variables = dict(variables)
        self.branches.append(so_far.branch())
        before = {name: self.variables.get(name) for name in passed(command)}
        value = self._command(command) if self._is_read else None
        self._restore(before)
        self.branches.pop()
        if mark in ("|", "&") or so_far.is_piped:
            self.variables = variables
        return value

    def _command(self, command: list[Token]) -> bool | None:
        """Does what one says; its truth, as far as it is known."""
        if is_test(command):
            return self._condition(command)
        words = self._words(command)
        if not words:
            return None if any(UNKNOWN_MARK in token.text for token in command) else True
        if words[0] in self.functions:
            return self._call(words)
        if words[0] == "return" and self.calls:
            self._return(words)
        elif words[0] == "shift" and "@" in self.variables:
            self._shift(words)
        elif words[:2] == ["set", "--"]:
            self._counts()
            set_arguments(self.variables, words[2:])
        elif words[0] in ("source", ".") and len(words) > 1:
            self._source(words[1])
        elif words[0].startswith("--"):
            self.notes.append(f"{' '.join(words)}: passed to nothing, the line before it does not go on")
        elif words[0] == "eval":
            self.read(" ".join(words[1:]))
        elif len(words) > 2 and "-c" in words[:-1] and any(Path(w).name in ("bash", "sh") for w in words):
            self.read(words[words.index("-c") + 1])
        else:
            places = [place for place, word in enumerate(words) if word.endswith(".py")]
            if places:
                self._counts(is_program=True)
                self.programs.append(words[places[0] :])
        return True if words[0] in _NO_FAILURE else False if words[0] == "false" else None

    def _computes(self, tokens: list[Token], so_far: CommandList) -> None:
        """What ((...)) sets is not known."""
        self.branches.append(so_far.branch())
        if self._is_read:
            for name in re.findall(r"([A-Za-z_]\w*) ?(?:[-+*/%]?=(?!=)|\+\+|--)", spelt("", tokens)):
                self._counts()
                self.variables[name] = [UNKNOWN_MARK]
        self.branches.pop()

    def _define(self, name: str, body: list[Token], so_far: CommandList) -> None:
        self.branches.append(so_far.branch())
        if self._is_read:
            self._counts()
            self.functions[name] = body
        self.branches.pop()

    def _call(self, words: list[str]) -> bool | None:
        """A function's commands, with its arguments; what is local to it goes with it."""
        name = words[0]
        if any(name == other for other, _ in self.calls):
            self.notes.append(f"{' '.join(words)}: calls itself; how often is not known without running it")
            return None
        arguments = {name: values for name, values in self.variables.items() if is_argument(name)}
        bottom = len(self.branches)
        self.calls.append((name, bottom))
        self.locals.append({})
        set_arguments(self.variables, words[1:])
        try:
            truth = self._run(self.functions[name])
        except _Returned as returned:
            truth = returned.truth
        del self.branches[bottom:]
        self.calls.pop()
        self._restore(self.locals.pop())
        forget_arguments(self.variables)
        self.variables.update(arguments)
        return truth

    def _restore(self, before: dict[str, list[str] | None]) -> None:
        for name, values in before.items():
            if values is None:
                self.variables.pop(name, None)
            else:
                self.variables[name] = values

    def _return(self, words: list[str]) -> None:
        if all(branch.runs for branch in self.branches[self.calls[-1][1] :]):
            code = words[1] if len(words) > 1 else ""
            raise _Returned(int(code) == 0 if code.isdigit() else None)
        self._counts()

    def _shift(self, words: list[str]) -> None:
        values = self.variables["@"]
        count = words[1] if len(words) > 1 else "1"
        if count.isdigit() and all(branch.runs for branch in self.branches):
            set_arguments(self.variables, values[int(count) :])
        else:
            forget_arguments(self.variables)

    def _words(self, command: list[Token]) -> list[str]:
        """The words, variables put in, behind assignments, which are carried out."""
        words: list[str] = []
        place = 0
        while place < len(command):
            token = command[place]
            place += 1
            is_declared = bool(words) and words[0] in _DECLARING
            match = ASSIGNMENT.fullmatch(token.text) if not words or is_declared else None
            if match is None:
                words += expanded(token, self.variables)
                continue
            name, adds, value = match.groups()
            self._counts()
            if is_declared:
                self._localize(name, words)
            if not value and place < len(command) and command[place] == Token("(", is_mark=True):
                end = closing_mark(command, place) - 1
                elements = [part for part in command[place + 1 : end] if not part.is_mark]
                values = [word for part in elements for word in expanded(part, self.variables)]
                place = end + 1
                self.variables[name] = [*self.variables.get(name, []), *values] if adds else values
            else:
                text = substituted(value, self.variables)
                before = " ".join(self.variables.get(name, [])) if adds else ""
                self.variables[name] = [before + text]
        if words and words[0] == "local":
            for name in words[1:]:
                self._localize(name, words)
                self.variables[name] = []
        return [] if words and words[0] in _DECLARING else words

    def _localize(self, name: str, words: list[str]) -> None:
        if self.locals and words[0] in ("local", "declare", "typeset") and "-g" not in words:
            self.locals[-1].setdefault(name, self.variables.get(name))

    def _counts(self, *, is_program: bool = False) -> None:
        """Something is read that matters: what is not known of the branches around it is told."""
        for branch in self.branches:
            if branch.note and branch.runs is not False and (branch.is_program or not is_program):
                self.notes.append(branch.note)
                branch.note = ""

    def _source(self, name: str) -> None:
        path = self.folder / name
        if UNKNOWN_MARK in name or not path.is_file():
            self.notes.append(f"source {name}: no such file here; what it sets is not known")
        else:
            self.read(_text_of(path))

    def _open(self, branch: Branch, so_far: CommandList) -> None:
        """An if, a case, a loop or a group, where the list goes on to it."""
        around = so_far.branch()
        branch.before, branch.variables = so_far, dict(self.variables)
        if around.runs is False:
            branch.runs, branch.was_taken = False, True
        elif around.runs is None:
            branch.runs = None if branch.runs else branch.runs
            branch.note, branch.is_program = branch.note or around.note, bool(branch.note) or around.is_program
        self.branches.append(branch)

    def _if(self, word: str, condition: list[Token], so_far: CommandList) -> None:
        """What stands between if, or elif, and then."""
        told = spelt(word, condition)
        if word == "elif":
            truth = None
            if self.branches and not self.branches[-1].was_taken:
                self.branches[-1].runs = None if self.branches[-1].has_unknown else True
                truth = self._run([*condition, END])
            self._else(truth, told)
            return
        truth = self._run([*condition, END]) if self._is_read and so_far.goes_on is not False else None
        note = f"{told}: not known without running it; all its branches are read" if truth is None else ""
        self._open(Branch(runs=truth, was_taken=truth is True, has_unknown=truth is None, note=note), so_far)

    def _condition(self, tokens: list[Token]) -> bool | None:
        """Of a test, or several joined by && and || in its brackets."""
        truth: bool | None = True
        joined, part = "&&", list[Token]()
        is_open = False  # a bracket that an earlier part has opened
        for token in [*tokens, Token(";", is_mark=True)]:
            if not token.is_mark:
                part.append(token)
                continue
            if part:
                words = [word for one in part for word in expanded(one, self.variables)]
                value = truth_of(["[[", *words] if is_open else words)
                is_open = "]]" not in words and (is_open or words[0] == "[[")
                truth = both(truth, value) if joined == "&&" else either(truth, value) if joined == "||" else None
                joined = token.text
            part = []
        return truth

    @property
    def _is_read(self) -> bool:
        return all(branch.runs is not False for branch in self.branches)

    def _case(self, of: Token, so_far: CommandList) -> None:
        subject = substituted(of.text, self.variables)
        note = f"{spelt('case', [of])}: not known without running it; all its branches are read"
        note = note if UNKNOWN_MARK in subject else ""
        self._open(Branch(runs=False, subject=subject, awaits=True, note=note), so_far)

    def _loop(self, word: str, command: list[Token], so_far: CommandList) -> None:
        if self._is_read and word == "for" and command:
            self.variables[command[0].text] = [UNKNOWN_MARK]
        self._open(Branch(runs=None, note=f"{spelt(word, command)}: what is inside is read once"), so_far)

    def _else(self, truth: bool | None, told: str = "") -> None:
        if not self.branches:
            return
        branch = self.branches[-1]
        if branch.was_taken:
            branch.runs = False
            return
        if truth is None and not branch.has_unknown:
            branch.note = f"{told}: not known without running it; all branches from here are read"
        branch.runs = None if truth and (branch.has_unknown or branch.before.goes_on is None) else truth
        branch.was_taken = branch.runs is True
        branch.has_unknown = branch.has_unknown or branch.runs is None

    def _pattern(self, command: list[Token]) -> None:
        """One of a case, or several; `command` also holds the marks between them."""
        branch = self.branches[-1]
        branch.awaits = False
        assert branch.subject is not None, "only a case has patterns"
        if UNKNOWN_MARK in branch.subject:
            branch.runs = False if branch.was_taken else None
            return
        patterns = [substituted(token.text, self.variables) for token in command if not token.is_mark]
        fits = any(fnmatch.fnmatchcase(branch.subject, pattern) for pattern in patterns)
        branch.runs = fits and not branch.was_taken and (branch.before.goes_on or None)
        branch.was_taken = branch.was_taken or fits


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be a bash script in UTF-8: {error}") from None
