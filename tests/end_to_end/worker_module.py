"""What the supervisor's tests run on every rank in place of a training: no torch, one behaviour each.

Called as `python -m worker_module TASK RUN.yaml behaviour=NAME`; RUN.yaml's folder is the run's.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_xy.run_folder import current_attempt, new_beat, read_heartbeats, record_exit, write_beat
from megatron_xy.runtime.orphans import die_with_parent

RUN_DIR = Path(sys.argv[2]).parent
RANK = int(os.environ["RANK"])


def leave(code: int, message: str) -> None:
    record_exit(RUN_DIR, code=code, message=message, rank=RANK)
    sys.exit(code)


def leave_on_sigterm(code: int, message: str) -> None:
    """At the first SIGTERM; torchrun sends another one when the first rank has left."""

    def handle(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave(code, message)

    signal.signal(signal.SIGTERM, handle)


def beat() -> None:
    write_beat(RUN_DIR, new_beat(rank=RANK, iteration=12, phase="train"))


def clean() -> None:
    """Leaves with 0 on every rank; rank 1 leaves a process behind, in a session of its own."""
    shown = {"argv": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"], "cwd": str(Path.cwd())}
    if RANK == 1:
        code = "import time; time.sleep(600)"
        shown["left_behind"] = subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid
    (RUN_DIR / f"shown-{RANK}.json").write_text(json.dumps(shown))
    print(f"rank {RANK} speaks", flush=True)
    leave(0, "done")


def bad_data() -> None:
    if RANK == 1:
        leave(65, "shard_00000.bin is cut")
    time.sleep(600)


def killed_once() -> None:
    """In the first start rank 1 is killed, and rank 0 records what it sees of that."""
    leave_on_sigterm(76, "connection closed by peer")
    beat()
    if current_attempt() > 0:
        leave(0, "done")
    while RANK == 1:
        if len(read_heartbeats(RUN_DIR)) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
    time.sleep(600)


def killed_at_start() -> None:
    """In the first start rank 1 is killed before the first step; torchrun stops rank 0, which has nothing to save."""
    leave_on_sigterm(75, "there was nothing to save")
    if current_attempt() > 0:
        leave(0, "done")
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def crash() -> None:
    """An exception before anything could record it."""
    if RANK == 0:
        raise RuntimeError("no such luck")
    time.sleep(600)


def stoppable() -> None:
    leave_on_sigterm(75, "saved at iteration 12")
    beat()
    time.sleep(600)


def stubborn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    beat()
    time.sleep(600)


def early() -> None:
    """Has not come as far as a heartbeat or a signal handler."""
    (RUN_DIR / f"begun-{RANK}").touch()
    time.sleep(600)


def lingering() -> None:
    """Both ranks fail, and neither leaves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    record_exit(RUN_DIR, code=70, message="an assert of ours", rank=RANK)
    time.sleep(600)


if __name__ == "__main__":
    die_with_parent()
    globals()[sys.argv[3].partition("=")[2]]()
