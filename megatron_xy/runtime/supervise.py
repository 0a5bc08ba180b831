"""`megatron-xy run`, and `launch --submit` here: torchrun over a RUN.yaml to its end, with signals and exit code.

What ended a run comes from RUN/exit.json, which the ranks write, and from torchrun's own account where they could not.
Nothing that was started outlives the supervisor, however it ends. A hang is found and reported by the ranks' own
watchdogs; the supervisor does it only where none of them runs any more.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_xy.errors import EXIT_DONE, EXIT_IO, EXIT_PEER_LOST, EXIT_STOPPED, PeerLost
from megatron_xy.run_folder import (
    ATTEMPT_VARIABLE,
    EXIT_NAMES,
    SUPERVISOR_LOCK,
    RunDirBusy,
    clear_exit,
    clear_heartbeats,
    lock,
    prepare,
    read_exit,
    read_heartbeats,
    record_exit,
    refuse_if_busy,
)
from megatron_xy.runtime import hang_report
from megatron_xy.runtime.orphans import MARK_VARIABLE, SUPERVISOR_VARIABLE, kill_marked, marked_processes, tie_to
from megatron_xy.runtime.signals import STOP_SIGNALS
from megatron_xy.runtime.torchrun_account import Account
from megatron_xy.runtime.verdict import TORCHRUN_LOG, Verdict, verdict
from megatron_xy.runtime.watchdog import HOLDING_PHASE, HOLDING_SECONDS
from megatron_xy.storage import storage_errors

WORTH_A_RESTART = (EXIT_IO, EXIT_PEER_LOST)  # what another try may not meet again
SILENCE_SECONDS = 15.0  # beyond `timeout_seconds`: no rank's watchdog has told anything, none is left to report
BEGIN_SECONDS = 1200.0  # for the first rank to tell anything
BACK_OFF_SECONDS = 1.0
LINGER_SECONDS = 15.0  # for the other ranks, once one has recorded a failure; torchrun alone would give them 30
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Torchrun:
    """A torchrun over ranks of a run on this machine, and what its end is told by."""

    command: Sequence[str]
    environment: Mapping[str, str]
    verb: str  # which started it
    run_dir: Path
    ranks: int  # on this machine
    timeout_seconds: float
    has_all_ranks: bool = True  # else those of other machines belong to the run, too, each under a torchrun of its own


def supervise(
    config_path: str,
    *,
    task: str,
    run_dir: Path,
    nproc_per_node: int,
    overrides: Sequence[str] = (),
    restarts: int = 0,
    num_threads: int = 1,
    timeout_seconds: float = 120.0,
    module: str = "megatron_xy",
) -> int:
    """Runs `python -m MODULE TASK config_path overrides...` on every rank and returns the documented exit code.

    Otherwise as `run_to_end`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc_per_node}"]
    environment = {"OMP_NUM_THREADS": str(num_threads)} | os.environ
    if not _host_name_resolves():  # gloo and torchrun look this host up by its name
        command.append("--local-addr=127.0.0.1")
        environment = {"GLOO_SOCKET_IFNAME": "lo"} | environment
    torchrun = Torchrun(
        command=[*command, "-m", module, task, config_path, *overrides],
        environment=environment,
        verb="run",
        run_dir=run_dir,
        ranks=nproc_per_node,
        timeout_seconds=timeout_seconds,
    )
    return run_to_end(torchrun, restarts=restarts)


