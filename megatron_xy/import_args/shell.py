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
from megatron_xy.import_args.tokens import LITERAL_DOLLAR, UNKNOWN_MARK, Token, closing, closing_mark, tokens_of
from megatron_xy.import_args.values import both, computed, either, truth_of

UNKNOWN = "(not known)"  # in place of $1, $(command) and variables of the environment

MOST_DEPTH = 20
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARING = {"export", "local", "declare", "readonly", "typeset"}
_KEYWORDS = {"else", "fi", "for", "while", "until", "done", "esac"}
_PREFIXES = {"then", "do", "{", "!", "time", "exec"}  # of a command
_NAME = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?!$-]")


@dataclass
class _Branch:
    """An if, a case or a loop that is open: whether what is read now runs (None: not known)."""

    runs: bool | None
    was_taken: bool = False  # an earlier branch surely was
    has_unknown: bool = False  # an earlier branch may have been
    subject: str | None = None  # of a case
    note: str = ""  # to be told once something in it counts


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
    arguments = max(reversed(reader.programs), key=lambda words: sum(word.startswith("--") for word in words))
    return Program(*([text.replace(UNKNOWN_MARK, UNKNOWN) for text in texts] for texts in (arguments, reader.notes)))


@dataclass
class _Reader:
    """Goes through commands in their order; assignments act on those that follow."""

    folder: Path
    variables: dict[str, list[str]] = field(default_factory=dict)
    programs: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    branches: list[_Branch] = field(default_factory=list)
    depth: int = 0  # of files, and strings that are scripts, in each other

    def read(self, text: str) -> None:
        """All commands of a script, or a string that is one. Raises DataError where they start each other for ever."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise DataError(f"{text[:60]!r} starts itself again; import-args reads {MOST_DEPTH} scripts in each other")
        tokens = list(tokens_of(text))
        skips = False  # the next command, by && or || behind a test
        start = place = 0
        while place < len(tokens):
            if place == start and tokens[place].text in ("if", "elif") and (then := _then(tokens, place)):
                self._if(tokens[place].text, tokens[place + 1 : then])
                start = place = then
            if place == start and tokens[place].text == "case" and tokens[place + 2 : place + 3] == [Token("in")]:
                self._case(tokens[place + 1])
                start = place = place + 3
            if not tokens[place].is_mark:
                is_array = re.fullmatch(r"[A-Za-z_]\w*\+?=", tokens[place].text) and tokens[place + 1].text == "("
                place = closing_mark(tokens, place + 1) if is_array and tokens[place + 1].is_mark else place + 1
                continue
            command, mark = tokens[start:place], tokens[place].text
            place += 1
            start = place
            if mark == ")" and self.branches and self.branches[-1].subject is not None:
                self._pattern(command)
                continue
            if mark == "|" and self.branches and self.branches[-1].subject is not None and len(command) == 1:
                start -= 2  # more patterns of a case
                continue
            value = None if skips else self._command(command)
            is_test = bool(command) and command[0].text in ("[", "[[", "test")
            if is_test and value is None and mark in ("&&", "||") and _ASSIGNMENT.fullmatch(tokens[place].text):
                self.notes.append(
                    f"{_told('', command).strip()}: not known without running it; what hangs on it is read"
                )
            skips = is_test and ((mark == "&&" and value is False) or (mark == "||" and value is True))
            if mark == ";;" and self.branches and self.branches[-1].subject is not None:
                self.branches[-1].runs = False
        self.depth -= 1

    def _command(self, command: list[Token]) -> bool | None:
        """Does what one says; the truth of a test, as far as it is known."""
        while command and not command[0].is_quoted and (word := command[0].text) in _KEYWORDS | _PREFIXES:
            command = command[1:]
            if word in ("while", "until", "for"):
                self._loop(word, command)
                return None
            if word == "else":
                self._else(True)
            elif word in ("fi", "done", "esac") and self.branches:
                self.branches.pop()
        if not command or not self._is_read:
            return None
        words = self._words(command)
        if not words:
            return None
        if words[0] in ("[", "[[", "test"):
            return truth_of(words)
        if words[0] in ("source", ".") and len(words) > 1:
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
                self._counts()
                self.programs.append(words[places[0] + 1 :])
        return None

    def _words(self, command: list[Token]) -> list[str]:
        """The words, variables put in, behind assignments, which are carried out."""
        words: list[str] = []
        place = 0
        while place < len(command):
            token = command[place]
            place += 1
            is_declared = bool(words) and words[0] in _DECLARING
            match = _ASSIGNMENT.fullmatch(token.text) if not words or is_declared else None
            if match is None:
                words += self._expanded(token)
                continue
            name, adds, value = match.groups()
            self._counts()
            if not value and place < len(command) and command[place] == Token("(", is_mark=True):
                end = closing_mark(command, place) - 1
                elements = [part for part in command[place + 1 : end] if not part.is_mark]
                values = [word for part in elements for word in self._expanded(part)]
                place = end + 1
                self.variables[name] = [*self.variables.get(name, []), *values] if adds else values
            else:
                text = self._text(value)
                before = " ".join(self.variables.get(name, [])) if adds else ""
                self.variables[name] = [before + text]
        return [] if words and words[0] in _DECLARING else words

    def _expanded(self, token: Token) -> list[str]:
        """A token's words: one where it is quoted, an array's elements, else as many as its value has."""
        if match := re.fullmatch(r"\$\{([A-Za-z_]\w*)\[([@*])\]\}", token.text):
            values = self.variables.get(match[1], [UNKNOWN_MARK])
            if token.is_quoted:
                return list(values) if match[2] == "@" else [" ".join(values)]
            return [word for value in values for word in ([value] if UNKNOWN_MARK in value else value.split())]
        text = self._text(token.text)
        is_split = "$" in token.text and not token.is_quoted and UNKNOWN_MARK not in text
        words = text.split() if is_split else [text]
        return [word.replace(LITERAL_DOLLAR, "$") for word in words]

    def _text(self, text: str) -> str:
        """With the values of its variables."""
        parts: list[str] = []
        place = 0
        while (dollar := text.find("$", place)) >= 0:
            parts.append(text[place:dollar])
            if text.startswith("$((", dollar):
                place = closing(text, dollar + 1, "(", ")")
                parts.append(self._computed(text[dollar + 3 : place - 2]))
            elif text.startswith("${", dollar):
                place = closing(text, dollar + 1, "{", "}")
                parts.append(self._value(text[dollar + 2 : place - 1]))
            elif match := _NAME.match(text, dollar + 1):
                place = match.end()
                parts.append(self._value(match[0]))
            else:
                place = dollar + 1
                parts.append("$")
        return "".join(parts) + text[place:]

    def _value(self, inside: str) -> str:
        """Of ${inside}."""
        match = re.fullmatch(r"([A-Za-z_]\w*|\d+|[@*#?!$-])(?:\[(\d+|[@*])\])?(?:(:?[-=+?])(.*))?", inside, re.DOTALL)
        if match is None:
            return UNKNOWN_MARK
        known = self.variables.get(match[1])
        if known is not None and (match[2] or "@") not in "@*":
            known = known[int(match[2]) : int(match[2]) + 1]
        way = match[3] or ""
        is_there = known is not None and (bool(" ".join(known)) or not way.startswith(":"))
        if way.endswith("+"):
            return self._bare(match[4]) if is_there else UNKNOWN_MARK if known is None else ""
        if is_there:
            return " ".join(known or [])
        return self._bare(match[4]) if way.endswith(("-", "=")) else UNKNOWN_MARK if known is None else ""

    def _bare(self, text: str) -> str:
        return self._text(text.replace('"', "").replace("'", ""))

    def _computed(self, text: str) -> str:
        """Of $((text)), whole numbers."""
        return computed(re.sub(r"\b[A-Za-z_]\w*", lambda match: self._value(match[0]), self._text(text)))

    def _counts(self) -> None:
        """Something is read that matters: what is not known of the branches around it is told."""
        for branch in self.branches:
            if branch.note and branch.runs is not False:
                self.notes.append(branch.note)
                branch.note = ""

    def _source(self, name: str) -> None:
        path = self.folder / name
        if UNKNOWN_MARK in name or not path.is_file():
            self.notes.append(f"source {name}: no such file here; what it sets is not known")
        else:
            self.read(_text_of(path))

    def _if(self, word: str, condition: list[Token]) -> None:
        """What stands between if, or elif, and then."""
        told = _told(word, condition)
        truth = self._condition(condition)
        if word == "elif":
            self._else(truth, told)
            return
        note = f"{told}: not known without running it; all its branches are read" if truth is None else ""
        self.branches.append(_Branch(runs=truth, was_taken=truth is True, has_unknown=truth is None, note=note))

    def _condition(self, tokens: list[Token]) -> bool | None:
        """Tests joined by && and ||, in or between their brackets."""
        truth: bool | None = True
        joined, part = "&&", list[Token]()
        is_open = False  # a bracket that an earlier part has opened
        for token in [*tokens, Token(";", is_mark=True)]:
            if not token.is_mark:
                part.append(token)
                continue
            if part:
                words = [word for one in part for word in self._expanded(one)]
                value = truth_of(["[[", *words] if is_open else words)
                is_open = "]]" not in words and (is_open or words[0] == "[[")
                truth = both(truth, value) if joined == "&&" else either(truth, value) if joined == "||" else None
                joined = token.text
            part = []
        return truth

    @property
    def _is_read(self) -> bool:
        return all(branch.runs is not False for branch in self.branches)

    def _case(self, of: Token) -> None:
        subject = self._text(of.text)
        note = f"{_told('case', [of])}: not known without running it; all its branches are read"
        self.branches.append(_Branch(runs=False, subject=subject, note=note if UNKNOWN_MARK in subject else ""))

    def _loop(self, word: str, command: list[Token]) -> None:
        if self._is_read and word == "for" and command:
            self.variables[command[0].text] = [UNKNOWN_MARK]
        self.branches.append(_Branch(runs=None, note=f"{_told(word, command)}: what is inside is read once"))

    def _else(self, truth: bool | None, told: str = "") -> None:
        if not self.branches:
            return
        branch = self.branches[-1]
        if branch.was_taken:
            branch.runs = False
            return
        if truth is None and not branch.has_unknown:
            branch.note = f"{told}: not known without running it; all branches from here are read"
        branch.runs = None if truth and branch.has_unknown else truth
        branch.was_taken = branch.runs is True
        branch.has_unknown = branch.has_unknown or branch.runs is None

    def _pattern(self, command: list[Token]) -> None:
        """One of a case, or several; `command` also holds the marks between them."""
        branch = self.branches[-1]
        assert branch.subject is not None, "only a case has patterns"
        if UNKNOWN_MARK in branch.subject:
            branch.runs = None
            return
        patterns = [self._text(token.text) for token in command if not token.is_mark]
        fits = any(fnmatch.fnmatchcase(branch.subject, pattern) for pattern in patterns)
        branch.runs = fits and not branch.was_taken
        branch.was_taken = branch.was_taken or fits


def _told(word: str, command: list[Token]) -> str:
    return " ".join([word, *(token.text.replace(LITERAL_DOLLAR, "$") for token in command)]).rstrip(" ;")


def _then(tokens: list[Token], place: int) -> int | None:
    """Where the `then` of an `if` at `place` stands."""
    ends = (at for at in range(place + 1, len(tokens)) if tokens[at] == Token("then") and tokens[at - 1].is_mark)
    return next(ends, None)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be a bash script in UTF-8: {error}") from None
