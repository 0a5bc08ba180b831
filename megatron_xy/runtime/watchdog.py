"""The watchdog of one rank: a thread that tells where the rank is, and ends the run once nothing goes forward any more.

The training says its phases (`beat`) and its progress (`liveness`); the thread writes the heartbeats that other ranks,
the supervisor and `report` read. A rank that stands still may only be waiting for a slow one, so the run hangs when no
rank has gone forward for `timeout_seconds`. Then one rank reports for all (`hang_report`) and every process is ended
with 76, without any help from the main threads, which may be in a call that never comes back.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_xy import run_folder
from megatron_xy.errors import EXIT_PEER_LOST, MegatronXYError
from megatron_xy.runtime import hang_report, orphans
from megatron_xy.runtime.liveness import SIGNS
from megatron_xy.runtime.progress import PATIENCE, Progress
from megatron_xy.runtime.signals import StopRequest

END = "end"  # the phase of a rank that is about to leave by itself
WRITING_PHASES = ("save", "finish", "profile", END)
# In start-up, in the first time of every phase, in which kernels are compiled, and always in these, work that nobody
# counts is progress, too, for `PATIENCE` times `timeout_seconds`.
LOOSE_PHASES = (*WRITING_PHASES, "reward.function")
HOLDING_PHASE = "profile"  # holds the interpreter, so that for long its rank tells nothing, which is no hang yet:
HOLDING_SECONDS = 1200.0  # beyond `timeout_seconds`
BEATS_A_SECOND = 200  # of all ranks together, as each is a new file on a shared file system
LATE_SECONDS = 2.0  # a tick later than this shows that the process did not run; the time is not held against it
GONE_SECONDS = 5.0  # after which a rank that stands still looks whether another one has failed, or died beside it
LEAVE_SECONDS = 3.0  # for ranks that have answered to end by themselves
FIRST_RANKS = 4  # watch the others' heartbeats from early on; later ranks step in where these do not report
LOOKS_A_SECOND = 2000  # of all ranks together, for the report
# For reporting and ending, in small worlds; then the C library's exit, from a thread without an interpreter.
LAST_RESORT_SECONDS = 60.0
BACKEND_SECONDS = 3600.0


def backend_timeout(timeout_seconds: float) -> float:
    """Seconds after which a collective fails by itself: a last resort, since it cannot tell a slow peer from a hung
    one. The watchdog can, and ends the run long before."""
    return max(BACKEND_SECONDS, PATIENCE * timeout_seconds)


class Watchdog:
    """Tells where this rank is and watches over it until `close`.

    timeout_seconds: for how long no rank may go forward. stop: held back once the run is being ended.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, world_size: int, timeout_seconds: float, phase: str, stop: StopRequest
    ) -> None:
        self._run_dir, self._rank, self._world_size = run_dir, rank, world_size
        self._timeout, self._stop = timeout_seconds, stop
        self._began = time.time()
        self._place = (0, phase)
        self._first_iterations: dict[str, int] = {}  # {phase: the iteration in which it was entered first}
        self._entered = self._entered_by_all = 1
        self._tick = min(1.0, timeout_seconds / 10)
        self._beat_seconds = max(0.05, world_size / BEATS_A_SECOND)
        self._idle_beat_seconds = max(self._tick, self._beat_seconds)  # while it is where it last said
        self._last_beat = self._last_look_around = float("-inf")
        self._told_entered = 0
        self._fails = False  # whether the run folder refused the last look
        self._progress = Progress(timeout_seconds)
        self._others: dict[int, _Seen] = {}
        self._siblings: dict[int, int] | None = None  # of this machine, once all are there: {rank: process id}
        self._wake = threading.Event()
        self._closed = False
        self._leaving = False
        run_folder.sweep_heartbeat(run_dir, rank)
        self._stacks = hang_report.stacks_path(run_dir, rank).open("w", encoding="utf-8")
        faulthandler.register(hang_report.STACKS_SIGNAL, file=self._stacks, all_threads=True)
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, *, iteration: int, phase: str, of_all: bool = True) -> None:
        """The main thread has come to `phase` of `iteration` (0: before the first). Costs a few microseconds.

        of_all: every rank enters it; not so the work of a role that stands on some of them.
        """
        if (iteration, phase) == self._place:
            return
        if iteration:
            self._first_iterations.setdefault(phase, iteration)
        self._place = (iteration, phase)
        self._entered += 1
        self._entered_by_all += of_all
        self._wake.set()

    def tell(self) -> None:
        """Returns once the others can read the last beat, or the run folder fails: what follows may hold the
        interpreter."""
        while self._told_entered != self._entered and self._thread.is_alive() and not self._fails:
            time.sleep(0.01)

    def close(self, *, phase: str) -> None:
        """Tells the last phase and ends the watch. A rank that has just been found hanging does not return from it."""
        self.beat(iteration=self._place[0], phase=phase)
        self._closed = True
        self._wake.set()
        self._thread.join()
        faulthandler.unregister(hang_report.STACKS_SIGNAL)
        self._stacks.close()

    def await_report(self) -> None:
        """For a main thread whose collective failed: does not return if that is a sign of a hang being reported."""
        while self._thread.is_alive():
            if not self._leaving and hang_report.read_request(self._run_dir, since=self._began) is None:
                return
            self._thread.join(0.1)

    def _watch(self) -> None:
        expected = time.monotonic()
        while not self._closed:
            now = time.monotonic()
            if now - expected > LATE_SECONDS:
                self._progress.forgive(now - expected)
            self._try(partial(self._look, now))
            pause = (
                self._tick
                if self._fails or self._told_entered == self._entered
                else max(0.0, self._last_beat + self._beat_seconds - now)
            )
            expected = time.monotonic() + pause
            self._wake.wait(pause)
            self._wake.clear()
        self._try(self._tell)

    def _try(self, work: Callable[[], None]) -> None:
        """Where the run folder fails, as a file server's does for a while, that is said once; the watch goes on."""
        try:
            work()
            self._fails = False
        except (MegatronXYError, OSError) as error:
            if not self._fails:
                print(f"rank {self._rank}: the watchdog will try again: {error}", file=sys.stderr, flush=True)
            self._fails = True
            self._stay()

    def _look(self, now: float) -> None:
        iteration, phase = self._place
        is_first = iteration in (0, self._first_iterations.get(phase))
        self._progress.look(
            now,
            place=self._entered,
            counts_work=phase != "rendezvous" and (is_first or phase in LOOSE_PHASES),
            counts_disks=iteration == 0 or phase in WRITING_PHASES,
        )
        stalled = self._progress.stalled_seconds(now)
        if self._siblings is None and iteration:
            self._siblings = orphans.siblings()
        if stalled > self._tick:
            request = hang_report.read_request(self._run_dir, since=self._began)
            if request is not None:
                self._leave_with(request, stalled)
        limit = self._timeout + min(0.1 * self._rank, 10.0)  # one after the other, as only one is to report
        if stalled > (self._timeout / 2 if self._rank < FIRST_RANKS else limit):
            is_due = now - self._last_look_around >= max(self._tick, self._world_size / BEATS_A_SECOND)
            if is_due and min(stalled, self._others_stalled(now)) > limit:
                self._report(stalled)
        if stalled > GONE_SECONDS:
            self._look_for_a_failure()
            self._look_for_the_dead()
        has_moved = self._told_entered != self._entered
        if now - self._last_beat >= (self._beat_seconds if has_moved else self._idle_beat_seconds):
            self._tell()

    def _tell(self) -> None:
        now, entered = time.monotonic(), self._entered
        run_folder.write_beat(self._run_dir, self._own_beat(now))
        self._last_beat, self._told_entered = now, entered

    def _own_beat(self, now: float) -> run_folder.Beat:
        iteration, phase = self._place
        return run_folder.new_beat(
            rank=self._rank,
            iteration=iteration,
            phase=phase,
            entered=self._entered,
            entered_by_all=self._entered_by_all,
            progress_time=time.time() - self._progress.stalled_seconds(now),
            waits_for=self._waits_for(phase),
        )

    def _waits_for(self, phase: str) -> str | None:
        """What the main thread waits for; while it ends a save, also what the thread that writes waits for."""
        waits = dict(SIGNS.waits)
        main = waits.get(threading.main_thread().ident or 0)
        return main or (next(iter(waits.values()), None) if phase in ("save", "finish") else None)

    def _others_stalled(self, now: float) -> float:
        """Seconds since any other rank went forward, by their heartbeats; infinite where there is no other.

        Their clocks may differ from ours: what we see change has changed now at the earliest.
        """
        self._last_look_around = now
        for rank, beat in self._beats().items():
            if rank == self._rank or beat.time < self._began - self._timeout - hang_report.CLOCKS_APART_SECONDS:
                continue  # of an earlier start on the same address
            seen = self._others.get(rank)
            if seen is None or beat.progress_time > seen.progress_time + 0.01:
                age = time.time() - beat.progress_time if seen is None else 0.0
                seen = self._others[rank] = _Seen(beat.progress_time, now - max(0.0, age))
            seen.granted = HOLDING_SECONDS if beat.phase == HOLDING_PHASE else 0.0
        # Those seen before count, too, where a file server does not give their heartbeats now.
        return min((now - seen.seconds - seen.granted for seen in self._others.values()), default=float("inf"))

    def _beats(self) -> dict[int, run_folder.Beat]:
        start, attempt = run_folder.this_start(), run_folder.current_attempt()
        return run_folder.read_heartbeats(self._run_dir, start=start, attempt=attempt)

    def _report(self, stalled: float) -> None:
        """Reports for all ranks, if no other one does, and ends the run; not where it has gone on meanwhile."""
        places = self._places()
        request = hang_report.new_request(rank=self._rank, stalled_seconds=stalled)
        if not hang_report.claim(self._run_dir, request, since=self._began):
            return  # the next look finds the other one's request
        self._begin_to_leave()
        local = orphans.siblings()
        self._answer(request, stalled)
        answers = hang_report.gather(self._run_dir, request, ranks=self._world_size, local=local)
        if any(entered != places.get(rank, entered) for rank, entered in self._places().items()):
            hang_report.withdraw(self._run_dir)
            self._stay()
            return
        finding = hang_report.tell(self._run_dir, request, ranks=self._world_size, answers=answers, local=local)
        print(finding.text, file=sys.stderr, flush=True)
        self._record(finding.message, rank=finding.rank, found=request.time)
        for rank in finding.silent:
            _kill(local.get(rank))
        hang_report.close(self._run_dir, request, finding)  # the others leave when they see it
        deadline = time.monotonic() + LEAVE_SECONDS
        while (left := orphans.siblings()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left.values():
            _kill(pid)
        self._end()

    def _leave_with(self, request: hang_report.Request, stalled: float) -> None:
        """Answers another process's request, waits until that one has reported, and ends this rank; not where the
        request is withdrawn."""
        self._begin_to_leave()
        self._answer(request, stalled)
        deadline = time.monotonic() + 2 * hang_report.answer_seconds(self._world_size)
        while (told := hang_report.read_request(self._run_dir, since=self._began)) is not None:
            if told.time != request.time or told.report is not None or time.monotonic() > deadline:
                break
            if self._told_entered != self._entered:
                self._tell()
            time.sleep(max(0.05, self._world_size / LOOKS_A_SECOND))
        if told is None or told.time != request.time:
            self._stay()
            return
        outcome = "the report failed" if told.report is None else f"stacks in {told.report}"
        self._record(f"nothing has gone forward for {request.stalled_seconds:.0f} s; {outcome}", rank=None)
        local = orphans.siblings()
        for rank in told.silent:
            _kill(local.get(rank))
        self._end()

    def _places(self) -> dict[int, int]:
        """{rank: phases that it has entered}, as far as each has told; of this one as it is."""
        return {**{rank: beat.entered for rank, beat in self._beats().items()}, self._rank: self._entered}

    def _begin_to_leave(self) -> None:
        self._leaving = self._stop.is_deaf = True  # torchrun's SIGTERM, when the first rank is gone, ends no report
        seconds = max(LAST_RESORT_SECONDS, 4 * hang_report.answer_seconds(self._world_size))
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def _stay(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._leaving = self._stop.is_deaf = False

    def _answer(self, request: hang_report.Request, stalled: float) -> None:
        hang_report.answer(self._run_dir, request, self._own_beat(time.monotonic()), stalled_seconds=stalled)

    def _record(self, message: str, *, rank: int | None, found: float | None = None) -> None:
        """Before anybody leaves: what a main thread makes of its peer's end must not be the first to be recorded."""
        try:
            run_folder.record_exit(self._run_dir, code=EXIT_PEER_LOST, message=message, rank=rank, found=found)
        except (MegatronXYError, OSError):
            traceback.print_exc()

    def _end(self) -> None:
        sys.stderr.flush()
        os._exit(EXIT_PEER_LOST)

    def _look_for_a_failure(self) -> None:
        """Leaves if another rank has recorded one: on a GPU no collective says so before the backend's timeout."""
        failure = run_folder.read_failure(self._run_dir, began=self._began)
        if failure is not None and failure.rank != self._rank:
            self._begin_to_leave()
            said = f"{failure.code} ({failure.name}), recorded on {failure.host}: {failure.message}"
            print(f"rank {self._rank}: leaves, as the run has failed with {said}", file=sys.stderr, flush=True)
            self._end()

    def _look_for_the_dead(self) -> None:
        """Leaves if a rank of this machine has died, which no collective tells of either."""
        dead = [rank for rank, pid in (self._siblings or {}).items() if not orphans.is_running(pid)]
        beats = self._beats() if dead else {}
        lost = [beats[rank] for rank in dead if rank in beats and beats[rank].phase != END]
        if lost:
            self._begin_to_leave()
            place = f"last seen at iteration {lost[0].iteration} ({lost[0].phase})"
            self._record(f"rank {lost[0].rank} (pid {lost[0].pid}) is gone, {place}", rank=lost[0].rank)
            self._end()


@dataclass
class _Seen:
    """Another rank's progress: its own time of it, and when that was on our clock (time.monotonic())."""

    progress_time: float
    seconds: float
    granted: float = 0.0  # seconds more, where it holds the interpreter


def _kill(pid: int | None) -> None:
    """Ends a rank of this machine; None: it is none."""
    if pid is None:
        return
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it has just ended by itself
