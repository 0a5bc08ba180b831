"""Who does a piece of work of a build that several processes, on one machine or many, do together.

A claim is the kernel's lock on a file of its own: it goes with its holder, however that ends, and another takes it up.
Whether the work is done stands in its receipt, never in the claim: on a file system whose locks do not reach other
machines, work may be done twice, to the same bytes.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_xy.storage import take_lock

CLAIMS_FOLDER = "claims"


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the piece of work that `path` stands for is this process's, until the block ends; `wait`: until it is.

    Raises FileNotFoundError where the folder of claims is gone: the build is finished; ConfigError where there are no
    locks.
    """
    with path.open("a") as stream:
        is_ours = take_lock(stream.fileno(), fcntl.LOCK_EX, folder=path.parent)
        if wait and not is_ours:
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield is_ours or wait