def run_to_end(torchrun: Torchrun, *, restarts: int = 0) -> int:
    """Runs torchrun and its ranks and returns the documented exit code.

    Ends like this: a stop signal asks the ranks to save and stop, a second one kills them. After 74 and 76
    it starts again, `restarts` times at most. Where no rank has told anything for longer than `timeout_seconds`, as all
    are stopped, it reports that and ends them with 76; not where other machines have ranks, too. To be called in the
    main thread: signals and the children's tie to us need it. Raises ConfigError where `run_dir` cannot be used,
    RunDirBusy where another run is at work in it.
    """
    assert threading.current_thread() is threading.main_thread(), "a child ends with the thread that started it"
    run_dir = torchrun.run_dir
    prepare(run_dir)
    # Every machine of a run has a supervisor; the folder is then held by its rank 0 alone.
    held = lock(run_dir, name=SUPERVISOR_LOCK) if torchrun.has_all_ranks else nullcontext()
    with held, _received_signals() as received:
        refuse_if_busy(run_dir)  # a run without a supervisor does not hold our lock
        if received:  # while this process began
            name = signal.Signals(received[0]).name
            end = Verdict(
                EXIT_STOPPED, f"stopped by {name} before any rank was started; there was nothing to save", None
            )
            clear_exit(run_dir)
            record_exit(run_dir, code=end.code, message=end.message, rank=None)
            _say(torchrun, f"ended with {_in_words(end)}")
            return end.code
        for attempt in range(restarts + 1):
            end = _attempt(torchrun, attempt=attempt, received=received)
            if end.code not in WORTH_A_RESTART or attempt == restarts or received:
                break
            _say(
                torchrun,
                f"start {attempt + 1} of {restarts + 1} ended with {_in_words(end)}; "
                "starting again from the newest valid checkpoint, or from the beginning where there is none",
            )
            time.sleep(BACK_OFF_SECONDS)
            if received:
                break
    if end.code != EXIT_DONE:
        _say(torchrun, f"ended with {_in_words(end)}")
    return end.code


def _attempt(torchrun: Torchrun, *, attempt: int, received: list[int]) -> Verdict:
    """One start of torchrun, to the end of its last process here; returns what exit.json says then."""
    run_dir = torchrun.run_dir
    clear_exit(run_dir)
    clear_heartbeats(run_dir)
    mark = secrets.token_hex(16)
    own = {ATTEMPT_VARIABLE: str(attempt), MARK_VARIABLE: mark}
    if torchrun.has_all_ranks:  # it names a start, and would name another one on each machine
        own[SUPERVISOR_VARIABLE] = str(os.getpid())
    # The tie to us must be made in the child before torchrun runs, and with its process id: a preexec_fn does that
    # without another interpreter's start. It is safe here, as this process has no other thread while it forks, and the
    # function only makes system calls. A session of its own keeps the terminal's ctrl-C from reaching torchrun twice.
    process = subprocess.Popen(
        torchrun.command,
        env={**torchrun.environment, **own},
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(tie_to, os.getpid()),
    )
    assert process.stderr is not None, "it was asked for as a pipe"
    account = Account(process.stderr, output=sys.stderr)
    reader = threading.Thread(target=account.read, daemon=True)
    reader.start()
    silence = _Silence(torchrun, attempt=attempt) if torchrun.has_all_ranks else None
    try:
        returncode = _wait(torchrun, process, mark=mark, received=received, silence=silence)
    finally:
        left = kill_marked(mark)
        reader.join(timeout=5)  # the pipe's last writer is gone by now
    with storage_errors(run_dir / TORCHRUN_LOG), (run_dir / TORCHRUN_LOG).open("a", encoding="utf-8") as log:
        log.writelines(account.own_lines)
    if left:
        message = f"processes {left} cannot be killed (they wait in the kernel); see to them before the next run"
        record_exit(run_dir, code=EXIT_PEER_LOST, message=message, rank=None, attempt=attempt)
        raise PeerLost(message)
    record = read_exit(run_dir)
    found = verdict(record, run_dir=run_dir, returncode=returncode, failures=account.failures, received=received)
    if found is None or (record is not None and hang_report.is_filed(run_dir)):
        assert record is not None, "only what the ranks wrote may stand as it is"
        return Verdict(record.code, record.message, record.rank)  # who reported a hang killed the silent ranks
    if torchrun.has_all_ranks:  # else it weighs nothing against ours, and stays where rank 0 still holds the folder
        clear_exit(run_dir)
    record = record_exit(run_dir, code=found.code, message=found.message, rank=found.rank, attempt=attempt)
    if record is None and torchrun.has_all_ranks:
        raise RunDirBusy(f"another run, without a supervisor, took {run_dir} first; wait for it, or stop it")
    return found


