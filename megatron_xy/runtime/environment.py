"""This process's place in torchrun's world, as its environment variables say it before any group exists."""

from __future__ import annotations

import os


def is_set() -> bool:
    """Whether a launcher started this process as one of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Global rank; 0 where no launcher set one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the whole job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Place on this host, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
