"""This process's place in torchrun's world, as its environment variables say it before any group exists; its limits."""

from __future__ import annotations

import os
import resource

OPEN_FILES = 65536  # more than a rank can need; "unlimited" would make some programs that it starts close them all


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


def allow_open_files() -> None:
    """Raises this process's limit of open files, as far as it may: data sets of many shards, sockets to many peers."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
