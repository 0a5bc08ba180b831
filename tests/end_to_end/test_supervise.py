"""`megatron-xy run` over the real torchrun, with workers that do one thing each (worker_module.py)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_xy.errors import ConfigError
from megatron_xy.run_folder import RunDirBusy, new_beat, prepare, read_exit, read_heartbeats, write_beat
from megatron_xy.runtime import supervise as supervise_module
from megatron_xy.runtime.orphans import MARK_VARIABLE, is_running
from megatron_xy.runtime.signals import STOP_SIGNALS
from megatron_xy.runtime.supervise import supervise
from megatron_xy.runtime.verdict import Verdict


@pytest.fixture(autouse=True)
def _worker_module_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def run(run_dir: Path, behaviour: str, **options: int) -> int:
    return supervise(
        f"{run_dir}/./run.yaml",
        task="pretrain",
        run_dir=run_dir,
        nproc_per_node=2,
        overrides=[f"behaviour={behaviour}", "model.x=a b; $(c)"],
        module="worker_module",
        **options,
    )


def test_a_clean_run_gives_0_and_leaves_no_process(tmp_path, capfd):
    assert run(tmp_path, "clean", num_threads=3) == 0
    shown = json.loads((tmp_path / "shown-1.json").read_text())
    assert shown["argv"] == ["pretrain", f"{tmp_path}/./run.yaml", "behaviour=clean", "model.x=a b; $(c)"]
    assert shown["threads"] == "3"
    assert not is_running(shown["left_behind"])
    assert (read_exit(tmp_path).code, read_exit(tmp_path).attempt) == (0, 0)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["rank 0 speaks", "rank 1 speaks"]
    assert err == ""
    assert (tmp_path / ".supervisor.lock").exists()


def test_bad_data_is_not_tried_again(tmp_path, capfd):
    assert run(tmp_path, "bad_data", restarts=1) == 65
    record = read_exit(tmp_path)
    assert (record.code, record.rank, record.attempt) == (65, 1, 0)
    assert capfd.readouterr().err == "megatron-xy run: ended with 65 (bad_data): shard_00000.bin is cut\n"
    assert "ChildFailedError" in (tmp_path / "logs" / "torchrun.log").read_text()


def test_a_killed_rank_is_named(tmp_path, capfd):
    assert run(tmp_path, "killed_once") == 76
    record = read_exit(tmp_path)
    assert (record.code, record.name, record.rank) == (76, "peer_lost", 1)
    pid = read_heartbeats(tmp_path)[1].pid
    assert record.message == (
        f"rank 1 (pid {pid}) was killed by SIGKILL at iteration 12 (train); the kernel does that when memory runs out "
        "(dmesg tells); rank 0 said: connection closed by peer"
    )
    assert capfd.readouterr().err == f"megatron-xy run: ended with 76 (peer_lost): {record.message}\n"


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (65, 1), (70, 1), (74, 3), (75, 1), (76, 3), (78, 1)])
def test_what_another_try_may_not_meet_again_is_worth_a_restart(tmp_path, monkeypatch, code, starts):
    attempts = []

    def ended(torchrun, *, attempt, received):
        attempts.append(attempt)
        return Verdict(code, "as told", None)

    monkeypatch.setattr(supervise_module, "_attempt", ended)
    monkeypatch.setattr(supervise_module, "BACK_OFF_SECONDS", 0.0)
    torchrun = supervise_module.Torchrun(
        command=[], environment={}, verb="run", run_dir=tmp_path / "run", ranks=1, timeout_seconds=1.0
    )
    assert supervise_module.run_to_end(torchrun, restarts=2) == code
    assert attempts == list(range(starts))


def test_a_killed_rank_is_worth_a_restart(tmp_path, capfd):
    assert run(tmp_path, "killed_once", restarts=1) == 0
    assert (read_exit(tmp_path).code, read_exit(tmp_path).attempt) == (0, 1)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(r"start 1 of 2 ended with 76 .* SIGKILL .* starting again from the newest valid checkpoint", line)


def test_a_rank_killed_before_the_first_step_is_lost_though_its_peers_say_stopped(tmp_path, capfd):
    assert run(tmp_path, "killed_at_start", restarts=1) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(r"start 1 of 2 ended with 76 \(peer_lost\): rank 1 \(pid \d+\) was killed by SIGKILL;", line)


def test_a_run_without_a_supervisor_keeps_its_folder(tmp_path):
    """The supervisor neither starts there nor clears what that run's ranks have written."""
    prepare(tmp_path)
    write_beat(tmp_path, new_beat(rank=0, iteration=3, phase="step"))
    code = (
        "import pathlib, sys; from megatron_xy.run_folder import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirBusy, match=rf"another run is active in {tmp_path} \(pid {holder.pid}, "):
            run(tmp_path, "clean")
        holder.communicate()
    assert read_heartbeats(tmp_path)[0].iteration == 3 and read_exit(tmp_path) is None


def test_an_exception_that_nobody_recorded_is_a_bug_and_its_traceback_is_shown(tmp_path, capfd):
    assert run(tmp_path, "crash", restarts=1) == 70
    assert read_exit(tmp_path).rank == 0
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1 and "RuntimeError: no such luck" in err


def test_ranks_that_outlive_a_failure_are_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise_module, "LINGER_SECONDS", 0.5)
    assert run(tmp_path, "lingering") == 70
    assert read_exit(tmp_path).message == "an assert of ours"


@pytest.mark.parametrize("number", set(STOP_SIGNALS) - {signal.SIGTERM})
def test_a_signal_stops_all_ranks_cleanly(tmp_path, number):
    with supervisor(tmp_path, "stoppable") as process:
        wait_until(lambda: len(read_heartbeats(tmp_path)) == 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert read_exit(tmp_path).message == "saved at iteration 12"
    assert err.splitlines() == [
        f"megatron-xy run: {number.name}: the ranks save and stop; once more kills them",
        "megatron-xy run: ended with 75 (stopped): saved at iteration 12",
    ]


def test_a_second_signal_kills(tmp_path):
    with supervisor(tmp_path, "stubborn", restarts=1) as process:
        wait_until(lambda: len(read_heartbeats(tmp_path)) == 2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 76
    assert read_exit(tmp_path).message == "killed on a second signal, before the ranks had saved"
    assert not any(is_running(beat.pid) for beat in read_heartbeats(tmp_path).values())


def test_a_signal_before_the_ranks_have_begun_is_a_clean_stop(tmp_path):
    with supervisor(tmp_path, "early") as process:
        wait_until(lambda: (tmp_path / "begun-0").exists() and (tmp_path / "begun-1").exists())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75
    assert read_exit(tmp_path).name == "stopped"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_the_command_itself_begins_is_a_clean_stop(tmp_path, number):
    """`megatron-xy` holds the signals back from its first line on; the supervisor finds them waiting."""
    code = (
        "import os, sys; import test_supervise as t; from megatron_xy.runtime import signals\n"
        "signals.block_stop_signals()\n"
        "os.kill(os.getpid(), int(sys.argv[2])); sys.exit(t.run(t.Path(sys.argv[1]), 'clean'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 75, ended
    assert read_exit(tmp_path).message.startswith(f"stopped by {number.name} before any rank was started")
    assert read_heartbeats(tmp_path) == {} and not (tmp_path / "shown-1.json").exists()


def test_one_supervisor_a_folder_and_nothing_outlives_it(tmp_path):
    with supervisor(tmp_path, "stubborn") as process:
        wait_until(lambda: len(read_heartbeats(tmp_path)) == 2)
        with pytest.raises(ConfigError, match=rf"another run is active in {tmp_path} \(pid {process.pid}, "):
            run(tmp_path, "clean")
        workers = [beat.pid for beat in read_heartbeats(tmp_path).values()]
        marks = {variable for pid in workers for variable in environment_of(pid) if variable.startswith(MARK_VARIABLE)}
        (mark,) = marks
        assert len(processes_with(mark)) == 3  # torchrun and its two workers
        process.kill()
        process.wait()
        wait_until(lambda: processes_with(mark) == [], seconds=10)


@contextmanager
def supervisor(run_dir: Path, behaviour: str, *, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """`supervise` in a process of its own, which signals can be sent to."""
    code = (
        "import sys, test_supervise as t; sys.exit(t.run(t.Path(sys.argv[1]), sys.argv[2], restarts=int(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(run_dir), behaviour, str(restarts)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(holds: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.05)


def processes_with(variable: str) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if variable in environment_of(pid)]


def environment_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []
