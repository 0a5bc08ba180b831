"""What a run tells: each iteration stands once in metrics.jsonl, in valid JSON; one line a step; leader and others."""

import json
import math
import time
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_xy import record_files
from megatron_xy.boards import TENSORBOARD_FOLDER
from megatron_xy.log import METRICS, RunLog, step_line
from megatron_xy.record_files import cut_records


def record(iteration: int, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "iteration": iteration,
        "bucket": 128,
        "loss": 1 / 3 + iteration,
        "num_loss_tokens": 1000,
        "loss_by_source": {"code": 0.1, "prose": 2 / 3},
        "grad_norm": 1.25,
        "lr": 3e-4,
        "tokens_per_second": 12345.6,
        "step_seconds": 2.0,
        "skipped": False,
        "spike": False,
    }
    return {**values, **changes}


def lines_of(run_dir) -> list[str]:
    return (run_dir / METRICS).read_text().splitlines()


def test_the_leader_writes_unrounded_records_and_scalars_and_speaks(tmp_path, capsys):
    log = RunLog(tmp_path, rank=2, is_leader=True)
    log.open_metrics(iteration=0)
    for iteration in (1, 2):
        log.step(record(iteration), train_iters=2)
    log.close()
    assert [json.loads(line) for line in lines_of(tmp_path)] == [record(1), record(2)]
    board = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (1, pytest.approx(4 / 3)),
        (2, pytest.approx(7 / 3)),
    ]
    assert {"loss_by_bucket/128", "loss_by_source/code", "lr"} <= set(board.Tags()["scalars"])
    assert "mfu" not in board.Tags()["scalars"], "a number that is not known is left out"
    shown = capsys.readouterr().out.splitlines()
    assert shown == [step_line(record(iteration), train_iters=2) for iteration in (1, 2)]
    stamped = (tmp_path / "logs" / "rank-00002.log").read_text().splitlines()
    assert [line[20:] for line in stamped] == shown


@pytest.mark.parametrize("rank", [0, 3])
def test_other_ranks_write_their_log_file_only_and_there_rank_0_alone_each_step(tmp_path, capsys, rank):
    log = RunLog(tmp_path, rank=rank, is_leader=False)
    log.open_metrics(iteration=0)
    log.step(record(1), train_iters=2)
    log.say("done")
    log.close()
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs", f"rank-{rank:05d}.log"]
    told = (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()
    assert ("step 1/2 | bucket   128" in told) == (rank == 0) and " done\n" in told


def test_numbers_that_json_has_not_become_null_at_any_depth(tmp_path):
    log = RunLog(tmp_path, rank=0, is_leader=True)
    log.open_metrics(iteration=0)
    bad = record(1, loss=math.nan, grad_norm=math.inf, loss_by_source={"code": math.nan, "prose": 1.5}, skipped=True)
    log.step(bad, train_iters=2)
    log.close()

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    (line,) = lines_of(tmp_path)
    expected = record(1, loss=None, grad_norm=None, loss_by_source={"code": None, "prose": 1.5}, skipped=True)
    assert json.loads(line, parse_constant=refuse) == expected


@settings(deadline=None, derandomize=True, max_examples=40)
@given(written=st.integers(0, 12), resumed=st.integers(0, 12), cut_bytes=st.integers(0, 300), block=st.integers(1, 900))
def test_a_resumed_run_holds_each_iteration_once(tmp_path_factory, written, resumed, cut_bytes, block):
    """Whatever was written, cut anywhere in the last record by a kill: then from a checkpoint at or before that."""
    path = tmp_path_factory.mktemp("run") / METRICS
    whole = [json.dumps(record(iteration)) + "\n" for iteration in range(1, written + 1)]
    text = "".join(whole)
    path.write_text(text[: len(text) - min(cut_bytes, len(whole[-1]) if whole else 0)])
    with mock.patch.object(record_files, "BLOCK_BYTES", block):
        cut_records(path, iteration=resumed)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    num_whole = written - (written > 0 and cut_bytes > 1)  # the line's end alone may be missing
    assert kept == [record(iteration) for iteration in range(1, min(num_whole, resumed) + 1)]
    assert path.read_text() == "" or path.read_text().endswith("\n")
    assert [entry.name for entry in path.parent.iterdir()] == [METRICS]


def test_what_is_kept_is_not_read(tmp_path):
    """But for its last line: the file of a run of weeks has gigabytes."""
    path = tmp_path / METRICS
    ends = "".join(json.dumps(record(iteration)) + "\n" for iteration in (7, 7, 8))
    path.write_text("never looked at\n" * 100_000 + ends)
    cut_records(path, iteration=7)
    assert path.read_text().removeprefix("never looked at\n" * 100_000) == (json.dumps(record(7)) + "\n") * 2


def test_a_metrics_file_that_is_not_there_stays_so(tmp_path):
    cut_records(tmp_path / METRICS, iteration=3)
    assert list(tmp_path.iterdir()) == []


def test_purging_hides_the_scalars_of_an_abandoned_course(tmp_path):
    for iteration, loss in ((0, 5.0), (2, 1.0)):  # written to 4, then resumed from 2
        log = RunLog(tmp_path, rank=0, is_leader=True)
        log.open_metrics(iteration=iteration)
        for step in range(iteration + 1, 5):
            log.step(record(step, loss=loss), train_iters=4)
        log.close()
        time.sleep(1 - time.time() % 1)  # TensorBoard orders its files by the second
    board = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 5.0), (2, 5.0), (3, 1.0), (4, 1.0)]
    assert [json.loads(line)["loss"] for line in lines_of(tmp_path)] == [5.0, 5.0, 1.0, 1.0]


def test_a_new_epoch_is_told_in_one_line(tmp_path, capsys):
    with RunLog(tmp_path, rank=0, is_leader=True) as log:
        log.epochs([], data_step=6)
        log.epochs([("code", 128, 2), ("prose", 128, 3)], data_step=7)
    assert capsys.readouterr().out == "  data step 7 begins epoch 2 of code in bucket 128, 3 of prose in bucket 128\n"


def test_a_phase_is_told_with_its_seconds_and_not_where_it_fails(tmp_path, capsys):
    log = RunLog(tmp_path, rank=0, is_leader=True)
    with log.phase("model"):
        pass
    with pytest.raises(RuntimeError), log.phase("data"):
        raise RuntimeError
    assert capsys.readouterr().out == f"  {'model':<28}    0.0 s\n"


@pytest.mark.parametrize(
    ("iteration", "eta"), [(100, "0s"), (71, "58s"), (70, "1m00s"), (1, "3m18s"), (-1800, "1h03m"), (-50000, "27h50m")]
)
def test_a_step_line_says_how_long_the_rest_takes(iteration, eta):
    line = step_line(record(iteration, loss=2.5), train_iters=100)
    assert line == (
        f"step {iteration:>3}/100 | bucket   128 | loss   2.5000 | grad norm   1.250 | lr 3.00e-04 | "
        f"   12,346 tokens/s |   2.00 s | ETA {eta}"
    )
    assert step_line(record(iteration, skipped=True), train_iters=100).endswith(" | SKIPPED: gradient not finite")
    unlabelled = record(iteration, loss=math.nan, num_loss_tokens=0, skipped=True)
    assert step_line(unlabelled, train_iters=100).endswith(" | SKIPPED: no label to learn from")
    assert step_line(record(iteration, skipped=True, spike=True), train_iters=100).endswith(" | SKIPPED: spike")
    assert step_line(record(iteration, spike=True), train_iters=100).endswith(" | SPIKE")
