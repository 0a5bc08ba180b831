"""What a bash script hands to its Python program; nothing is run.

    text -> syntax tree -> commands, of the branches that are taken -> the words behind the program

What only a run would tell stands as UNKNOWN, and branches that hang on it are all read, with a note.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_xy.errors import DataError
from megatron_xy.import_args.shell import Shell
from megatron_xy.import_args.state import UNKNOWN_MARK, shortened

UNKNOWN = "(not known)"  # in place of $1, $(command) and variables of the environment


@dataclass(frozen=True)
class Program:
    """What a script starts. notes: what was read otherwise than it would run, or may."""

    arguments: list[str]
    notes: list[str]


def program_arguments(path: Path) -> Program:
    """What the command in `path` passes to a .py file that has most flags. Raises DataError where there is none."""
    shell = Shell(path.parent)
    try:
        shell.read_script(path)
    except RecursionError:
        raise DataError(f"{path} is nested deeper than import-args can read") from None
    if not shell.programs:
        raise DataError(f"{path} must start a Python program, such as `torchrun ... pretrain_gpt.py --num-layers 80`")
    program = max(reversed(shell.programs), key=_flags)
    for other in shell.programs:
        if Path(other[0]).name == Path(program[0]).name and other[1:] != program[1:]:
            told = shortened(" ".join(other))
            shell.state.note(f"{told}: a second start of it; the one with most flags, the last of such, is read")
    return Program(_told(program[1:]), _told(shell.state.notes))


def _flags(words: list[str]) -> int:
    return sum(word.startswith("--") for word in words)


def _told(texts: list[str]) -> list[str]:
    return [text.replace(UNKNOWN_MARK, UNKNOWN) for text in texts]
