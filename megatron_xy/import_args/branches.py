"""Whether the next command of a script runs: lists joined by && and ||, and what is open around it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_xy.import_args.commands import is_test, spelt
from megatron_xy.import_args.tokens import Token
from megatron_xy.import_args.values import both, either


@dataclass(frozen=True)
class CommandList:
    """Commands joined by && and ||, as far as they are read."""

    truth: bool | None = True
    mark: str = ";"  # behind them
    told: str = ""  # the command that is not known
    is_test: bool = False  # and it is one
    is_piped: bool = False  # the next command gets what the last one prints

    @property
    def goes_on(self) -> bool | None:
        """Whether the next command runs."""
        if self.mark == "&&":
            return self.truth
        return True if self.mark != "||" else None if self.truth is None else not self.truth

    def then(self, value: bool | None, command: list[Token], mark: str) -> CommandList:
        """With a command more."""
        if mark == "|":
            return replace(self, is_piped=True)
        is_joined = self.mark in ("&&", "||")
        truth = both(self.truth, value) if self.mark == "&&" else either(self.truth, value) if is_joined else value
        if is_joined and self.truth is None:
            return CommandList(truth, mark, self.told, self.is_test)
        return CommandList(truth, mark, spelt("", command).strip(), is_test(command))

    def branch(self) -> Branch:
        """For the next command."""
        note = f"{self.told}: not known without running it; what hangs on it is read"
        return Branch(
            runs=self.goes_on, note=note if self.goes_on is None and self.told else "", is_program=self.is_test
        )


@dataclass
class Branch:
    """An if, a case, a loop or a group that is open: whether what is read now runs (None: not known)."""

    runs: bool | None
    was_taken: bool = False  # an earlier branch surely was
    has_unknown: bool = False  # an earlier branch may have been
    subject: str | None = None  # of a case
    awaits: bool = False  # a pattern of a case
    note: str = ""  # to be told once something in it counts
    is_program: bool = True  # which a program also does
    opened: str = ""
    before: CommandList = field(default_factory=CommandList)  # in which it stands
    variables: dict[str, list[str]] = field(default_factory=dict)  # where it began
