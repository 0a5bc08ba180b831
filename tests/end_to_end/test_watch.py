"""`evaluate --watch`: each checkpoint of a run once, whatever wrote it, killed or not, and the bad ones named."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xy.checkpoint.files import read_manifest, write_manifest
from megatron_xy.report.verb import make_report
from tests.end_to_end.small_benchmark import needs_lm_eval, write_financeiq
from tests.end_to_end.tiny_run import (
    copy_run,
    flip_bit,
    make_data,
    run_command,
    run_to_end,
    started,
    trained,
    wait_for_end,
    wait_until,
    write_config,
)

TENSOR_PARALLEL = ("--nproc-per-node", "2", "parallel.tensor_model_parallel_size=2")


def watching(run: Path, *options: str) -> list[str]:
    """The watch of a run beside FOLDER/questions, as argv."""
    task = ("--tasks", "financeiq", "--num-fewshot", "2", "--data-dir", str(run.parent / "questions"))
    return [sys.executable, "-m", "megatron_xy", "evaluate", str(run), *task, "--watch", *options]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The whole ones."""
    path = run_dir / "evaluations.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@needs_lm_eval
def test_a_watch_that_is_killed_evaluates_every_checkpoint_once(tmp_path: Path) -> None:
    write_financeiq(tmp_path / "questions")
    run_dir = trained(tmp_path, "checkpoint.keep_latest=9")
    unbroken = copy_run(run_dir, tmp_path / "unbroken", iterations=(4, 8, 12, 16))
    for kills in (1, 3):
        with started(watching(run_dir)) as process:
            wait_until(lambda kills=kills: len(lines_of(run_dir)) >= kills, process=process)
            process.send_signal(signal.SIGKILL)
            wait_for_end(process)
        with (run_dir / "evaluations.jsonl").open("ab") as stream:
            stream.write(b'{"iteration": 16, "tasks": ["fin')  # as a kill leaves it in the middle of a line
    ended = run_to_end(watching(run_dir))
    assert ended.code == 0 and "its checkpoints are evaluated" in ended.err, ended
    records = lines_of(run_dir)
    assert [record["iteration"] for record in records] == [4, 8, 12, 16]
    assert not list((run_dir / ".evaluations").iterdir())
    (unbroken / "exit.json").write_bytes((run_dir / "exit.json").read_bytes())
    assert run_to_end(watching(unbroken)).code == 0
    assert [record["results"] for record in lines_of(unbroken)] == [record["results"] for record in records]
    assert (make_report(run_dir).parent / "benchmarks.png").is_file()
    ended = run_to_end([word for word in watching(run_dir, "--json") if word != "--watch"])
    assert ended.code == 0 and json.loads(ended.out) == records[-1]["results"], "of a run its newest"
    assert run_to_end(watching(run_dir)).code == 0 and lines_of(run_dir) == records, "there is nothing left to do"


@pytest.mark.slow
@needs_lm_eval
def test_a_run_on_several_ranks_is_watched_while_it_goes_on_by_several_ranks(tmp_path: Path) -> None:
    write_financeiq(tmp_path / "questions")
    run_dir = tmp_path / "run"
    write_config(tmp_path / "run.yaml", data=make_data(tmp_path))
    options = (f"run_dir={run_dir}", "checkpoint.keep_latest=9", "training.train_iters=24")
    with started(run_command(tmp_path / "run.yaml", *options, ranks=4)) as run:
        wait_until(run_dir.exists, process=run)
        with started(watching(run_dir, *TENSOR_PARALLEL)) as watch:
            assert wait_for_end(run).code == 0
            ended = wait_for_end(watch, seconds=240)
    assert ended.code == 0, ended
    records = lines_of(run_dir)
    assert [record["iteration"] for record in records] == [4, 8, 12, 16, 20, 24]
    alone = copy_run(run_dir, tmp_path / "alone", iterations=(24,))
    (alone / "exit.json").write_bytes((run_dir / "exit.json").read_bytes())
    assert run_to_end(watching(alone)).code == 0
    assert lines_of(alone)[0]["results"] == records[-1]["results"], "one rank says the same"


@pytest.mark.slow
@needs_lm_eval
def test_of_a_ppo_run_the_actor_is_evaluated_and_reward_models_are_refused(tmp_path: Path) -> None:
    write_financeiq(tmp_path / "questions")
    base = trained(tmp_path)
    config = yaml.safe_load((tmp_path / "run.yaml").read_text())
    del config["parallel"], config["model"]
    config |= {
        "task": "ppo",
        "model": {"load": f"ckpt:{base / 'checkpoints' / 'iter_0000016'}"},
        "training": {"train_iters": 2, "micro_batch_tokens": 256},
        "checkpoint": {"save_interval": 1},
        "roles": {role: {"ranks": "0-1"} for role in ("actor", "critic", "reference", "reward")},
        "ppo": {
            "prompts": str(tmp_path / "prompts.jsonl"),
            "rollout_batch_size": 4,
            "mini_batch_size": 4,
            "max_response_length": 8,
        },
    }
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "de"}\n' * 4)
    ppo = tmp_path / "ppo"
    ended = run_to_end(run_command(tmp_path / "ppo.yaml", f"run_dir={ppo}", ranks=2))
    assert ended.code == 0, ended
    ended = run_to_end(watching(ppo))
    assert ended.code == 0, ended
    assert [record["iteration"] for record in lines_of(ppo)] == [1, 2]
    actor = ppo / "checkpoints" / "iter_0000002" / "actor"
    manifest = read_manifest(actor)
    write_manifest(actor, replace(manifest, state={**manifest.state, "task": "reward"}))
    (ppo / "evaluations.jsonl").unlink()
    ended = run_to_end(watching(ppo))
    assert ended.code == 78 and "is a run of reward models" in ended.err


@pytest.mark.slow
@needs_lm_eval
def test_bad_checkpoints_are_named_and_the_others_evaluated(tmp_path: Path) -> None:
    write_financeiq(tmp_path / "questions")
    run_dir = trained(tmp_path, "checkpoint.keep_latest=9")
    flipped, emptied = (run_dir / "checkpoints" / f"iter_{number:07d}" for number in (4, 8))
    flip_bit(next(flipped.glob("*.safetensors")), offset=-8)
    manifest = read_manifest(emptied)
    kept = {name: tensor for name, tensor in manifest.tensors.items() if name != "output_layer.weight"}
    write_manifest(emptied, replace(manifest, tensors=kept))
    for layout in ((), TENSOR_PARALLEL):
        (run_dir / "evaluations.jsonl").unlink(missing_ok=True)
        ended = run_to_end(watching(run_dir, *layout))
        assert ended.code == 65 and "evaluated but for 4, 8, which are bad" in ended.err, ended
        assert [record["iteration"] for record in lines_of(run_dir)] == [12, 16]
