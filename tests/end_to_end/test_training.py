"""Training as a user runs it, `megatron-xy run RUN.yaml`: killed, stopped, damaged and misled, against an unbroken run.

The unbroken run is made once; the tests of damage go on from copies of its folder, with one rank instead of four.
"""

import contextlib
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from megatron_xy.run_folder import SUPERVISOR_LOCK, lock, read_exit, read_heartbeats, record_exit
from tests.end_to_end.tiny_run import (
    BUCKETS,
    ONE_RANK,
    SAVE_INTERVAL,
    TRAIN_ITERS,
    VOCAB_SIZE,
    Ended,
    copy_run,
    flip_bit,
    hash_of,
    live_rank_at,
    make_data,
    metrics_of,
    processes_naming,
    run_command,
    run_to_end,
    started,
    torchrun_command,
    wait_for_end,
    wait_until,
    without_clock,
    write_config,
)

METRICS = {
    "iteration", "data_step", "bucket", "loss", "loss_by_source", "num_loss_tokens", "grad_norm", "lr",
    "consumed_samples", "consumed_tokens", "padding_ratio", "step_seconds", "data_wait_seconds", "tokens_per_second",
    "mfu", "hfu", "skipped",
}  # fmt: skip
LAST = f"iter_{TRAIN_ITERS:07d}"
BEFORE_LAST = f"iter_{TRAIN_ITERS - SAVE_INTERVAL:07d}"
SHARD = "rank-00001-of-00004.safetensors"


@dataclass(frozen=True)
class Job:
    """What all runs of this file share."""

    config: Path
    data: Path


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    data = make_data(folder)
    write_config(folder / "tiny.yaml", data=data)
    return Job(folder / "tiny.yaml", data)


