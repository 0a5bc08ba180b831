"""A run asked to stop during an evaluation, resumed and reported: what it measured stands once, and is drawn."""

import importlib.util
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_xy.report.verb import make_report
from megatron_xy.run_folder import read_exit, read_heartbeats
from tests.building import build_dataset
from tests.end_to_end.tiny_run import (
    BUCKETS,
    ONE_RANK,
    Ended,
    make_data,
    metrics_of,
    run_command,
    run_to_end,
    started,
    wait_for_end,
    wait_until,
    write_config,
)

TRAIN_ITERS = 40
EVAL_INTERVAL = 20
HAS_WANDB = importlib.util.find_spec("wandb") is not None


@dataclass(frozen=True)
class Resumed:
    """One run in two parts."""

    run_dir: Path
    stopped: Ended
    evaluations_when_stopped: list[int]
    ended: Ended


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A RUN.yaml: few documents to learn from, so that epochs end, and many to be evaluated on, so that it lasts."""
    folder = tmp_path_factory.mktemp("job")
    held_out = make_data(folder)
    few = folder / "few.jsonl"
    few.write_text("".join((folder / "corpus.jsonl").read_text().splitlines(keepends=True)[:20]))
    build_dataset(
        [few],
        tokenizer=folder / "tokenizer.model",
        output=folder / "few",
        buckets=BUCKETS,
        source_field="source",
    )
    write_config(folder / "tiny.yaml", data=folder / "few")
    return folder / "tiny.yaml", held_out


@pytest.fixture(scope="module")
def resumed(job, tmp_path_factory):
    config, held_out = job
    run_dir = tmp_path_factory.mktemp("resumed") / "run"
    options = [
        f"run_dir={run_dir}",
        f"data.eval_path={held_out}",
        f"training.eval_interval={EVAL_INTERVAL}",
        f"training.train_iters={TRAIN_ITERS}",
        "training.global_batch_tokens=256",
        f"checkpoint.save_interval={EVAL_INTERVAL}",
        "data.weights={code: 3, prose: 1}",
        *ONE_RANK,
        *(["runtime.wandb_project=tiny"] if HAS_WANDB else []),
    ]
    command = run_command(config, *options, ranks=1)

    def is_evaluating() -> bool:
        beat = read_heartbeats(run_dir).get(0)
        return beat is not None and (beat.phase, beat.iteration) == ("evaluate", EVAL_INTERVAL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with started(command) as process:
            wait_until(is_evaluating, process=process)
            process.send_signal(signal.SIGTERM)
            stopped = wait_for_end(process)
        assert read_exit(run_dir).code == stopped.code
        return Resumed(run_dir, stopped, evaluated(run_dir), run_to_end(command))


def evaluated(run_dir: Path) -> list[int]:
    path = run_dir / "eval.jsonl"
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_stop_during_an_evaluation_is_75_and_the_resumed_run_makes_up_for_it(resumed):
    assert resumed.stopped.code == 75, resumed.stopped
    assert f"stopped on request after step {EVAL_INTERVAL}, state saved" in resumed.stopped.err
    assert resumed.evaluations_when_stopped == [], "it was not waited for"
    assert resumed.ended.code == 0, resumed.ended
    assert evaluated(resumed.run_dir) == [EVAL_INTERVAL, TRAIN_ITERS]
    lines = resumed.ended.out.splitlines()
    (missed,) = (
        place for place, line in enumerate(lines) if line.startswith(f"evaluation after step {EVAL_INTERVAL}:")
    )
    assert missed < next(place for place, line in enumerate(lines) if line.startswith(f"step {EVAL_INTERVAL + 1}/"))
    assert [record["iteration"] for record in metrics_of(resumed.run_dir)] == list(range(1, TRAIN_ITERS + 1))


def test_epochs_are_recorded_and_told_where_they_begin(resumed):
    told = (resumed.stopped.out + resumed.ended.out).count("begins epoch")
    before: dict[tuple[str, str], float] = {}
    begun = 0
    for record in metrics_of(resumed.run_dir):
        now = {
            (source, bucket): times for source, of in record["epochs_by_source"].items() for bucket, times in of.items()
        }
        assert set(now) >= set(before) and all(now[stream] >= times for stream, times in before.items())
        begun += any(-(-now[stream] // 1) > max(1, -(-before.get(stream, 0.0) // 1)) for stream in now)
        before = now
    assert told == begun > 0
    assert max(before.values()) > 1


def test_the_report_draws_all_that_the_run_has_noted(resumed):
    folder = make_report(resumed.run_dir).parent
    names = {"loss", "evaluation", "learning_rate_and_grad_norm", "throughput", "time_and_memory", "data", "mixture"}
    assert {path.stem for path in folder.glob("*.png")} == names
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last_evaluation"]["iteration"] == TRAIN_ITERS
    assert set(summary["last_evaluation"]["loss_by_source"]) == {"code", "prose"}
    assert summary["consumed_share_by_source"]["code"] == pytest.approx(0.75, abs=0.1)
    page = (folder / "index.html").read_text()
    assert f"Evaluation after step {TRAIN_ITERS}" in page and "<h2>Epochs</h2>" in page


@pytest.mark.skipif(not HAS_WANDB, reason="wandb, an extra, is not installed")
def test_both_parts_are_one_run_of_wandb(resumed):
    files = list(resumed.run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    assert "W&B" not in resumed.stopped.out + resumed.ended.out


def test_wandb_asked_for_and_not_installed_is_78_before_any_rank_starts(job, tmp_path, monkeypatch):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hide'}:{Path(sys.modules['megatron_xy'].__file__).parents[1]}")
    run_dir = tmp_path / "run"
    ended = run_to_end(run_command(job[0], f"run_dir={run_dir}", "runtime.wandb_project=tiny", *ONE_RANK, ranks=1))
    assert ended.code == 78
    assert "runtime.wandb_project (tiny): wandb is not installed" in " ".join(ended.err.split())
    assert read_heartbeats(run_dir) == {}
