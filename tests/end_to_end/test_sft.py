"""Fine-tuning as a user runs it: from jsonl files and folders, by epochs, in stages, killed; what is bad is refused
before any rank starts."""

import json
import math
import os
import random
import signal

import pytest
import yaml

from megatron_xy.checkpoint.files import read_manifest
from megatron_xy.run_folder import read_exit
from tests.end_to_end.tiny_run import (
    BUCKETS,
    ONE_RANK,
    live_rank_at,
    make_data,
    metrics_of,
    run_command,
    run_to_end,
    started,
    wait_for_end,
    wait_until,
    without_clock,
    write_config,
)

NUM_ROWS = 200


def conversations(count, *, source):
    chance = random.Random(source)
    for _ in range(count):
        words = chance.choices(["abba", "cede", "fig", "hop", "keel"], k=3)
        said, answer = " ".join(words), " ".join(reversed(words))
        yield {
            "messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}],
            "source": source,
        }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """RUN.yaml of task sft over a file of conversations and the tiny run's texts."""
    folder = tmp_path_factory.mktemp("job")
    texts = make_data(folder)
    write_config(folder / "sft.yaml", data=texts)
    config = yaml.safe_load((folder / "sft.yaml").read_text())
    rows = [*conversations(NUM_ROWS, source="general"), *conversations(NUM_ROWS // 4, source="finance")]
    config["task"] = "sft"
    config["data"] = {
        "path": [str(write(folder / "open.jsonl", rows)), str(texts)],
        "eval_path": str(write(folder / "held_out.jsonl", rows[:40])),
        "tokenizer": str(texts / "tokenizer.model"),
        "chat_template": "xuanyuan",
        "weights": {"general": 4, "finance": 1, "prose": 1, "code": 0},
    }
    config["training"]["eval_interval"] = 8
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder / "sft.yaml"


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    ended = run_to_end(run_command(job, f"run_dir={run_dir}", ranks=4))
    assert ended.code == 0, ended
    return run_dir, ended


def test_conversations_and_text_are_learned_each_with_its_own_loss(unbroken, job):
    run_dir, ended = unbroken
    records = metrics_of(run_dir)
    assert "megatron_xy sft: " in ended.out and len(records) == 16
    assert {source for row in records for source in row["loss_by_source"]} == {"general", "finance", "prose"}
    of_general = [row["loss_by_source"]["general"] for row in records if "general" in row["loss_by_source"]]
    assert of_general[-1] < of_general[0] - 1
    shares = records[-1]["consumed_share_by_source"]
    assert shares["general"] == pytest.approx(4 / 6, abs=0.1) and shares["code"] == 0
    evaluated = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in evaluated] == [8, 16]
    assert set(evaluated[-1]["loss_by_source"]) == {"general"}
    state = read_manifest(run_dir / "checkpoints/iter_0000016").state
    assert state["task"] == "sft" and "Human: " in state["chat_template"]
    folders = sorted(path.name.rpartition("-")[0] for path in (run_dir / "data").iterdir())
    assert folders == ["held_out", "open"]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_unbroken(unbroken, job, tmp_path):
    run_dir = tmp_path / "run"
    with started(run_command(job, f"run_dir={run_dir}", ranks=4, restarts=1)) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=3, iteration=6), process=process)
        os.kill(live_rank_at(run_dir, rank=3, iteration=6), signal.SIGKILL)
        ended = wait_for_end(process)
    assert ended.code == 0, ended
    assert without_clock(metrics_of(run_dir)) == without_clock(metrics_of(unbroken[0]))


def test_stages_by_epochs_each_from_the_one_before(job, tmp_path):
    """10M open conversations, then 200k of one's own, as small as they come."""
    options = [*ONE_RANK, "data.weights={general: 4, finance: 1}", "training.eval_interval=0", "training.epochs=2"]
    options += ["training.micro_batch_tokens=256", "training.global_batch_tokens=1024", "checkpoint.keep_latest=9"]
    first = run_command(
        job, *options, f"data.path={job.parent}/open.jsonl", f"run_dir={tmp_path}/first", "checkpoint.save_interval=99",
        ranks=1,
    )  # fmt: skip
    ended = run_to_end(first)
    assert ended.code == 0, ended
    records = metrics_of(tmp_path / "first")
    saved = sorted(path.name for path in (tmp_path / "first/checkpoints").glob("iter_*"))
    number = len(records)
    assert saved == [f"iter_{math.ceil(number / 2):07d}", f"iter_{number:07d}"]
    assert "epochs after" in ended.out and {row["bucket"] for row in records} == {256}
    assert records[-1]["consumed_samples"] == 4 * number
    shares, epochs = records[-1]["consumed_share_by_source"], records[-1]["epochs_by_source"]
    held = sum(4 * number * shares[source] / epochs[source]["256"] for source in shares)
    assert 2 * held <= 4 * number < 2 * held + 4

    own = write(tmp_path / "own.jsonl", conversations(60, source="finance"))
    second = run_command(
        job, *options, f"data.path={own}", "data.weights=null", f"run_dir={tmp_path}/second",
        f"model.load=ckpt:{tmp_path}/first/checkpoints/{saved[-1]}", ranks=1,
    )  # fmt: skip
    ended = run_to_end(second)
    assert ended.code == 0, ended
    later = metrics_of(tmp_path / "second")
    assert later[0]["iteration"] == 1 and later[0]["loss"] < records[0]["loss"] - 1


def refused(job, *options, run_dir):
    """The code and message that a run leaves which starts no rank."""
    ended = run_to_end(run_command(job, *options, f"run_dir={run_dir}", ranks=4))
    assert "starting" not in ended.out
    assert ended.code == read_exit(run_dir).code
    return ended.code, ended.err


def test_what_is_bad_is_named_before_any_rank_starts(job, tmp_path):
    rows = list(conversations(30, source="general"))
    rows[7]["messages"][1]["content"] = " "
    rows[9]["messages"][0]["role"] = "wizard"
    bad = write(tmp_path / "bad.jsonl", rows)
    code, message = refused(job, f"data.path={bad}", "data.weights=null", run_dir=tmp_path / "bad")
    assert code == 65
    assert "bad.jsonl:8: message 2 is an empty answer" in message
    assert "bad.jsonl:10: message 1: unknown role 'wizard'" in message

    long = write(tmp_path / "long.jsonl", [{"messages": [turn for row in rows[10:] for turn in row["messages"]]}])
    code, message = refused(job, f"data.path={long}", "data.weights=null", run_dir=tmp_path / "long")
    assert code == 65 and f"longer than the largest bucket ({BUCKETS[-1]})" in message

    texts = job.parent / "data"
    code, message = refused(job, f"data.path={texts}", "data.weights=null", run_dir=tmp_path / "texts")
    assert code == 65 and "holds no conversations, which task sft learns from" in message

    code, message = refused(job, "data.path=none.jsonl", "data.chat_template=nine", run_dir=tmp_path / "none")
    assert code == 78 and "none.jsonl): there is no such file" in message
    code, message = refused(job, "data.chat_template=nine", run_dir=tmp_path / "template")
    assert code == 78 and "chat_template (nine) is neither a file nor one of" in message
