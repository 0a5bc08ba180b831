"""The report of a run that stands still: asked for by one process, answered by every rank that can, told once.

Through files in RUN/heartbeats, so that it reaches other machines and needs no collective: `hang.json` is the request,
`answer-00000.json` what a rank says of itself with its threads' stacks. The report lies in RUN/logs/hang-*.txt.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_xy.run_folder import Beat, current_attempt, exit_lock, read_heartbeats, this_start
from megatron_xy.run_folder.files import read_standing_json
from megatron_xy.runtime.liveness import SIGNS
from megatron_xy.runtime.orphans import process_state
from megatron_xy.storage import write_json, write_text

REQUEST = "hang.json"
STACKS_SIGNAL = signal.SIGUSR2  # a rank dumps its stacks into heartbeats/rank-00000.stacks, whatever it is doing
ANSWER_SECONDS = 6.0  # for all ranks to answer, or longer
ANSWERS_A_SECOND = 50  # where they are many: each is a file to be written and read on a shared file system
ASK_AGAIN_SECONDS = 2.0  # then those of this machine are asked by the signal
CLOCKS_APART_SECONDS = 5.0  # between machines
SHOWN_CALLS = 8  # of each stack, on the terminal
STATES = {
    "T": "its process is stopped (SIGSTOP, or a debugger)",
    "t": "its process is stopped (a debugger)",
    "D": "its process waits in the kernel, for a disk or a driver",
    "R": "its process runs, but not its interpreter",
    "S": "its process sleeps, and its interpreter with it",
    "Z": "its process has ended",
    "X": "its process has ended",
}


@dataclass(frozen=True)
class Request:
    """heartbeats/hang.json: who found that nothing moves, and since when; `silent` and `report` once it is told."""

    start: str
    attempt: int
    time: float  # Unix seconds
    rank: int | None  # None: the supervisor
    stalled_seconds: float
    silent: list[int]
    report: str | None = None


@dataclass(frozen=True)
class Answer:
    """heartbeats/answer-00000.json: where a rank is, and the stacks of its threads, the main one first."""

    request_time: float
    rank: int
    pid: int
    host: str
    iteration: int
    phase: str
    entered_by_all: int
    stalled_seconds: float
    waits_for: str | None
    stacks: dict[str, str]

    @property
    def main_stack(self) -> str:
        """Empty where there is none."""
        return next(iter(self.stacks.values()), "")


@dataclass(frozen=True)
class Finding:
    """What the report comes to."""

    rank: int | None  # the one that is named, if it is one
    silent: list[int]  # those that did not answer
    message: str  # for exit.json
    text: str  # for the terminal
    path: Path  # the whole report


def claim(run_dir: Path, request: Request, *, since: float) -> bool:
    """Files the request unless another process of this start has; whether this one is to report.

    since: as `read_request` has it; an earlier start on the same address, which hung too, may have left its own.
    """
    with exit_lock(run_dir):
        if read_request(run_dir, since=since, attempt=request.attempt) is not None:
            return False
        write_json(_folder(run_dir) / REQUEST, asdict(request), durable=False)
        return True


def withdraw(run_dir: Path) -> None:
    """Takes back the request that this process has filed: the run has gone on."""
    (_folder(run_dir) / REQUEST).unlink(missing_ok=True)


def is_filed(run_dir: Path) -> bool:
    """Whether there is a request of any start: for whoever cleared what earlier ones had left."""
    return (_folder(run_dir) / REQUEST).exists()


def read_request(run_dir: Path, *, since: float, attempt: int | None = None) -> Request | None:
    """The request of this start and attempt, if one was filed after `since` (Unix seconds: when this process began)."""
    wanted = (this_start(), current_attempt() if attempt is None else attempt)
    values = read_standing_json(_folder(run_dir) / REQUEST)
    if values is None:
        return None
    request = Request(**values)
    is_ours = (request.start, request.attempt) == wanted
    return request if is_ours and request.time > since - CLOCKS_APART_SECONDS else None


def new_request(*, rank: int | None, stalled_seconds: float, attempt: int | None = None) -> Request:
    """A request of this process, now; `attempt` is this process's own unless given."""
    attempt = current_attempt() if attempt is None else attempt
    return Request(this_start(), attempt, time.time(), rank, stalled_seconds, [])