@pytest.fixture(autouse=True)
def _no_orphans(job):
    yield
    assert processes_naming(str(job.config)) == []


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory):
    """(run folder, how it ended) of a run that nothing disturbs, with checkpoints written while training goes on."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    ended = run_to_end(run_command(job.config, f"run_dir={run_dir}", "checkpoint.async_save=true", ranks=4))
    assert ended.code == 0, ended
    return run_dir, ended


def test_an_unbroken_run_leaves_all_its_files(job, unbroken):
    run_dir, ended = unbroken
    assert ended.err == ""
    assert (read_exit(run_dir).code, read_exit(run_dir).message) == (0, "done")
    records = metrics_of(run_dir)
    assert [record["iteration"] for record in records] == list(range(1, TRAIN_ITERS + 1))
    for record in records:
        assert set(record) >= METRICS
        numbers = [value for value in record.values() if isinstance(value, int | float)]
        numbers += record["loss_by_source"].values()
        assert len(numbers) >= len(METRICS) and all(map(math.isfinite, numbers))
        assert not record["skipped"]
    assert len({record["bucket"] for record in records}) > 1
    assert {source for record in records for source in record["loss_by_source"]} == {"code", "prose"}
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert records[-1]["consumed_tokens"] == TRAIN_ITERS * 1024
    beats = read_heartbeats(run_dir)
    assert list(beats) == [0, 1, 2, 3] and {beat.iteration for beat in beats.values()} == {TRAIN_ITERS}
    assert f"train_iters: {TRAIN_ITERS}\n" in (run_dir / "run.yaml").read_text()
    environment = json.loads((run_dir / "env.json").read_text())
    assert environment["world_size"] == 4 and environment["packages"]["megatron-core"]
    logs = {path.name for path in (run_dir / "logs").glob("rank-*.log")}
    assert logs == {f"rank-{rank:05d}.log" for rank in range(4)}
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {BEFORE_LAST, LAST}
    assert list(run_dir.rglob(".tmp-*")) == []


def test_the_terminal_shows_phases_steps_and_checkpoints_once(unbroken):
    _, ended = unbroken
    for phase in ("import", "rendezvous", "model and optimizer", "data", "weights", "first step"):
        assert len(re.findall(rf"^  {phase} +\d+\.\d s$", ended.out, re.MULTILINE)) == 1, phase
    for iteration in range(1, TRAIN_ITERS + 1):
        step = rf"^step +{iteration}/{TRAIN_ITERS} \| bucket +\d+ \| loss +\d\.\d+ \|.* tokens/s \|.* ETA \d+s$"
        assert len(re.findall(step, ended.out, re.MULTILINE)) == 1, iteration
    for state in (r"scheduled$", r"written: [\d.,]+ MB in [\d.]+ s \(training held for [\d.]+ s\)$"):
        found = re.findall(rf"^checkpoint of step \d+ {state}", ended.out, flags=re.MULTILINE)
        assert len(found) == TRAIN_ITERS // SAVE_INTERVAL, found
    assert ended.out.splitlines()[-1] == f"done: {TRAIN_ITERS} iterations, last checkpoint at iteration {TRAIN_ITERS}"


def test_stopped_then_killed_then_restarted_equals_the_unbroken_run_bit_for_bit(job, unbroken, tmp_path):
    run_dir = tmp_path / "broken"
    options = [f"run_dir={run_dir}", "checkpoint.async_save=false"]
    command = run_command(job.config, *options, ranks=4)

    with started(command) as process:
        lock_file = run_dir / SUPERVISOR_LOCK
        wait_until(lambda: lock_file.exists() and lock_file.read_text(), process=process)
        second = run_to_end(command)
        assert second.code == 78
        assert f"another run is active in {run_dir} (pid {process.pid}, " in " ".join(second.err.split())
        bad = run_to_end([*command, "model.hidden_size=33"])
        assert bad.code == 78 and "must be a multiple of num_attention_heads" in " ".join(bad.err.split())
        assert read_exit(run_dir) is None, "neither may speak for the run that is active"
        wait_until(lambda: live_rank_at(run_dir, rank=2, iteration=2), process=process)
        process.send_signal(signal.SIGTERM)
        ended = wait_for_end(process)
    assert ended.code == 75
    record = read_exit(run_dir)
    stopped_at = int(re.fullmatch(r"stopped on request after step (\d+), state saved; .*", record.message)[1])
    assert (record.code, record.name) == (75, "stopped") and 2 <= stopped_at < TRAIN_ITERS
    assert (run_dir / "checkpoints" / f"iter_{stopped_at:07d}" / "manifest.json").is_file()
    assert {beat.iteration for beat in read_heartbeats(run_dir).values()} == {stopped_at}
    assert ended.err.splitlines() == [
        "megatron-xy run: SIGTERM: the ranks save and stop; once more kills them",
        f"megatron-xy run: ended with 75 (stopped): {record.message}",
    ]

    with started(command) as process:
        ended = _kill_rank(process, run_dir, rank=1, iteration=max(stopped_at, SAVE_INTERVAL) + 2)
    assert ended.code == 76
    assert f"resuming from {run_dir}/checkpoints/iter_{stopped_at:07d}" in ended.out
    record = read_exit(run_dir)
    assert (record.code, record.name, record.rank) == (76, "peer_lost", 1)
    assert ended.err.count(f"ended with 76 (peer_lost): {record.message}\n") == 1
    assert "Traceback" not in ended.err and len(ended.err.splitlines()) <= 4, ended.err

    with started(run_command(job.config, *options, ranks=4, restarts=1)) as process:
        ended = _kill_rank(process, run_dir, rank=2, iteration=TRAIN_ITERS - 5)
    assert ended.code == 0, ended
    assert (read_exit(run_dir).code, read_exit(run_dir).attempt) == (0, 1)
    assert "start 1 of 2 ended with 76 (peer_lost): rank 2 (pid " in ended.err
    assert "Traceback" not in ended.err

    whole = unbroken[0]
    assert without_clock(metrics_of(run_dir)) == without_clock(metrics_of(whole))
    assert hash_of(run_dir / "checkpoints" / LAST) == hash_of(whole / "checkpoints" / LAST)
    assert list(run_dir.rglob(".tmp-*")) == []


@pytest.mark.parametrize("is_supervised", [True, False], ids=["run", "torchrun"])
def test_a_terminal_that_closes_stops_a_run_with_its_state_saved(job, tmp_path, is_supervised):
    run_dir = tmp_path / "run"
    options = [f"run_dir={run_dir}", *ONE_RANK, "training.train_iters=2000", "checkpoint.save_interval=1000"]
    whole = run_command(job.config, *options, ranks=1) if is_supervised else torchrun_command(job.config, *options)
    ours, theirs = pty.openpty()
    nothing_ignored = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    setsid = ["setsid", "--ctty", "--wait", *whole]
    with subprocess.Popen(setsid, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=nothing_ignored) as process:
        os.close(theirs)
        os.set_blocking(ours, False)

        def is_at_work() -> bool:
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 2**16)  # the terminal shows it
            return live_rank_at(run_dir, rank=0, iteration=3) is not None

        wait_until(is_at_work, process=process)
        os.close(ours)
        process.wait(60)
    record = read_exit(run_dir)
    assert record.code == 75 and re.match(r"stopped on request after step \d+, state saved", record.message), record
    assert len(list((run_dir / "checkpoints").glob("iter_*/manifest.json"))) == 1


def _kill_rank(process, run_dir: Path, *, rank: int, iteration: int) -> Ended:
    """SIGKILL for a rank that has come as far as `iteration`; waits for the end of the whole."""
    wait_until(lambda: live_rank_at(run_dir, rank=rank, iteration=iteration), process=process)
    os.kill(live_rank_at(run_dir, rank=rank, iteration=iteration), signal.SIGKILL)
    return wait_for_end(process)


def test_a_restart_by_torchrun_itself_goes_on_with_what_this_start_has_saved(job, tmp_path):
    run_dir = tmp_path / "run"
    command = torchrun_command(job.config, f"run_dir={run_dir}", "checkpoint.resume=never")
    command.insert(command.index("--standalone"), "--max-restarts=1")
    with started(command) as process:
        ended = _kill_rank(process, run_dir, rank=0, iteration=SAVE_INTERVAL + 2)
    assert ended.code == 0, ended
    # From the last one saved before the kill, which comes a step late or two, and may be of a later step then.
    resumed = re.search(rf"resuming from {run_dir}/checkpoints/iter_\d+ \((\d+) iterations done\)", ended.out)
    assert resumed and int(resumed[1]) in range(SAVE_INTERVAL, TRAIN_ITERS, SAVE_INTERVAL), ended.out
    assert (read_exit(run_dir).code, read_exit(run_dir).attempt) == (0, 1)


def test_a_bare_torchrun_passes_over_damage_and_sweeps_what_a_kill_left(job, unbroken, tmp_path):
    """One rank goes on from four ranks' checkpoint; what an earlier run left in the folder does not outlive it."""
    run_dir = copy_run(unbroken[0], tmp_path / "run", iterations=[TRAIN_ITERS - SAVE_INTERVAL, TRAIN_ITERS])
    flip_bit(run_dir / "checkpoints" / LAST / SHARD, offset=-9)
    half = shutil.copytree(run_dir / "checkpoints" / LAST, run_dir / "checkpoints" / ".tmp-iter_0000020")
    (half / "manifest.json").unlink()
    shutil.copytree(unbroken[0] / "heartbeats", run_dir / "heartbeats")
    record_exit(run_dir, code=65, message="of an earlier run", rank=0)
    ended = run_to_end(torchrun_command(job.config, f"run_dir={run_dir}"))
    assert ended.code == 0, ended
    assert (read_exit(run_dir).code, read_exit(run_dir).message) == (0, "done")
    assert "swept .tmp-iter_0000020, which a killed save left half-written\n" in ended.out
    assert f"checkpoint {LAST} is passed over: {run_dir}/checkpoints/{LAST}/{SHARD} is damaged" in ended.out
    assert f"resuming from {run_dir}/checkpoints/{BEFORE_LAST} ({TRAIN_ITERS - SAVE_INTERVAL} iterations" in ended.out
    assert list(read_heartbeats(run_dir)) == [0]
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {BEFORE_LAST, LAST}
    ours, theirs = metrics_of(run_dir), metrics_of(unbroken[0])
    assert [record["iteration"] for record in ours] == list(range(1, TRAIN_ITERS + 1))
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=1e-5)
    assert ours[-1]["loss"] != theirs[-1]["loss"], "the damaged checkpoint's steps were to be done again"


