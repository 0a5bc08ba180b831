"""What evaluations are known by: their questions, examples, chat template and tokenizer, however they are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_xy.benchmarks.checkpoints import newest_checkpoint
from megatron_xy.checkpoint.files import Manifest, TrainingState, write_manifest
from megatron_xy.cli import app
from megatron_xy.errors import ConfigError, DataError, UsageError
from megatron_xy.storage import file_sha256
from tests.end_to_end.small_benchmark import needs_lm_eval, write_financeiq, write_questions
from tests.unit.small_corpus import train_tokenizer


def facts_of(data: Path, *, num_fewshot: int = 2, **placed: str) -> dict[str, Any]:
    from megatron_xy.benchmarks.suite import load_benchmarks
    from megatron_xy.benchmarks.verb import Placement

    benchmarks = load_benchmarks(
        "financeiq", data_dir=data, num_fewshot=num_fewshot, limit=None, apply_chat_template=False, say=print
    )
    placement = Placement(1, [], placed.get("tokenizer"), placed.get("chat_template"))
    return {**benchmarks.facts, **placement.facts}


@needs_lm_eval
def test_other_questions_examples_templates_and_tokenizers_make_another_evaluation(tmp_path: Path) -> None:
    data = write_financeiq(tmp_path / "data")
    facts = facts_of(data)
    assert facts == facts_of(write_financeiq(tmp_path / "copy")), "wherever the data lie"
    examples, questions = (data / split / "税务师.csv" for split in ("dev", "test"))
    without = facts_of(data, num_fewshot=0)
    write_questions(examples, number=5, seed=9)
    assert facts_of(data)["data"] != facts["data"] and facts_of(data, num_fewshot=0) == without
    write_questions(questions, number=8, seed=9)
    assert facts_of(data, num_fewshot=0)["data"] != without["data"]
    template = tmp_path / "own.jinja"
    seen = []
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        seen.append(facts_of(data, chat_template=str(template))["chat_template"])
    assert seen[0] != seen[1] and all(known.startswith("own.jinja ") for known in seen)
    assert facts_of(data, chat_template="chatml")["chat_template"] == "chatml"
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    assert facts_of(data, tokenizer=str(tmp_path)) == facts_of(data, tokenizer=str(tokenizer)) != facts_of(data)


@needs_lm_eval
def test_a_title_says_how_many_examples_there_are(tmp_path: Path) -> None:
    from megatron_xy.benchmarks.suite import Benchmarks, load_benchmarks

    def loaded(num_fewshot: int | None) -> Benchmarks:
        return load_benchmarks(
            "financeiq",
            data_dir=tmp_path,
            num_fewshot=num_fewshot,
            limit=None,
            apply_chat_template=False,
            say=said.append,
        )

    said: list[str] = []
    for name, number in (("one", 9), ("two", 9)):
        write_questions(tmp_path / f"{name}.csv", number=number, seed=0)
    assert [loaded(num).title("financeiq") for num in (None, 0)] == ["financeiq 5-shot", "financeiq 0-shot"]
    write_questions(tmp_path / "two.csv", number=4, seed=0)
    write_questions(tmp_path / "three.csv", number=4, seed=1)
    said.clear()
    assert loaded(None).title("financeiq") == "financeiq 3- to 5-shot"
    assert said == [
        f"warning: {tmp_path} has no dev and test; a question's examples are the other questions of its category, "
        "fewer than 5 in 2 of 3 categories, 3 at the least"
    ]


@needs_lm_eval
def test_a_line_counts_for_what_it_says_alone(tmp_path: Path) -> None:
    from megatron_xy.benchmarks.watch import _done

    facts = {"tasks": ["financeiq"], "data": "aa", "chat_template": None}
    path = tmp_path / "evaluations.jsonl"
    path.write_text(json.dumps({"iteration": 4, "checkpoint": "cc", **facts}) + '\n{"iteration": 8}\n')
    assert _done(path, facts) == {(4, "cc")}
    assert _done(path, {**facts, "data": "bb"}) == _done(path, {**facts, "chat_template": "chatml"}) == set()
    for damaged in ("{", "[]", "{}"):
        path.write_text(f"{damaged}\n")
        with pytest.raises(DataError, match=r"jsonl:1: no evaluation; delete the line"):
            _done(path, facts)


def saved(folder: Path, *, task: str = "pretrain") -> Path:
    """A checkpoint with one file of a few bytes."""
    folder.mkdir(parents=True)
    (folder / "rank.safetensors").write_bytes(b"weights")
    kept = {"rank.safetensors": {"bytes": 7, "sha256": file_sha256(folder / "rank.safetensors")}}
    state = {**asdict(TrainingState()), "world_size": 1, "model": {}, "task": task}
    write_manifest(folder, Manifest(state, tensors={}, files=kept))
    return folder


def test_of_a_run_the_newest_whole_checkpoint_is_asked(tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", list[str]()
    with pytest.raises(ConfigError, match="there is no run with a checkpoint; name a run_dir, or ckpt:DIR or hf:DIR"):
        newest_checkpoint(run_dir, say=said.append)
    older, newer = (saved(run_dir / "checkpoints" / f"iter_{number:07d}") for number in (8, 12))
    assert newest_checkpoint(run_dir, say=said.append) == newer
    (newer / "rank.safetensors").write_bytes(b"weightz")
    said.clear()
    assert newest_checkpoint(run_dir, say=said.append) == older
    assert said[0].startswith("iteration 12 is passed over: ") and said[1:] == ["iteration 8: evaluating"]
    (older / "rank.safetensors").unlink()
    with pytest.raises(DataError, match=r"no checkpoint in .* is whole"):
        newest_checkpoint(run_dir, say=said.append)
    actor = saved(run_dir / "checkpoints" / "iter_0000016" / "actor", task="ppo")
    assert newest_checkpoint(run_dir, say=said.append) == actor
    saved(run_dir / "checkpoints" / "iter_0000020", task="reward")
    with pytest.raises(ConfigError, match="is a run of reward models"):
        newest_checkpoint(run_dir, say=said.append)


def test_a_watch_is_of_a_run() -> None:
    with pytest.raises(UsageError, match="ckpt:one: must be a run_dir, with --watch"):
        CliRunner().invoke(app, ["evaluate", "ckpt:one", "--watch", "--tasks", "mmlu"], catch_exceptions=False)


def test_json_of_a_watch_is_refused() -> None:
    with pytest.raises(UsageError, match="--json goes without --watch"):
        arguments = ["evaluate", "run", "--watch", "--tasks", "mmlu", "--json"]
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_a_stop_is_told_beside_the_results() -> None:
    program = (
        "import os, signal, time; from megatron_xy.inference.model_job import leave_on_signals; "
        "leave_on_signals('; the same command goes on'); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (75, "")
    assert ended.stderr == "stopped by SIGTERM; the same command goes on\n"


@needs_lm_eval
def test_a_watch_says_what_it_waits_for_and_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_xy.benchmarks import watch
    from megatron_xy.benchmarks.suite import load_benchmarks
    from megatron_xy.benchmarks.verb import Placement

    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    data = write_financeiq(tmp_path / "data")
    benchmarks = load_benchmarks(
        "financeiq", data_dir=data, num_fewshot=0, limit=None, apply_chat_template=False, say=print
    )
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        code, name = (75, "stopped") if len(said) == 1 else (0, "done")
        ended = {"code": code, "name": name, "message": "", "rank": None, "host": "a", "time": "", "attempt": 1}
        (run_dir / "exit.json").write_text(json.dumps({**ended, "start": "", "of_another_version": 1}))

    assert watch.watch(run_dir, benchmarks, Placement(1, [], None, None), say=say) == 0
    assert said == [
        f"{run_dir}: waits for its first checkpoint",
        f"{run_dir}: the run has ended with 75 (stopped); waits for its first checkpoint of a start that resumes it",
        f"{run_dir}: the run is done, and its checkpoints are evaluated",
    ]


@needs_lm_eval
def test_an_iteration_that_is_saved_again_is_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_xy.benchmarks import watch
    from megatron_xy.benchmarks.suite import Benchmarks
    from megatron_xy.benchmarks.verb import Placement

    run_dir, folders = tmp_path / "run", list[Path]()

    def evaluate(_origin: str, *_: object, folder: Path) -> dict[str, dict[str, float]]:
        folders.append(folder)
        return {"one": {"acc": float(len(folders))}}

    monkeypatch.setattr(watch, "evaluate", evaluate)
    benchmarks = Benchmarks(["one"], {"tasks": {}}, None, None, False)
    ended = {"code": 0, "name": "done", "message": "", "rank": None, "host": "a", "time": "", "attempt": 1, "start": ""}
    for task in ("pretrain", "pretrain", "sft"):
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        saved(run_dir / "checkpoints" / "iter_0000004", task=task)
        (run_dir / "exit.json").write_text(json.dumps({**ended, "of_another_version": 1}))
        assert watch.watch(run_dir, benchmarks, Placement(1, [], None, None), say=print) == 0
    records = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [record["results"]["one"]["acc"] for record in records] == [1.0, 2.0] and len(set(folders)) == 2