def answer(run_dir: Path, request: Request, beat: Beat, *, stalled_seconds: float) -> None:
    """This rank's answer: where it is, and what its threads are at."""
    stacks = own_stacks()
    facts = Answer(
        request.time, beat.rank, beat.pid, beat.host, beat.iteration, beat.phase, beat.entered_by_all,
        stalled_seconds, beat.waits_for, stacks,
    )  # fmt: skip
    write_json(_folder(run_dir) / f"answer-{beat.rank:05d}.json", asdict(facts), durable=False)


def own_stacks() -> dict[str, str]:
    """{name of thread: its Python stack, innermost call last}, the main thread first, without the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main)
    stacks = {}
    for ident, frame in frames:
        if ident != threading.get_ident():
            name = "main thread" if ident == main else f"thread {names.get(ident, ident)}"
            waits = SIGNS.waits.get(ident)
            stacks[f"{name}, which waits for {waits}" if waits else name] = "".join(traceback.format_stack(frame))
    return stacks


def gather(run_dir: Path, request: Request, *, ranks: int, local: Mapping[int, int]) -> dict[int, Answer]:
    """The answers of `ranks` ranks as they come, answer_seconds(ranks) long; `local`: {rank: pid} on this machine."""
    began = time.monotonic()
    asked = False
    answers: dict[int, Answer] = {}
    while True:
        answers |= _new_answers(run_dir, request, known=answers)
        waited = time.monotonic() - began
        if len(answers) >= ranks or waited > answer_seconds(ranks):
            return answers
        if waited > ASK_AGAIN_SECONDS and not asked:
            asked = True
            ask_by_signal([pid for rank, pid in local.items() if rank not in answers])
        time.sleep(0.05)


def answer_seconds(ranks: int) -> float:
    """For how long one waits for the answers of `ranks` ranks; these wait twice as long for the report."""
    return max(ANSWER_SECONDS, ranks / ANSWERS_A_SECOND)


def ask_by_signal(pids: Sequence[int]) -> None:
    """Asks ranks of this machine for their stacks in a way that needs no working interpreter."""
    for pid in pids:
        try:
            os.kill(pid, STACKS_SIGNAL)
        except ProcessLookupError:
            continue  # gone: the report says so


def tell(
    run_dir: Path, request: Request, *, ranks: int, answers: Mapping[int, Answer], local: Mapping[int, int]
) -> Finding:
    """Writes the report and returns what it comes to."""
    beats = read_heartbeats(run_dir, start=request.start, attempt=request.attempt)
    silent = [rank for rank in range(ranks) if rank not in answers]
    named = silent or _standing(answers)
    lines = [_line(rank, answers.get(rank), beats.get(rank), local.get(rank)) for rank in range(ranks)]
    who = "; ".join(lines[rank] for rank in named[:3]) + (f"; {len(named) - 3} more" if len(named) > 3 else "")
    path = run_dir / "logs" / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    headline = f"nothing has gone forward for {request.stalled_seconds:.0f} s"
    message = f"{headline}: {who or 'the ranks wait for each other'}; stacks in {path}"
    title = f"=== {headline} (runtime.timeout_seconds): the run stands still and is ended ==="
    summary = [title, *(f"silent: {lines[rank]}" for rank in silent)]
    summary += [f"it hangs in: {lines[rank]}" for rank in named if rank not in silent]
    summary += [line for rank, line in enumerate(lines) if rank not in named]
    main_stacks = [
        f"--- rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: main thread ---\n{_inner(stack)}"
        for stack, ranks in _by_main_stack(answers).items()
    ]
    shown = [*summary, *main_stacks, f"=== stacks of all threads: {path} ==="]
    whole = [*summary, *_all_stacks(run_dir, answers, silent)]
    write_text(path, "\n".join(whole) + "\n")
    return Finding(named[0] if len(named) == 1 else None, silent, message, "\n".join(shown), path)


def close(run_dir: Path, request: Request, finding: Finding) -> None:
    """Says that the report is there: the ranks that have answered may leave."""
    closed = replace(request, silent=finding.silent, report=str(finding.path))
    write_json(_folder(run_dir) / REQUEST, asdict(closed), durable=False)


def _standing(answers: Mapping[int, Answer]) -> list[int]:
    """Of ranks that all answer those that hold the others up, as far as it can be told.

    Those that wait for nobody while others wait; of these the ones that lag behind; failing that, the only one whose
    main thread is elsewhere than all others (a GPU's ranks wait in the device's queue, not in a collective).
    """
    candidates = [rank for rank, told in answers.items() if told.waits_for is None]
    if len(candidates) in (0, len(answers)):
        candidates = list(answers)
    furthest = max(told.entered_by_all for told in answers.values())
    behind = [rank for rank in candidates if answers[rank].entered_by_all < furthest]
    if behind or len(candidates) < len(answers):
        return sorted(behind or candidates)
    if len(answers) == 1:
        return list(answers)
    places = _by_main_stack(answers)
    odd = [ranks[0] for ranks in places.values() if len(ranks) == 1]
    return odd if len(odd) == 1 and len(places) == 2 and len(answers) > 2 else []


def _line(rank: int, told: Answer | None, beat: Beat | None, pid: int | None) -> str:
    if told is not None:
        where = f"waits for {told.waits_for}" if told.waits_for else _innermost(told)
        return (
            f"rank {rank} (pid {told.pid}, {told.host}): iteration {told.iteration}, phase {told.phase}, "
            f"still for {told.stalled_seconds:.0f} s, {where}"
        )
    if beat is None:
        state = f": {_state(pid)}" if pid is not None else ""
        return f"rank {rank} does not answer and has never told where it is{state}"
    state = f"; {_state(beat.pid)}" if beat.host == socket.gethostname() else ""
    return (
        f"rank {rank} (pid {beat.pid}, {beat.host}) does not answer{state}; last seen at iteration {beat.iteration}, "
        f"phase {beat.phase}, {max(0.0, time.time() - beat.time):.0f} s ago"
    )


def _state(pid: int) -> str:
    return STATES.get(process_state(pid) or "X", "its state is unknown")


def _innermost(told: Answer) -> str:
    """The main thread's last line of Python, as `in FUNCTION, FILE:LINE`."""
    places = [line.strip() for line in told.main_stack.splitlines() if line.startswith("  File ")]
    if not places:
        return "without a stack"
    file, line, function = places[-1].split(", ", 2)
    return f"{function} ({file.removeprefix('File ').strip(chr(34))}:{line.removeprefix('line ')})"


