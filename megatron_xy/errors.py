"""What can go wrong for a user, each with the exit code that scripts and supervisors rely on.

The codes are those of sysexits.h where it has one. A user's mistake raises `ConfigError` or `DataError` with the
value, the rule and the remedy in one sentence; our own mistakes are asserts and end as `EXIT_BUG`.
"""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

Arguments = ParamSpec("Arguments")

EXIT_DONE = 0
EXIT_COMPARISON_FAILED = 1  # a comparison that the user asked for does not hold
EXIT_USAGE = 2
EXIT_BAD_DATA = 65  # data or a checkpoint that is there, but bad
EXIT_BUG = 70
EXIT_IO = 74
EXIT_STOPPED = 75  # stopped cleanly, resumable
EXIT_PEER_LOST = 76  # another process of the job is gone, or hangs
EXIT_BAD_CONFIG = 78  # a config, or a path that is not there


class MegatronXYError(Exception):
    """Base of every error that ends a command with a documented exit code and one message, without a traceback."""

    exit_code = EXIT_BUG


class ConfigError(MegatronXYError):
    """The configuration, the command's arguments or a path cannot be used as they stand."""

    exit_code = EXIT_BAD_CONFIG


class UsageError(MegatronXYError):
    """An option's value is malformed, or options do not go together: wrong whatever lies on the disk."""

    exit_code = EXIT_USAGE


class DataError(MegatronXYError):
    """A corpus, an indexed dataset, a tokenizer or a checkpoint exists but is damaged or does not fit."""

    exit_code = EXIT_BAD_DATA


class StorageError(MegatronXYError):
    """The file system refused (full, read-only, gone)."""

    exit_code = EXIT_IO


class Stopped(MegatronXYError):
    """Stopped on request, after the state was saved; the run can go on from there."""

    exit_code = EXIT_STOPPED


class PeerLost(MegatronXYError):
    """A collective failed or timed out because another rank is gone or stands still."""

    exit_code = EXIT_PEER_LOST


def memory_error(error: MemoryError) -> ConfigError:
    """What a user is told of memory that the host has not."""
    return ConfigError(f"memory does not suffice ({error}); take smaller batches, or more memory")


def with_exit_code(main: Callable[Arguments, None]) -> Callable[Arguments, int]:
    """A script's main that returns an exit code: 0, or that of the error with which it ends, told on stderr."""

    @functools.wraps(main)
    def ended(*given: Arguments.args, **named: Arguments.kwargs) -> int:
        try:
            main(*given, **named)
        except (MegatronXYError, OSError) as error:
            code = error.exit_code if isinstance(error, MegatronXYError) else EXIT_IO
            print(f"error ({code}): {error}", file=sys.stderr)
            return code
        return EXIT_DONE

    return ended
