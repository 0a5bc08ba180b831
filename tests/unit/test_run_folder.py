"""The run folder's small files: one run a folder, the cause of an end stands, nobody reads half a file."""

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy import storage
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.run_folder import (
    EXIT_NAMES,
    SUPERVISOR_LOCK,
    Beat,
    check_place,
    clear_exit,
    clear_heartbeats,
    exit_lock,
    lock,
    new_beat,
    prepare,
    read_exit,
    read_failure,
    read_heartbeats,
    record_exit,
    sweep_heartbeat,
    this_start,
    write_beat,
    write_env,
)
from megatron_xy.storage import temporary_name, write_json


def test_prepare_makes_the_folder_for_its_owner_only_and_finds_it_again(tmp_path):
    run_dir = tmp_path / "runs" / "one"
    prepare(run_dir)
    (run_dir / "logs" / "rank-00000.log").write_text("kept")
    prepare(run_dir)
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert {entry.name for entry in run_dir.iterdir()} == {"logs", "checkpoints", "report", "heartbeats"}
    assert (run_dir / "checkpoints").stat().st_mode & 0o777 == 0o700
    assert (run_dir / "logs" / "rank-00000.log").read_text() == "kept"


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/run"])  # /proc: read-only for root, too
def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir \(.*\) must be a folder that can be made and written: .*choose"):
        prepare(tmp_path / name)
    with pytest.raises(ConfigError, match=r"the work folder \(.*\) must be"):
        prepare(tmp_path / name, key="the work folder")


@pytest.mark.parametrize("use", [prepare, check_place, lambda folder: lock(folder).__enter__(), clear_exit])
def test_a_file_system_without_locks_is_refused_by_name(tmp_path, monkeypatch, use):
    def flock(_descriptor, _kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=rf"{tmp_path} must be on a file system that has locks \(flock\): .*-o flock"):
        use(tmp_path)


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path):
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ConfigError, match=rf"another run is active in {tmp_path} \(pid {holder.pid}, host \S+, since"
            ),
            lock(tmp_path),
        ):
            pytest.fail("two processes hold one folder")
        with lock(tmp_path, name=SUPERVISOR_LOCK):  # another lock of the same folder is free
            pass
        holder.kill()
        holder.wait()
        with lock(tmp_path):  # and a killed holder leaves nothing behind
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


