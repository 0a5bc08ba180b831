"""What ended a start of a run: what its ranks recorded, or, where that is not the cause, what torchrun saw of them."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_xy.errors import EXIT_BUG, EXIT_DONE, EXIT_PEER_LOST, EXIT_STOPPED, EXIT_USAGE
from megatron_xy.run_folder import EXIT_NAMES, ExitRecord, read_heartbeats
from megatron_xy.runtime.torchrun_account import Failure

TORCHRUN_LOG = Path("logs", "torchrun.log")


@dataclass(frozen=True)
class Verdict:
    """What the supervisor writes into exit.json."""

    code: int
    message: str
    rank: int | None


def verdict(
    record: ExitRecord | None,
    *,
    run_dir: Path,
    returncode: int,
    failures: Sequence[Failure],
    received: Sequence[int],
) -> Verdict | None:
    """What exit.json must say instead of the ranks' own record; None where that one stands."""
    killed = _killed_rank(failures)
    if killed and (record is None or record.code in (EXIT_DONE, EXIT_STOPPED, EXIT_PEER_LOST)) and not received:
        # Its peers saw it go; in the start-up, where they have nothing to save, torchrun's SIGTERM stopped them.
        said = f"; rank {record.rank} said: {record.message}" if record and record.code == EXIT_PEER_LOST else ""
        return Verdict(EXIT_PEER_LOST, _obituary(killed, run_dir) + said, killed.rank)
    if record is not None and (record.code != EXIT_DONE or returncode == 0):
        return None
    if record is None and returncode == 0:
        return Verdict(EXIT_DONE, "done", None)
    if len(received) > 1:
        return Verdict(EXIT_PEER_LOST, "killed on a second signal, before the ranks had saved", None)
    if received and not read_heartbeats(run_dir):
        return Verdict(EXIT_STOPPED, "stopped before the ranks had begun; there was nothing to save", None)
    if failures:
        root = failures[-1]
        if root.exitcode < 0:
            return Verdict(EXIT_PEER_LOST, _obituary(root, run_dir), root.rank)
        code = root.exitcode if root.exitcode in EXIT_NAMES and root.exitcode > EXIT_USAGE else EXIT_BUG
        message = f"rank {root.rank} (pid {root.pid}) left with {root.exitcode} and without a word; see its output"
        return Verdict(code, message, root.rank)
    how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"left with {returncode}"
    return Verdict(EXIT_PEER_LOST, f"torchrun {how}; its own words are in {run_dir / TORCHRUN_LOG}", None)


def _killed_rank(failures: Sequence[Failure]) -> Failure | None:
    """The rank that somebody else than torchrun ended; with SIGTERM torchrun ends those that are left."""
    for failure in failures:
        if failure.exitcode < 0 and (failure.exitcode != -signal.SIGTERM or failure is failures[-1]):
            return failure
    return None


def _obituary(killed: Failure, run_dir: Path) -> str:
    name = signal.Signals(-killed.exitcode).name
    beat = read_heartbeats(run_dir).get(killed.rank)
    where = f" at iteration {beat.iteration} ({beat.phase})" if beat else ""
    hint = "; the kernel does that when memory runs out (dmesg tells)" if name == "SIGKILL" else ""
    return f"rank {killed.rank} (pid {killed.pid}) was killed by {name}{where}{hint}"
