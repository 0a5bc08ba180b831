"""A reward model as a user makes one: toy preferences learned, an epoch selected, answers scored, a kill survived."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from megatron_xy.checkpoint.files import read_manifest
from megatron_xy.cli import app
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import MegatronXYError
from megatron_xy.inference.model_job import ModelJob
from megatron_xy.inference.partial_results import PartialResults
from megatron_xy.report.verb import make_report
from tests.end_to_end.tiny_run import (
    Ended,
    hash_of,
    live_rank_at,
    metrics_of,
    run_command,
    run_to_end,
    started,
    wait_for_end,
    wait_until,
    without_clock,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from toy_preferences import make, write_rows

CONFIG = {
    "task": "reward",
    "model": {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "num_query_groups": 2,
        "vocab_size": 67, "max_position_embeddings": 64, "init_method_std": 0.05,
    },
    "parallel": {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True,
    },
    "training": {"epochs": 2, "global_batch_tokens": 2048, "micro_batch_tokens": 512},
    "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 10},
    "checkpoint": {"save_interval": 10, "keep_latest": 1},
    "reward": {"score_band": [-8, 8], "stored_scores_of": "large"},
}  # fmt: skip


def config_for(folder: Path, **sections: dict[str, Any]) -> Path:
    config = {**CONFIG, "run_dir": str(folder / "run")}
    data = {"path": str(folder / "train.jsonl"), "tokenizer": str(folder / "tokenizer.json")}
    config["data"] = {**data, "eval_path": str(folder / "held_out.jsonl")}
    for name, section in sections.items():
        config[name] = {**config[name], **section}
    path = folder / "reward.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, float]:
    """A folder with the toy preferences, reward.yaml and run/, of 4 ranks; how it ended, in how many seconds."""
    folder = tmp_path_factory.mktemp("reward")
    make(folder, num_pairs=1500, num_test_pairs=200)
    began = time.monotonic()
    ended = run_to_end(run_command(config_for(folder), ranks=4))
    return folder, ended, time.monotonic() - began


def test_a_known_rule_is_learned_from_toy_preferences(trained: tuple[Path, Ended, float]) -> None:
    folder, ended, seconds = trained
    assert ended.code == 0, ended.err
    assert seconds < 180
    first, last = evaluations_of(folder / "run")
    assert last["held_out"]["accuracy"] >= 0.95 and last["held_out"]["num_pairs"] == 200
    assert (first["epoch"], last["epoch"]) == (1, 2) and first["ends_epoch"] and last["ends_epoch"]
    assert set(last["held_out"]["accuracy_by_source"]) == {"cold", "warm"}
    assert all(last[name] == last["held_out"][name] for name in ("loss", "loss_by_source"))
    assert set(last["held_out"]["accuracy_by_model"]) == {"large", "small", "large + small"}
    assert last["held_out"]["margin"] == pytest.approx(
        last["held_out"]["chosen_mean"] - last["held_out"]["rejected_mean"]
    )
    assert "held out" in ended.out and "by model: large" in ended.out
    records = metrics_of(folder / "run")
    assert (
        records[-1]["accuracy"] > records[0]["accuracy"]
        and sum(record["num_loss_tokens"] for record in records) == 2 * 1500
    )


def test_the_report_shows_pairs_and_which_epoch_to_take(trained: tuple[Path, Ended, float]) -> None:
    folder, _, _ = trained
    page = make_report(folder / "run")
    assert (page.parent / "pairs.png").is_file() and not (page.parent / "evaluation.png").exists()
    text = page.read_text()
    assert "Evaluation after step" not in text, "that is the table of held-out tokens"
    assert "Epochs, and the one to take" in text and text.count("<td>selected</td>") == 1
    accuracy = evaluations_of(folder / "run")[-1]["held_out"]["accuracy"]
    assert "held-out pairs in the right order" in text and f"{accuracy:.2%}" in text


def test_the_epochs_checkpoints_stay_and_keep_their_scores(trained: tuple[Path, Ended, float]) -> None:
    folder, _, _ = trained
    for record in evaluations_of(folder / "run"):
        state = read_manifest(folder / "run" / "checkpoints" / f"iter_{record['iteration']:07d}").state
        assert state["scores"] == record["scores"] and state["scores"]["std"] > 0 and state["model"]["head"] == "value"
        assert state["scores"]["model"] == "large" and 0 < state["scores"]["num_answers"] < 400
    assert len(list((folder / "run" / "checkpoints").glob("iter_*"))) == 2


def test_select_names_an_epoch(trained: tuple[Path, Ended, float]) -> None:
    folder, _, _ = trained
    result = CliRunner().invoke(app, ["select", str(folder / "run"), "--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == 0 and told["epoch"] == 2 and Path(told["checkpoint"]).is_dir()


def score_command(folder: Path, rows: Path, output: Path, *options: str) -> list[str]:
    checkpoint = folder / "run" / "checkpoints" / f"iter_{evaluations_of(folder / 'run')[-1]['iteration']:07d}"
    files = ["--input", str(rows), "--output", str(output)]
    return [sys.executable, "-m", "megatron_xy", "score", f"ckpt:{checkpoint}", *files, *options]


def scores_in(path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([json.loads(line)["score"] for line in path.read_text().splitlines()])


def test_scores_are_those_of_the_table_in_order_under_every_layout(
    trained: tuple[Path, Ended, float], tmp_path: Path
) -> None:
    folder, _, _ = trained
    pairs = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    rows = [{"prompt": pair["prompt"], "response": pair[name]} for pair in pairs for name in ("chosen", "rejected")]
    write_rows(tmp_path / "rows.jsonl", rows)
    ended = run_to_end(score_command(folder, tmp_path / "rows.jsonl", tmp_path / "one.jsonl"))
    assert ended.code == 0, ended.err
    scores = scores_in(tmp_path / "one.jsonl")
    table = evaluations_of(folder / "run")[-1]["held_out"]
    assert (scores[0::2] > scores[1::2]).mean() == table["accuracy"]
    assert scores[0::2].mean() == pytest.approx(table["chosen_mean"], abs=1e-4)
    written = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ("prompt", "response")} for row in written] == rows
    layout = ("--nproc-per-node", "2", "--micro-batch-tokens", "100", "parallel.pipeline_model_parallel_size=2")
    ended = run_to_end(score_command(folder, tmp_path / "rows.jsonl", tmp_path / "two.jsonl", *layout))
    assert ended.code == 0, ended.err
    np.testing.assert_allclose(scores_in(tmp_path / "two.jsonl"), scores, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob("*.partial"))


# In a process of its own, as a user's. argv: folder, rows of token ids.
TRANSFORMERS_SCORES = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(json.dumps([float(model(torch.tensor([row])).logits) for row in json.loads(sys.argv[2])]))
"""