def test_a_bare_torchrun_in_a_folder_that_is_in_use_is_refused_and_leaves_no_trace(job, tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    record_exit(run_dir, code=76, message="of the run that is active", rank=0)
    with lock(run_dir):
        ended = run_to_end(torchrun_command(job.config, f"run_dir={run_dir}"))
    assert ended.code == 1
    assert ended.err.count(f"error (78): another run is active in {run_dir} (pid {os.getpid()}, ") == 1
    assert read_exit(run_dir).message == "of the run that is active"
    assert list((run_dir / "logs").iterdir()) == [] and read_heartbeats(run_dir) == {}


def test_the_only_checkpoint_damaged_is_65_and_never_from_scratch(job, unbroken, tmp_path):
    run_dir = copy_run(unbroken[0], tmp_path / "run", iterations=[TRAIN_ITERS])
    flip_bit(run_dir / "checkpoints" / LAST / SHARD, offset=-9)
    ended = _fails(job, run_dir, code=65, message=f"no checkpoint in {run_dir}/checkpoints is whole", ranks=2)
    assert f"{LAST}/{SHARD} is damaged" in ended.err
    assert len(metrics_of(run_dir)) == TRAIN_ITERS


def test_a_damaged_checkpoint_named_by_its_number_is_65(job, unbroken, tmp_path):
    run_dir = copy_run(unbroken[0], tmp_path / "run", iterations=[TRAIN_ITERS - SAVE_INTERVAL, TRAIN_ITERS])
    shard = run_dir / "checkpoints" / LAST / SHARD
    os.truncate(shard, shard.stat().st_size - 1)
    resume = f"checkpoint.resume={TRAIN_ITERS}"
    ended = _fails(job, run_dir, resume, code=65, message=f"checkpoint.resume names iteration {TRAIN_ITERS}")
    assert f"{shard} is damaged: {shard.stat().st_size} bytes instead of" in ended.err


def test_a_checkpoint_that_is_not_there_is_78(job, unbroken, tmp_path):
    run_dir = copy_run(unbroken[0], tmp_path / "run", iterations=[TRAIN_ITERS])
    message = f"checkpoint.resume (5): {run_dir}/checkpoints holds no such iteration; there are: {TRAIN_ITERS}"
    _fails(job, run_dir, "checkpoint.resume=5", code=78, message=message)


def test_a_resume_with_another_model_is_78_and_touches_nothing(job, unbroken, tmp_path):
    run_dir = copy_run(unbroken[0], tmp_path / "run", iterations=[TRAIN_ITERS])
    message = f"model.rotary_base (5000.0) is 10000.0 in {run_dir}/checkpoints/{LAST}"
    _fails(job, run_dir, "model.rotary_base=5000", "training.train_iters=20", code=78, message=message)
    assert len(metrics_of(run_dir)) == TRAIN_ITERS


def test_a_new_beginning_is_followed_by_its_own_checkpoints_through_a_restart(job, unbroken, tmp_path):
    """`resume: never` in a folder of an older run: killed and restarted it goes on, and `auto` follows it later."""
    run_dir = copy_run(unbroken[0], tmp_path / "run", iterations=[TRAIN_ITERS])
    short = [*ONE_RANK, f"run_dir={run_dir}", "training.train_iters=10", "checkpoint.save_interval=2"]
    with started(run_command(job.config, *short, "checkpoint.resume=never", ranks=1, restarts=1)) as process:
        ended = _kill_rank(process, run_dir, rank=0, iteration=5)
    assert ended.code == 0, ended
    assert f"set aside as abandoned_1_{LAST}" in ended.out
    assert (
        "starting from fresh weights" in ended.out and f"resuming from {run_dir}/checkpoints/iter_000000" in ended.out
    )
    again = run_to_end(run_command(job.config, *short, "training.train_iters=12", ranks=1))
    assert again.code == 0 and "iter_0000010 (10 iterations done)" in again.out, again
    assert "changed since the checkpoint: training.train_iters 10 -> 12" in again.out
    assert [record["iteration"] for record in metrics_of(run_dir)] == list(range(1, 13))
    assert (run_dir / "checkpoints" / f"abandoned_1_{LAST}" / "manifest.json").is_file()


def test_damaged_weights_named_by_model_load_are_65(job, unbroken, tmp_path):
    folder = shutil.copytree(unbroken[0] / "checkpoints" / LAST, tmp_path / "weights")
    flip_bit(folder / SHARD, offset=-9)
    ended = _fails(job, tmp_path / "run", f"model.load=ckpt:{folder}", code=65, message=f"{folder / SHARD} is damaged")
    assert "starting from" not in ended.out


def test_an_index_with_a_damaged_header_is_65(job, tmp_path):
    data = shutil.copytree(job.data, tmp_path / "data")
    for index in data.rglob("*.idx"):  # of every source and bucket: whichever the first step draws
        flip_bit(index, offset=2)
    _fails(job, tmp_path / "run", f"data.path={data}", code=65, message=".idx is no Megatron index", ranks=2)


def test_an_index_that_was_cut_is_65(job, tmp_path):
    data = shutil.copytree(job.data, tmp_path / "data")
    index = min(data.rglob("*.idx"))
    os.truncate(index, index.stat().st_size - 8)
    _fails(job, tmp_path / "run", f"data.path={data}", code=65, message=f"{index} has {index.stat().st_size} bytes")


def test_a_data_folder_that_is_not_there_is_78(job, tmp_path):
    _fails(
        job,
        tmp_path / "run",
        f"data.path={tmp_path}/none",
        code=78,
        message=f"data.path ({tmp_path}/none): there is no such folder",
    )


def test_data_with_a_larger_vocabulary_than_the_model_is_78(job, tmp_path):
    message = f"model.vocab_size (128) is smaller than the vocabulary of the data ({VOCAB_SIZE} in {job.data})"
    _fails(job, tmp_path / "run", "model.vocab_size=128", code=78, message=message)


def test_a_micro_batch_that_a_bucket_does_not_divide_is_78(job, tmp_path):
    message = f"training.micro_batch_tokens (128) must be a common multiple of the data's buckets ({BUCKETS[0]}, "
    _fails(job, tmp_path / "run", "training.micro_batch_tokens=128", code=78, message=message)


def test_a_batch_that_no_memory_holds_is_78(job, tmp_path):
    batch = "training.global_batch_tokens=128000000000000"
    _fails(job, tmp_path / "run", batch, code=78, message="memory does not suffice (Unable to allocate ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.train_iters=many", "training.train_iters (many): "),
        ("training.trian_iters=5", "did you mean train_iters?"),
        ("training.global_batch_tokens=1000", "training.global_batch_tokens (1000) must be a multiple of"),
        ("training.micro_batch_tokens=1024", "x data parallel size (1024 x 2 = 2048); nearest: 2048"),
    ],
)
def test_a_bad_config_is_78_before_any_rank_starts(job, tmp_path, override, message):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    record_exit(run_dir, code=65, message="of an earlier run", rank=0)
    ended = run_to_end(run_command(job.config, *ONE_RANK, f"run_dir={run_dir}", override, ranks=2))
    assert ended.code == 78 and ended.out == ""
    assert ended.err.startswith("error (78): ") and message in " ".join(ended.err.split())
    assert (read_exit(run_dir).code, read_exit(run_dir).name) == (78, "bad_config")
    assert message in " ".join(read_exit(run_dir).message.split())
    assert read_heartbeats(run_dir) == {}


def _fails(job: Job, run_dir: Path, *overrides: str, code: int, message: str, ranks: int = 1) -> Ended:
    """A run that ends with `code`, says why exactly once and without a traceback, and records it.

    Of two tensor parallel ranks both find what is wrong.
    """
    layout = [*ONE_RANK, f"parallel.tensor_model_parallel_size={ranks}"]
    ended = run_to_end(run_command(job.config, *layout, f"run_dir={run_dir}", *overrides, ranks=ranks))
    assert ended.code == code, ended
    record = read_exit(run_dir)
    assert record.code == code and message in record.message, record
    # By the command itself, before anything starts, or by the supervisor, after the ranks found it.
    assert ended.err in (
        f"error ({code}): {record.message}\n",
        f"megatron-xy run: ended with {code} ({record.name}): {record.message}\n",
    )
    assert "| loss " not in ended.out
    return ended