def _by_main_stack(answers: Mapping[int, Answer]) -> dict[str, list[int]]:
    """{stack of the main thread: the ranks that have it}"""
    places: dict[str, list[int]] = {}
    for rank, told in sorted(answers.items()):
        places.setdefault(told.main_stack, []).append(rank)
    return places


def _inner(stack: str) -> str:
    """The innermost calls of a stack, for the terminal: the outer ones are the same in every run."""
    calls = re.split(r"^(?=  File )", stack.rstrip(), flags=re.MULTILINE)
    left_out = max(0, len(calls) - SHOWN_CALLS)
    return (f"  ... {left_out} outer calls\n" if left_out else "") + "".join(calls[left_out:])


def _all_stacks(run_dir: Path, answers: Mapping[int, Answer], silent: Sequence[int]) -> list[str]:
    sections = [
        f"\n--- rank {rank}, {thread} ---\n{stack.rstrip()}"
        for rank, told in sorted(answers.items())
        for thread, stack in told.stacks.items()
    ]
    for rank in silent:
        dump = stacks_path(run_dir, rank)
        text = dump.read_text(encoding="utf-8", errors="replace").rstrip() if dump.exists() else ""
        sections.append(f"\n--- rank {rank}, silent ---\n{text or 'no stacks: its process did not react'}")
    return sections


def stacks_path(run_dir: Path, rank: int) -> Path:
    """Where a rank dumps its stacks at STACKS_SIGNAL."""
    return _folder(run_dir) / f"rank-{rank:05d}.stacks"


def _new_answers(run_dir: Path, request: Request, *, known: Mapping[int, Answer]) -> dict[int, Answer]:
    answers = {}
    for path in sorted(_folder(run_dir).glob("answer-*.json")):
        if int(path.stem.removeprefix("answer-")) in known:
            continue
        try:
            told = Answer(**json.loads(path.read_text(encoding="utf-8")))
        except OSError:
            continue  # replaced while a file server was asked for it: the next look finds it
        if told.request_time == request.time:
            answers[told.rank] = told
    return answers


def _folder(run_dir: Path) -> Path:
    return run_dir / "heartbeats"