def test_an_exported_reward_model_scores_the_same_here_and_in_transformers(
    trained: tuple[Path, Ended, float], tmp_path: Path
) -> None:
    folder, _, _ = trained
    vocabulary = load_tokenizer(folder / "tokenizer.json")
    pairs = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()][:20]
    rows = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
    write_rows(tmp_path / "rows.jsonl", rows)
    command = score_command(folder, tmp_path / "rows.jsonl", tmp_path / "ckpt.jsonl")
    origin = command[4]
    convert = [*command[:3], "convert", "--from", origin, "--to", f"hf:{tmp_path / 'hf'}"]
    for line in (command, convert, [*command[:4], f"hf:{tmp_path / 'hf'}", *command[5:-1], str(tmp_path / "hf.jsonl")]):
        ended = run_to_end(line)
        assert ended.code == 0, ended.err
    ours = scores_in(tmp_path / "ckpt.jsonl")
    np.testing.assert_array_equal(scores_in(tmp_path / "hf.jsonl"), ours)
    ids = [
        [
            vocabulary.bos_id,
            *vocabulary.encode(row["prompt"]).tolist(),
            *vocabulary.encode(row["response"]).tolist(),
            vocabulary.eos_id,
        ]
        for row in rows
    ]
    argv = [sys.executable, "-c", TRANSFORMERS_SCORES, str(tmp_path / "hf"), json.dumps(ids)]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(json.loads(result.stdout.splitlines()[-1]), ours, atol=1e-4)


