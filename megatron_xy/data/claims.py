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

CLAIMS_FOLDER = "claims"


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the piece of work that `path` stands for is this process's, until the block ends; `wait`: until it is.

    Raises FileNotFoundError where the folder of claims is gone: the build is finished.
    """
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
