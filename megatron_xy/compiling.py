"""torch.compile, where it works: on a GPU it makes one kernel of a function of plain tensor arithmetic.

On a CPU functions run as they stand, since a bare machine has no C++ compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_xy import device


class Compiler(NamedTuple):
    """Whether torch.compile is used in this process, and why (not)."""

    works: bool
    reason: str


@functools.cache
def compiler() -> Compiler:
    """Tries torch.compile once on this process's device; on a CPU it is never called."""
    if device.is_cpu():
        return Compiler(False, "never used on a CPU: it would want a C++ compiler")
    probe = torch.ones(64, device=device.current())
    try:
        correct = bool((torch.compile(_double)(probe) == 2).all().item())
    except Exception as error:  # whatever keeps it from compiling: no C compiler, no Triton, an unknown GPU
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Compiler(False, f"torch.compile does not work here: {lines[0]}")
    return Compiler(correct, "torch.compile works" if correct else "torch.compile gives wrong results here")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where a compiler works; it may write into its arguments, tensors and tuples of them.

    torch compiles it again for each new kind of arguments, eight times at most, and then no more. So all come with
    tokens in their first dimension, the only one that changes, and without their history: whether gradients are wanted
    of them would make another kind.
    """
    kernels = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if not compiler().works:
            return function(*arguments)
        return kernels()(*map(_without_history, arguments))

    return call


def _without_history(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_without_history, argument))
    return argument.detach() if isinstance(argument, torch.Tensor) else argument


def _double(values: torch.Tensor) -> torch.Tensor:
    return values + values