def _wait(
    torchrun: Torchrun, process: subprocess.Popen[bytes], *, mark: str, received: list[int], silence: _Silence | None
) -> int:
    """Waits for torchrun's end and returns its code; passes signals on, and ends ranks that outlive a failure."""
    asked = False
    linger_until: float | None = None
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # time to look around
        if len(received) > 1:
            kill_marked(mark)
        elif received and not asked:
            asked = True
            _say(torchrun, f"{signal.Signals(received[0]).name}: the ranks save and stop; once more kills them")
            _ask_to_stop(process, mark=mark)
        if linger_until is None:
            record = read_exit(torchrun.run_dir)
            if record is not None and record.code not in (EXIT_DONE, EXIT_STOPPED):
                linger_until = time.monotonic() + LINGER_SECONDS
        elif time.monotonic() > linger_until:
            kill_marked(mark)
        if linger_until is None and silence is not None and silence.lasts_too_long():
            silence.report(marked_processes(mark, parent=process.pid))
            kill_marked(mark)


def _ask_to_stop(process: subprocess.Popen[bytes], *, mark: str) -> None:
    """SIGTERM to the workers themselves: through torchrun a save would have 30 s. To torchrun while there are none."""
    workers = marked_processes(mark, parent=process.pid)
    for pid in workers or [process.pid]:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue  # it has just ended by itself


class _Silence:
    """Whether any rank still tells where it is; their watchdogs do so every second, whatever the training does."""

    def __init__(self, torchrun: Torchrun, *, attempt: int) -> None:
        self._torchrun, self._attempt = torchrun, attempt
        self._newest: float | None = None
        self._since = self._looked = time.monotonic()

    def lasts_too_long(self) -> bool:
        """To be asked again and again; time in which nobody asked, as this process was stopped, does not count."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return False
        if now - self._looked > SILENCE_SECONDS:
            self._since += now - self._looked
        self._looked = now
        beats = read_heartbeats(self._torchrun.run_dir).values()
        newest = max((beat.time for beat in beats), default=None)
        if newest != self._newest:
            self._newest, self._since = newest, now
        if newest is None:
            return now - self._since > max(BEGIN_SECONDS, self._torchrun.timeout_seconds)
        granted = HOLDING_SECONDS if any(beat.phase == HOLDING_PHASE for beat in beats) else 0.0
        return now - self._since > self._torchrun.timeout_seconds + SILENCE_SECONDS + granted

    def report(self, pids: Sequence[int]) -> None:
        """Asks the ranks for their stacks by signal, tells what they are at, and records 76."""
        run_dir, ranks, attempt = self._torchrun.run_dir, self._torchrun.ranks, self._attempt
        silent_seconds = time.monotonic() - self._since
        request = hang_report.new_request(rank=None, stalled_seconds=silent_seconds, attempt=attempt)
        if not hang_report.claim(run_dir, request, since=0.0):
            return  # a rank is at it after all
        hang_report.ask_by_signal(pids)
        answers = hang_report.gather(run_dir, request, ranks=ranks, local={})
        finding = hang_report.tell(run_dir, request, ranks=ranks, answers=answers, local={})
        _say(self._torchrun, finding.text)
        record_exit(run_dir, code=EXIT_PEER_LOST, message=finding.message, rank=finding.rank, attempt=attempt)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """The stop signals as they come in, in order, while the block runs."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if not received or number != signal.SIGHUP:  # a terminal that closes says so more than once
            received.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # held back since the process began
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _host_name_resolves() -> bool:
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return False
    return True


def _in_words(end: Verdict) -> str:
    return f"{end.code} ({EXIT_NAMES[end.code]}): {end.message}"


def _say(torchrun: Torchrun, text: str) -> None:
    print(f"megatron-xy {torchrun.verb}: {text}", file=sys.stderr, flush=True)