_HOLD = """
import pathlib, sys
from megatron_xy.run_folder import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_programs_started_meanwhile_do_not_keep_the_lock(tmp_path):
    with lock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    with lock(tmp_path):
        assert child.poll() is None
    child.communicate()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(codes=st.lists(st.sampled_from(sorted(EXIT_NAMES)), min_size=1, max_size=6))
def test_the_cause_stands_in_whatever_order_ranks_end(tmp_path_factory, codes):
    run_dir = tmp_path_factory.mktemp("run")
    for rank, code in enumerate(codes):
        record_exit(run_dir, code=code, message=f"of rank {rank}", rank=rank)
    record = read_exit(run_dir)
    causes = [rank for rank, code in enumerate(codes) if code not in (0, 75, 76)]
    expected = causes[0] if causes else codes.index(max(codes))  # 76 over 75 over 0
    assert (record.rank, record.code, record.message) == (expected, codes[expected], f"of rank {expected}")
    assert record.name == EXIT_NAMES[record.code]


def test_of_equals_the_one_found_first_stands_though_it_took_long_to_tell(tmp_path):
    found = time.time()
    record_exit(tmp_path, code=76, message="the report failed", rank=1)
    record_exit(tmp_path, code=76, message="too late", rank=2, found=found + 10)
    assert read_exit(tmp_path).rank == 1
    record_exit(tmp_path, code=76, message="the report", rank=0, found=found - 10)
    assert read_exit(tmp_path).rank == 0


def test_ranks_that_end_at_the_same_time_leave_one_whole_record(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_XY_SUPERVISOR_PID", "1")  # processes of one start
    context = multiprocessing.get_context("fork")
    codes = [76, 75, 65, 0]
    ranks = [context.Process(target=_record_many, args=(tmp_path, code, rank)) for rank, code in enumerate(codes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0, 0, 0]
    assert (read_exit(tmp_path).code, read_exit(tmp_path).rank) == (65, 2)
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def _record_many(run_dir: Path, code: int, rank: int) -> None:
    for _ in range(10):
        record_exit(run_dir, code=code, message="", rank=rank)


def test_who_has_nothing_to_add_does_not_wait_for_others_that_record(tmp_path):
    cause = record_exit(tmp_path, code=65, message="the cause", rank=1)
    with exit_lock(tmp_path):
        assert record_exit(tmp_path, code=76, message="what followed", rank=2) == cause


def test_an_attempt_overrules_what_the_one_before_wrote(tmp_path, monkeypatch):
    record_exit(tmp_path, code=76, message="first", rank=0)
    monkeypatch.setenv("MEGATRON_XY_ATTEMPT", "1")
    assert record_exit(tmp_path, code=0, message="second", rank=0).attempt == 1
    assert read_exit(tmp_path).message == "second"


def test_a_cleared_or_missing_exit_is_none_and_a_damaged_one_is_named(tmp_path):
    assert read_exit(tmp_path) is None
    record_exit(tmp_path, code=70, message="", rank=0)
    clear_exit(tmp_path)
    clear_exit(tmp_path)
    assert read_exit(tmp_path) is None
    (tmp_path / "exit.json").write_text("{")
    with pytest.raises(DataError, match=r"exit\.json must be JSON"):
        read_exit(tmp_path)


def test_a_rank_0_that_nobody_cleared_it_for_keeps_what_its_own_start_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    record_exit(tmp_path, code=70, message="of this start", rank=1)
    clear_exit(tmp_path, began=time.time())
    assert read_exit(tmp_path) is not None
    clear_exit(tmp_path, began=time.time() + 10)  # an earlier torchrun at the same port
    assert read_exit(tmp_path) is None
    record_exit(tmp_path, code=70, message="of another start", rank=1)
    monkeypatch.setenv("MASTER_PORT", "29501")
    clear_exit(tmp_path, began=time.time())
    assert read_exit(tmp_path) is None


def test_only_a_failure_of_this_start_and_attempt_ends_the_other_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_XY_START", "slurm-7")
    began = time.time()
    assert read_failure(tmp_path, began=began) is None
    for code in (0, 75):  # of ranks that are done, while others still save
        record_exit(tmp_path, code=code, message="", rank=1)
        assert read_failure(tmp_path, began=began) is None
    failure = record_exit(tmp_path, code=76, message="", rank=1)
    assert read_failure(tmp_path, began=began) == failure
    for later in (2, 10):
        assert read_failure(tmp_path, began=began + later) is None, "of an earlier torchrun at the same port"
    monkeypatch.setenv("MEGATRON_XY_ATTEMPT", "1")
    assert read_failure(tmp_path, began=began) is None
    monkeypatch.setenv("MEGATRON_XY_ATTEMPT", "0")
    monkeypatch.setenv("MEGATRON_XY_START", "slurm-8")
    assert read_failure(tmp_path, began=began) is None


def test_a_requeued_job_is_the_same_start_wherever_its_ranks_meet(monkeypatch):
    monkeypatch.delenv("MEGATRON_XY_SUPERVISOR_PID", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MEGATRON_XY_START", "slurm-7")
    starts = set()
    for address in ("node01", "node02"):
        monkeypatch.setenv("MASTER_ADDR", address)
        starts.add(this_start())
    assert starts == {"slurm-7"}


def test_what_a_kill_left_of_a_ranks_heartbeat_goes_with_its_next_start(tmp_path):
    prepare(tmp_path)
    for rank in (1, 2):
        (tmp_path / "heartbeats" / temporary_name(f"rank-{rank:05d}.json")).write_text("{")
    sweep_heartbeat(tmp_path, 1)
    (left,) = (tmp_path / "heartbeats").iterdir()
    assert left.name.endswith("rank-00002.json")


def test_a_heartbeat_tells_iteration_phase_and_process(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_XY_ATTEMPT", "2")
    prepare(tmp_path)
    before = time.time()
    for rank in (3, 0):
        write_beat(
            tmp_path,
            new_beat(rank=rank, iteration=7, phase="backward", entered=3, entered_by_all=2, waits_for="rank 1"),
        )
    beats = read_heartbeats(tmp_path)
    assert list(beats) == [0, 3]
    told, moment = beats[3], beats[3].time
    expected = Beat(3, os.getpid(), told.host, this_start(), 2, 7, "backward", 3, 2, moment, moment, "rank 1")
    assert told == expected and before <= moment <= time.time()
    assert list(read_heartbeats(tmp_path, start=this_start(), attempt=2)) == [0, 3]
    assert read_heartbeats(tmp_path, start=this_start(), attempt=1) == {}
    (tmp_path / "heartbeats" / "rank-00001.json").write_text('{"rank": 1}')
    assert list(read_heartbeats(tmp_path)) == [0, 3], "what another version told is passed over"
    (tmp_path / "heartbeats" / "rank-00002.json").mkdir()
    assert list(read_heartbeats(tmp_path)) == [0, 3], "what cannot be read just now, too"
    (tmp_path / "heartbeats" / "rank-00002.json").rmdir()
    clear_heartbeats(tmp_path)
    assert read_heartbeats(tmp_path) == {}


def test_a_reader_never_meets_half_a_heartbeat(tmp_path):
    prepare(tmp_path)
    done = threading.Event()

    def write() -> None:
        for iteration in range(300):
            write_beat(tmp_path, new_beat(rank=0, iteration=iteration, phase="x" * (iteration * 37 % 5000)))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen |= {beat.iteration for beat in read_heartbeats(tmp_path).values()}
    writer.join()
    assert len(seen) > 1
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["rank-00000.json"]


def test_env_names_what_the_run_ran_on(tmp_path):
    write_env(tmp_path, extra={"world_size": 4})
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["python"] == sys.version.split()[0]
    assert {"torch", "megatron-core", "numpy"} <= set(environment["packages"])
    assert environment["argv"] == sys.argv and environment["world_size"] == 4
    assert environment["git_revision"] is None or len(environment["git_revision"]) >= 40


def test_writers_of_one_file_do_not_meet_whatever_their_process_ids(tmp_path, monkeypatch):
    """Containers that share a disk count their processes each for itself."""
    replace = storage.replace

    def after_another(temporary, path, *, durable):
        monkeypatch.setattr(storage, "replace", replace)
        write_json(path, "another's")
        replace(temporary, path, durable=durable)

    monkeypatch.setattr(storage, "replace", after_another)
    write_json(tmp_path / "a.json", "ours")
    assert (tmp_path / "a.json").read_text() == '"ours"\n'


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", [2, object()])
    assert (tmp_path / "a.json").read_text() == "1\n"
    with pytest.raises(StorageError, match=r"b\.json cannot be written: No such file"):
        write_json(tmp_path / "missing" / "b.json", 1)
    temporary = tmp_path / ".tmp-c.json"
    temporary.mkdir()  # what can be neither written nor removed, as on a read-only file system
    monkeypatch.setattr(storage, "temporary_name", lambda name: f".tmp-{name}")
    with pytest.raises(StorageError, match=r"c\.json cannot be written: Is a directory"):
        write_json(tmp_path / "c.json", 1)
    temporary.rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_contents_are_on_the_disk_before_the_name_and_the_name_before_a_write_returns(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, Path.replace

    def synced(descriptor):
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    def renamed(temporary, path):
        done.append("renamed")
        rename(temporary, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(storage, "temporary_name", lambda name: f".tmp-{name}")
    write_json(tmp_path / "a.json", 1)
    assert done == [tmp_path / ".tmp-a.json", "renamed", tmp_path]
    write_json(tmp_path / "a.json", 2, durable=False)
    assert done[3:] == ["renamed"]


def test_neither_module_imports_torch():
    code = "import sys, megatron_xy.runtime.supervise; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