def test_score_goes_on_where_a_killed_one_stopped(trained: tuple[Path, Ended, float], tmp_path: Path) -> None:
    from megatron_xy import device
    from megatron_xy.inference import scores

    folder, _, _ = trained
    end = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][-1]["id"]
    rows = [{"prompt": "red bapo", "response_tokens": [1] * length + [end], "id": length} for length in range(1, 7)]
    write_rows(tmp_path / "rows.jsonl", rows)
    command = score_command(folder, tmp_path / "rows.jsonl", tmp_path / "scores.jsonl")
    arguments = {"input": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "scores.jsonl")}
    arguments |= {"micro_batch_tokens": 4096, "tokenizer": None, "chat_template": None}
    device.start()
    work = scores.prepare(ModelJob("score", command[4], 1, [], "", arguments))
    results = PartialResults(tmp_path / "scores.jsonl")
    results.begin(work.facts)
    writer = results.writer(0)
    writer.add(2, {**rows[2], "score": 123.0})  # as an earlier run might have left it
    writer.close()
    ended = run_to_end(command)
    assert ended.code == 0 and "going on: 1 of 6 scores are there" in ended.out + ended.err, ended
    told = scores_in(tmp_path / "scores.jsonl")
    assert told[2] == 123.0 and np.abs(np.delete(told, 2)).max() < 50


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "red"}, "response is missing, and there are no response_tokens"),
        ({"prompt": "red", "response": " "}, "response is an empty answer"),
        ({"prompt": "red", "response_tokens": []}, "response_tokens must be a list of token ids"),
        ({"prompt": "red", "response_tokens": [4000]}, "the answer holds a token that the model does not know"),
        ({"response": "red"}, "prompt is missing"),
        ({"prompt": "red", "response": "red", "x": math.inf}, "a number is NaN or infinite"),
        ({"prompt": "red", "response": "red " * 80}, "prompt and answer have 83 tokens, must have at most the model's"),
    ],
)
def test_bad_rows_to_score_are_named(
    trained: tuple[Path, Ended, float], tmp_path: Path, row: dict[str, Any], text: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "red", "response": "red"}, row])
    command = score_command(trained[0], tmp_path / "rows.jsonl", tmp_path / "scores.jsonl")
    result = CliRunner().invoke(app, command[3:])
    assert isinstance(result.exception, MegatronXYError) and result.exception.exit_code == 65
    assert f"{tmp_path / 'rows.jsonl'}:2: {text}" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained: tuple[Path, Ended, float], tmp_path: Path) -> None:
    folder, _, _ = trained
    override = f"run_dir={tmp_path / 'run'}"
    command = run_command(folder / "reward.yaml", override, ranks=4)
    with started(command) as process:
        wait_until(lambda: live_rank_at(tmp_path / "run", rank=1, iteration=24), process=process, seconds=120)
        victim = live_rank_at(tmp_path / "run", rank=1, iteration=24)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        assert wait_for_end(process).code == 76
    ended = run_to_end(command)
    assert ended.code == 0 and "resuming from" in ended.out, ended.err
    assert without_clock(metrics_of(tmp_path / "run")) == without_clock(metrics_of(folder / "run"))
    assert evaluations_of(tmp_path / "run") == evaluations_of(folder / "run")
    last = f"checkpoints/iter_{evaluations_of(folder / 'run')[-1]['iteration']:07d}"
    assert hash_of(tmp_path / "run" / last) == hash_of(folder / "run" / last)
    assert (
        read_manifest(tmp_path / "run" / last).state["scores"] == read_manifest(folder / "run" / last).state["scores"]
    )


def test_a_stop_is_resumable(trained: tuple[Path, Ended, float], tmp_path: Path) -> None:
    command = run_command(trained[0] / "reward.yaml", f"run_dir={tmp_path / 'run'}", "training.epochs=1", ranks=1)
    command += ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1"]
    with started(command) as process:
        wait_until(lambda: live_rank_at(tmp_path / "run", rank=0, iteration=3), process=process, seconds=120)
        process.send_signal(signal.SIGTERM)
        assert wait_for_end(process).code == 75


def test_bad_pairs_are_named_before_any_rank_starts(tmp_path: Path) -> None:
    make(tmp_path, num_pairs=10, num_test_pairs=5)
    same = {"prompt": "red", "chosen": "red", "rejected": "red"}
    write_rows(tmp_path / "train.jsonl", [{"prompt": "red", "chosen": "red", "rejected": "blue"}, same])
    ended = run_to_end(run_command(config_for(tmp_path), ranks=4))
    assert ended.code == 65
    assert f"{tmp_path / 'train.jsonl'}:2: chosen and rejected are the same" in ended.err
    assert "rendezvous" not in ended.out


@pytest.mark.slow
def test_a_fifth_of_wrong_labels_is_borne(tmp_path: Path) -> None:
    make(tmp_path, num_pairs=3000, num_test_pairs=300, flipped=0.2)
    ended = run_to_end(run_command(config_for(tmp_path, checkpoint={"save_interval": 1000}), ranks=4))
    assert ended.code == 0, ended.err
    table = evaluations_of(tmp_path / "run")[-1]
    assert table["held_out"]["accuracy"] >= 0.9
    assert table["training"]["accuracy"] < 0.9, "a fifth of these labels is wrong"
