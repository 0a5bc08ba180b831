"""One rank's watchdog: a report that is taken back, as the run has gone on; a run folder that fails for a while."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_xy.run_folder import new_beat, prepare, read_exit, read_heartbeats, write_beat
from megatron_xy.runtime import hang_report
from megatron_xy.runtime.progress import WORK_BYTES, Work
from megatron_xy.runtime.watchdog import HOLDING_PHASE, Watchdog

TIMEOUT_SECONDS = 0.5


@pytest.fixture
def watchdog(tmp_path, monkeypatch):
    """Of rank 0 of two, which stands still from the beginning on."""
    monkeypatch.setattr(hang_report, "ANSWER_SECONDS", 60.0)  # a report that is made would end this process
    prepare(tmp_path)
    stop = SimpleNamespace(is_deaf=False)
    own = Watchdog(tmp_path, rank=0, world_size=2, timeout_seconds=TIMEOUT_SECONDS, phase="rendezvous", stop=stop)
    yield own
    own.close(phase="end")


def come_to_hold(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_phase_of_some_ranks_alone_is_told_and_not_counted_with_those_of_all(tmp_path, watchdog):
    watchdog.beat(iteration=1, phase="update")
    watchdog.beat(iteration=1, phase="actor.update", of_all=False)
    watchdog.tell()
    beat = read_heartbeats(tmp_path)[0]
    assert (beat.phase, beat.entered, beat.entered_by_all) == ("actor.update", 3, 2)


def test_what_the_machines_disks_do_is_progress_where_this_process_may_wait_for_them():
    before, after = Work(0.0, 0, 0), Work(0.0, 0, WORK_BYTES + 1)
    assert after.is_work_since(before, timeout_seconds=1.0, counts_disks=True)
    assert not after.is_work_since(before, timeout_seconds=1.0, counts_disks=False)


def tell_of_rank_1(run_dir: Path, *, entered: int, phase: str = "step") -> None:
    write_beat(run_dir, new_beat(rank=1, iteration=3, phase=phase, entered=entered))


def test_a_rank_that_was_seen_to_go_on_counts_while_its_heartbeat_cannot_be_read(tmp_path, watchdog, monkeypatch):
    tell_of_rank_1(tmp_path, entered=5)
    assert watchdog._others_stalled(time.monotonic()) < 60
    monkeypatch.setattr(watchdog, "_beats", dict)
    assert watchdog._others_stalled(time.monotonic()) < 60


@pytest.mark.parametrize("who", ["the one that reports", "the other one"])
def test_a_rank_that_goes_on_while_answers_are_gathered_ends_the_report(watchdog, tmp_path, who):
    tell_of_rank_1(tmp_path, entered=5)
    request = tmp_path / "heartbeats" / hang_report.REQUEST
    come_to_hold(request.exists)
    asked = hang_report.read_request(tmp_path, since=0.0)
    if who == "the other one":
        tell_of_rank_1(tmp_path, entered=6)
    else:
        watchdog.beat(iteration=0, phase="weights")
    hang_report.answer(tmp_path, asked, read_heartbeats(tmp_path)[1], stalled_seconds=1.0)
    come_to_hold(lambda: not request.exists())
    watchdog.beat(iteration=1, phase="data")
    watchdog.tell()
    assert read_heartbeats(tmp_path)[0].phase == "data" and not list((tmp_path / "logs").glob("hang-*"))


def test_a_rank_that_has_answered_goes_on_where_the_request_is_withdrawn(watchdog, tmp_path):
    tell_of_rank_1(tmp_path, entered=5, phase=HOLDING_PHASE)  # so that rank 0 does not report
    request = hang_report.new_request(rank=1, stalled_seconds=1.0)
    assert hang_report.claim(tmp_path, request, since=0.0)
    come_to_hold((tmp_path / "heartbeats" / "answer-00000.json").exists)
    watchdog.beat(iteration=1, phase="data")
    come_to_hold(lambda: read_heartbeats(tmp_path)[0].phase == "data")  # for the one that reports to see
    hang_report.withdraw(tmp_path)
    watchdog.beat(iteration=1, phase="step")
    watchdog.tell()
    assert read_heartbeats(tmp_path)[0].phase == "step"


def test_a_run_folder_that_failed_for_a_while_does_not_end_the_watch(tmp_path):
    """It is said once; a standstill afterwards is found and ended."""
    ended = ended_by_its_watchdog(_LOSE_THE_FOLDER, tmp_path)
    assert ended.stderr.count("rank 0: the watchdog will try again: ") == 1, ended
    assert "iteration 2, phase step" in read_exit(tmp_path).message


def ended_by_its_watchdog(script: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    prepare(run_dir)
    command = [sys.executable, "-c", script, str(run_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 76, ended
    return ended


_LOSE_THE_FOLDER = """
import pathlib, sys, time, types
from megatron_xy.runtime.watchdog import Watchdog
run_dir = pathlib.Path(sys.argv[1])
stop = types.SimpleNamespace(is_deaf=False)
watchdog = Watchdog(run_dir, rank=0, world_size=1, timeout_seconds=0.5, phase="import", stop=stop)
(run_dir / "heartbeats").rename(run_dir / "elsewhere")
watchdog.beat(iteration=1, phase="step")
watchdog.tell()
time.sleep(0.2)
(run_dir / "elsewhere").rename(run_dir / "heartbeats")
watchdog.beat(iteration=2, phase="step")
time.sleep(30)
"""


def test_a_rank_that_stands_still_leaves_where_one_of_another_machine_has_failed(tmp_path):
    ended = ended_by_its_watchdog(_STAND_STILL, tmp_path)
    assert re.match(
        r"rank 0: leaves, as the run has failed with 65 \(bad_data\), recorded on \S+: no such shard\n", ended.stderr
    )
    assert read_exit(tmp_path).rank == 9


_STAND_STILL = """
import pathlib, sys, time, types
from megatron_xy.run_folder import record_exit
from megatron_xy.runtime import watchdog
watchdog.GONE_SECONDS = 0.1
stop = types.SimpleNamespace(is_deaf=False)
run_dir = pathlib.Path(sys.argv[1])
watchdog.Watchdog(run_dir, rank=0, world_size=16, timeout_seconds=60, phase="step", stop=stop)
record_exit(run_dir, code=65, message="no such shard", rank=9)
time.sleep(30)
"""
