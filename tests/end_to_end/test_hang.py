"""Runs that stand still, each in another way: one report that names the rank, every process gone, 76 in exit.json."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_xy.run_folder import read_exit, read_heartbeats
from tests.end_to_end.tiny_run import (
    Ended,
    live_rank_at,
    make_data,
    processes_naming,
    run_command,
    started,
    wait_for_end,
    wait_until,
    write_config,
)

TIMEOUT_SECONDS = 4
END_SECONDS = 150  # for start-up, timeout and report; a busy machine takes most of it to start
TWO_RANKS = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hang")
    write_config(folder / "tiny.yaml", data=make_data(folder))
    return folder / "tiny.yaml"


@pytest.fixture(autouse=True)
def _no_orphans(config):
    yield
    assert processes_naming(str(config)) == []


def options(run_dir: Path) -> list[str]:
    long = ["training.train_iters=5000", "checkpoint.save_interval=1000"]
    return [*TWO_RANKS, f"run_dir={run_dir}", f"runtime.timeout_seconds={TIMEOUT_SECONDS}", *long]


def torchrun(config: Path, *overrides: str, module: str = "megatron_xy") -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "-m", module, "pretrain", str(config), *overrides]


def faulty(config: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, fault: str, *overrides: str) -> Ended:
    """A bare torchrun with a fault planted (faulty_rank.py), to its end."""
    monkeypatch.setenv("FAULT", fault)
    command = torchrun(config, *options(run_dir), *overrides, module="tests.end_to_end.faulty_rank")
    with started(command) as process:
        return wait_for_end(process, seconds=END_SECONDS)


def the_report(ended: Ended, run_dir: Path) -> str:
    """The one report, which the terminal shows in short and RUN/logs holds whole."""
    assert ended.err.count("the run stands still and is ended ===") == 1, ended
    (path,) = (run_dir / "logs").glob("hang-*.txt")
    record = read_exit(run_dir)
    assert (record.code, record.name) == (76, "peer_lost") and str(path) in record.message, record
    assert not any(Path(f"/proc/{beat.pid}").exists() for beat in read_heartbeats(run_dir).values())
    return path.read_text()


@pytest.mark.parametrize("supervised", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_all_processes_are_gone_soon(config, tmp_path, supervised):
    run_dir = tmp_path / "run"
    command = run_command(config, *options(run_dir), ranks=2) if supervised else torchrun(config, *options(run_dir))
    with started(command) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=1, iteration=2), process=process, seconds=END_SECONDS)
        os.kill(live_rank_at(run_dir, rank=1, iteration=2), signal.SIGSTOP)
        stopped = time.monotonic()
        ended = wait_for_end(process, seconds=END_SECONDS)
    assert time.monotonic() - stopped < TIMEOUT_SECONDS + 30  # about 8 s on an idle machine
    assert ended.code == (76 if supervised else 1)
    report = the_report(ended, run_dir)
    pid = read_heartbeats(run_dir)[1].pid
    silent = rf"rank 1 \(pid {pid}, \S+\) does not answer; its process is stopped .* last seen at iteration \d+, phase "
    assert re.search(rf"^silent: {silent}", ended.err, re.MULTILINE)
    assert re.search(r"^rank 0 .* phase \w+, still for \d+ s, waits for a collective", report, re.MULTILINE)
    assert re.search(silent, read_exit(run_dir).message) and read_exit(run_dir).rank == 1


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("spin_for_ever", marks=pytest.mark.slow),
        pytest.param("wait_in_c", marks=pytest.mark.slow),
        "wait_in_c_with_the_interpreter",
    ],
)
def test_a_rank_that_stands_still_shows_where(config, tmp_path, monkeypatch, kind):
    """In Python; in C code that never comes back, as a hung GPU's calls do; and there with the interpreter's lock."""
    ended = faulty(config, tmp_path / "run", monkeypatch, f"1:step:3:{kind}")
    report = the_report(ended, tmp_path / "run")
    record = read_exit(tmp_path / "run")
    assert record.rank == 1 and "rank 1 (pid " in record.message and "iteration 3" in record.message, record
    assert f"in {kind}" in report, report
    if kind != "wait_in_c_with_the_interpreter":
        assert re.search(rf"^it hangs in: rank 1 .* iteration 3, phase step, .* in {kind} \(", ended.err, re.MULTILINE)


@pytest.mark.slow
def test_a_hung_data_loader_is_named_by_its_phase(config, tmp_path, monkeypatch):
    ended = faulty(config, tmp_path / "run", monkeypatch, "0:step:3:block_the_data")
    report = the_report(ended, tmp_path / "run")
    assert read_exit(tmp_path / "run").rank == 0 and ", phase data, " in read_exit(tmp_path / "run").message
    assert "in sleep_for_ever" in report, "the thread that reads ahead shows where"


@pytest.mark.slow
def test_a_hung_evaluation_is_found_as_soon_as_a_hung_step(config, tmp_path, monkeypatch):
    """But for the first one, which may compile; a rank that spins is at work only where nobody counts its work."""
    evaluated = [f"data.eval_path={config.parent / 'data'}", "training.eval_interval=2"]
    ended = faulty(config, tmp_path / "run", monkeypatch, "1:evaluate:4:spin_for_ever", *evaluated)
    the_report(ended, tmp_path / "run")
    message = read_exit(tmp_path / "run").message
    assert "iteration 4, phase evaluate" in message and "in spin_for_ever" in ended.err
    assert float(re.search(r"nothing has gone forward for (\d+) s", message)[1]) < 3 * TIMEOUT_SECONDS


def test_a_hung_save_is_named(config, tmp_path, monkeypatch):
    """Rank 1 writes to a pipe that nobody reads; rank 0 waits for its part, and not in a collective."""
    ended = faulty(config, tmp_path / "run", monkeypatch, "1:save:3:block_the_save", "checkpoint.save_interval=3")
    report = the_report(ended, tmp_path / "run")
    assert read_exit(tmp_path / "run").rank == 1, read_exit(tmp_path / "run")
    assert "rank 1's part of the checkpoint" in report and "in blocked" in report


@pytest.mark.slow
def test_a_slow_save_is_no_hang(config, tmp_path, monkeypatch):
    """It takes twice the timeout; the other rank waits for it all the while."""
    overrides = ["training.train_iters=3", "checkpoint.save_interval=3"]
    monkeypatch.setenv("FAULT_SECONDS", str(2.0 * TIMEOUT_SECONDS))
    ended = faulty(config, tmp_path / "run", monkeypatch, "1:save:3:slow_save", *overrides)
    assert ended.code == 0, ended
    assert (tmp_path / "run" / "checkpoints" / "iter_0000003" / "manifest.json").is_file()


@pytest.mark.parametrize("window", ["2:4", pytest.param("2:999", marks=pytest.mark.slow)])
def test_a_trace_that_takes_long_to_write_is_no_hang(config, tmp_path, monkeypatch, window):
    """Its rank tells nothing meanwhile; the other one waits for it, also where the window outlasts the run."""
    monkeypatch.setenv("FAULT_SECONDS", str(2.5 * TIMEOUT_SECONDS))
    run_dir, overrides = tmp_path / "run", ["training.train_iters=5", f"runtime.profile={window}"]
    ended = faulty(config, run_dir, monkeypatch, "0:step:1:slow_profile", *overrides)
    assert ended.code == 0, ended
    assert ended.out.count(f"profile written to {run_dir}/profile\n") == 1
    assert [path.name for path in (run_dir / "profile").iterdir()] == ["rank-00000.json"]


def test_a_rank_missing_at_the_rendezvous_is_named(config, tmp_path, monkeypatch):
    ended = faulty(config, tmp_path / "run", monkeypatch, "1:rendezvous:0:sleep_for_ever")
    the_report(ended, tmp_path / "run")
    record = read_exit(tmp_path / "run")
    assert "rank 1 (pid " in record.message and "phase rendezvous" in record.message
    assert "in sleep_for_ever" in ended.err


@pytest.mark.slow
def test_ranks_that_are_all_stopped_are_found_by_the_supervisor(config, tmp_path):
    run_dir = tmp_path / "run"
    with started(run_command(config, *options(run_dir), ranks=2)) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=1, iteration=2), process=process, seconds=END_SECONDS)
        for beat in read_heartbeats(run_dir).values():
            os.kill(beat.pid, signal.SIGSTOP)
        ended = wait_for_end(process, seconds=END_SECONDS)
    assert ended.code == 76 and ended.err.count("does not answer; its process is stopped") >= 2, ended


def test_a_slow_rank_is_named_within_20_steps_and_the_run_goes_on(config, tmp_path, monkeypatch):
    """The others wait for it in every layer, so all steps take as long; only its busy time gives it away."""
    monkeypatch.setenv("FAULT_SECONDS", "0.05")
    ended = faulty(config, tmp_path / "run", monkeypatch, "1:step:3:slow_down", "training.train_iters=24")
    assert ended.code == 0, ended
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    named = [event for event in events if "straggler" in event]
    assert [event["straggler"] for event in named] == [1], ended
    assert 3 < named[0]["iteration"] <= 23 and named[0]["factor"] > 2
    assert ended.out.count("rank 1 is slow: ") == 1 and "rank 0 is slow" not in ended.out
