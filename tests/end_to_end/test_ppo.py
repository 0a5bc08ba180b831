"""PPO as a user runs it: separate groups, a rule or a model as reward, killed and resumed, stopped, and bad input."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_xy.checkpoint.files import read_manifest, write_manifest
from megatron_xy.hf.convert import to_hf
from megatron_xy.hf.source import open_source
from megatron_xy.hf.verify import tensors_agree
from megatron_xy.report.verb import make_report
from megatron_xy.run_folder import read_exit
from tests.end_to_end.tiny_run import (
    CLOCK_KEYS,
    copy_run,
    hash_of,
    live_rank_at,
    metrics_of,
    processes_naming,
    run_command,
    run_to_end,
    started,
    wait_for_end,
    wait_until,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from train_tokenizer import train

VOCAB_SIZE, STEPS, ANSWERS = 400, 6, 8
CLOCKS = {*CLOCK_KEYS, "idle_share_by_role", "seconds_by_role", "tokens_per_second_by_phase"}
RULE = """
def share_of_e(prompts, responses, rows):
    assert all(row["prompt"] == prompt for row, prompt in zip(rows, prompts))
    return [response.count("e") / max(len(response), 1) for response in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, prompts, and given answers."""
    folder = tmp_path_factory.mktemp("ppo")
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 7))) for _ in range(300)]
    texts = [" ".join(source.choices(words, k=source.randint(3, 12))) for _ in range(600)]
    (folder / "tokenizer.model").write_bytes(train(texts, vocab_size=VOCAB_SIZE))
    with (folder / "prompts.jsonl").open("w") as stream:
        for text in texts[:20]:
            stream.write(json.dumps({"prompt": text[:30]}) + "\n")
    with (folder / "responses.jsonl").open("w") as stream:
        for number in range(STEPS * ANSWERS):
            tokens = [source.randrange(10, VOCAB_SIZE) for _ in range(number % 7)]
            stream.write(json.dumps({"response_tokens": [*tokens, 2] if number % 3 else [*tokens, 11]}) + "\n")
    write_ppo(folder, folder / "ppo.yaml")
    return folder


def write_ppo(folder: Path, path: Path, **sections: dict[str, Any]) -> Path:
    """Actor on ranks 0 and 1, critic on 2 and 3, reference beside the critic, reward beside the actor."""
    config: dict[str, Any] = {
        "task": "ppo",
        "run_dir": str(path.parent / "never-made"),
        "model": {
            "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
            "num_query_groups": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 128,
        },
        "data": {"tokenizer": str(folder / "tokenizer.model")},
        "training": {"train_iters": STEPS, "micro_batch_tokens": 128},
        "optimizer": {
            "lr": 1.0e-3, "min_lr": 1.0e-4, "lr_warmup_iters": 2, "lr_decay_iters": STEPS, "adam_eps": 1.0e-6,
        },
        "checkpoint": {"save_interval": 2, "keep_latest": 2},
        "runtime": {"timeout_seconds": 30},
        "roles": {
            "actor": {"ranks": "0-1", "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
            "critic": {"ranks": "2-3", "parallel": {"pipeline_model_parallel_size": 2}, "optimizer": {"lr": 2.0e-3}},
            "reference": {"ranks": 3},
            "reward": {"ranks": "0-1"},
        },
        "ppo": {
            "prompts": str(folder / "prompts.jsonl"), "responses": str(folder / "responses.jsonl"),
            "rollout_batch_size": ANSWERS, "mini_batch_size": 4, "ppo_epochs": 2, "max_response_length": 12,
            "kl_target": 0.5, "reward_normalization": "running", "missing_end": "penalty",
            "missing_end_penalty": 0.5, "dump_rollouts": True,
        },
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    ended = run_to_end(run_command(folder / "ppo.yaml", f"run_dir={run_dir}", "checkpoint.hf_interval=4", ranks=4))
    assert ended.code == 0, ended
    return run_dir


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]


def test_metrics_rollouts_samples_and_checkpoints(unbroken: Path, folder: Path) -> None:
    records = metrics_of(unbroken)
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    wanted = {
        "score_mean", "reward_mean", "kl", "entropy", "actor_loss", "critic_loss", "actor_grad_norm",
        "critic_grad_norm", "ratio_first_max", "clip_fraction", "value_clip_fraction", "explained_variance",
        "response_length_mean", "end_rate", "seconds_by_phase", "seconds_by_role", "idle_share_by_role", "lr",
        "tokens_per_second_by_phase", "consumed_samples", "skipped",
    }  # fmt: skip
    every_task = {
        "iteration", "data_step", "bucket", "loss", "loss_by_source", "num_loss_tokens", "grad_norm", "lr",
        "consumed_samples", "consumed_tokens", "padding_ratio", "step_seconds", "data_wait_seconds",
        "tokens_per_second", "mfu", "hfu", "skipped",
    }  # fmt: skip
    assert wanted | every_task <= set(records[0])
    for record in records:
        assert (record["loss"], record["grad_norm"]) == (record["actor_loss"], record["actor_grad_norm"])
        assert 0 < record["padding_ratio"] < 1 and 0 < record["mfu"] == record["hfu"]
        assert 0 < record["data_wait_seconds"] < record["step_seconds"]
    lengths = [1 + number % 7 for number in range(ANSWERS)]
    assert (records[0]["bucket"], records[0]["num_loss_tokens"]) == (128, sum(lengths))
    assert abs(records[0]["kl"]) < 1e-5  # the reference starts as the actor does
    assert abs(records[-1]["kl"]) > 1e-4
    assert all(abs(record["ratio_first_max"] - 1) < 1e-5 for record in records)
    assert all(record["actor_grad_norm"] > 0 for record in records)
    assert len({record["kl_coef"] for record in records}) > 1
    assert not any(record["skipped"] for record in records)
    assert set(records[0]["idle_share_by_role"]) == {"actor", "critic", "reference", "reward"}
    dump = load_file(unbroken / "rollouts" / "iter_0000001.safetensors")
    assert set(dump) == {
        "tokens", "prompt_lengths", "response_mask", "logprobs", "ref_logprobs", "values", "scores", "rewards",
        "advantages", "returns",
    }  # fmt: skip
    assert dump["scores"].shape == (ANSWERS,)
    assert dump["logprobs"].shape == dump["rewards"].shape == dump["response_mask"].shape
    assert dump["response_mask"].sum(dim=1).tolist() == lengths
    answers = [row[start : start + length] for row, start, length in zip(
        dump["tokens"].tolist(), dump["prompt_lengths"].tolist(), lengths, strict=True
    )]  # fmt: skip
    given = [json.loads(line)["response_tokens"] for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert answers == given[: len(answers)]
    told = [json.loads(line) for line in (unbroken / "samples.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["kind"]) for row in told] == [
        (iteration, kind) for iteration in range(1, STEPS + 1) for kind in ("best", "worst")
    ]
    assert [row["score"] for row in told[:2]] == [float(dump["scores"].max()), float(dump["scores"].min())]
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert all(row["prompt"] == prompts[row["line"] - 1] and row["response"] for row in told if row["num_tokens"] > 1)
    names = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert names == ["iter_0000004", "iter_0000006"]
    assert hash_of(unbroken / "checkpoints" / names[-1] / "actor")
    assert [path.name for path in (unbroken / "hf").iterdir()] == ["iter_0000004"]
    actor, released = unbroken / "checkpoints" / "iter_0000004" / "actor", unbroken / "hf" / "iter_0000004"
    assert tensors_agree(open_source("ckpt", actor), open_source("hf", released), say=print)
    assert "| score mean of the last step |" in (released / "README.md").read_text()
    assert "value_head.weight" in hash_of(unbroken / "checkpoints" / names[-1] / "critic")


def test_the_report_has_pictures_and_a_summary(unbroken: Path) -> None:
    page = make_report(unbroken)
    assert {"scores.png", "policy.png", "losses.png", "time.png"} <= {path.name for path in page.parent.iterdir()}
    summary = json.loads((page.parent / "summary.json").read_text())
    assert summary["last_score_mean"] == pytest.approx(
        sum(record["score_mean"] for record in metrics_of(unbroken)) / STEPS
    )
    assert "the critic: idle share" in page.read_text() and "tokens/s of phase generate" in page.read_text()
    assert "Answers of the last step" in page.read_text()


def test_killed_and_resumed_equals_unbroken(unbroken: Path, folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = run_command(folder / "ppo.yaml", f"run_dir={run_dir}", ranks=4, restarts=1)
    with started(command) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=3, iteration=4), process=process)
        os.kill(live_rank_at(run_dir, rank=3, iteration=4) or 0, signal.SIGKILL)
        ended = wait_for_end(process)
    assert ended.code == 0, ended
    assert "checkpoint of critic of step 6 written" in ended.out, "by a rank that leads nothing else"
    assert without_clock(metrics_of(run_dir)) == without_clock(metrics_of(unbroken))
    for role in ("actor", "critic"):
        last = Path("checkpoints", f"iter_{STEPS:07d}", role)
        assert hash_of(run_dir / last) == hash_of(unbroken / last)


def lose(checkpoint: Path, *keys: str, value: Any) -> None:
    """Sets what a checkpoint keeps in its state under `keys` to what a fresh run has."""
    manifest = read_manifest(checkpoint)
    state = manifest.state
    for key in keys[:-1]:
        state = state[key]
    assert state[keys[-1]] != value, "what is lost was there"
    state[keys[-1]] = value
    write_manifest(checkpoint, manifest)


LOST: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "the adapted coefficient": ("actor", ("ppo", "kl_coef"), 0.05),
    "the running statistics of rewards": ("actor", ("ppo", "moments", "count"), 0.0),
    "the place in the prompts and the sampling": ("actor", ("consumed_samples",), 0),
    "how often the actor's optimizer stepped": ("actor", ("optimizer_steps",), 0),
    "how often the critic's optimizer stepped": ("critic", ("optimizer_steps",), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [None, *LOST, "the reference moved along"])
def test_whatever_is_lost_on_resume_shows(lost: str | None, unbroken: Path, folder: Path, tmp_path: Path) -> None:
    run_dir = copy_run(unbroken, tmp_path / "run", iterations=[4])
    checkpoint = run_dir / "checkpoints" / "iter_0000004"
    overrides = [f"run_dir={run_dir}"]
    if lost in LOST:
        part, keys, value = LOST[lost]
        lose(checkpoint / part, *keys, value=value)
    elif lost is not None:
        overrides.append(f"roles.reference.model={{load: ckpt:{checkpoint / 'actor'}}}")
        overrides.append("checkpoint.allow_changes=true")
    ended = run_to_end(run_command(folder / "ppo.yaml", *overrides, ranks=4))
    assert ended.code == 0, ended
    assert "resuming from" in ended.out
    is_same = without_clock(metrics_of(run_dir)) == without_clock(metrics_of(unbroken)) and all(
        hash_of(run_dir / last) == hash_of(unbroken / last)
        for last in (Path("checkpoints", f"iter_{STEPS:07d}", role) for role in ("actor", "critic"))
    )
    assert is_same is (lost is None)


@pytest.mark.parametrize(("change", "coefficient"), [("ppo.kl_coef=0.2", 0.2), ("ppo.kl_target=null", 0.05)])
def test_a_kl_coefficient_that_is_new_or_fixed_is_the_configs(
    change: str, coefficient: float, unbroken: Path, folder: Path, tmp_path: Path
) -> None:
    """A release that a kill cut off is made up for, and of the abandoned steps no rollout stays."""
    assert metrics_of(unbroken)[4]["kl_coef"] not in (0.05, 0.2), "it was adapted there"
    run_dir = copy_run(unbroken, tmp_path / "run", iterations=[4])
    shutil.copytree(unbroken / "rollouts", run_dir / "rollouts")
    options = (f"run_dir={run_dir}", "training.train_iters=5", "checkpoint.hf_interval=4", change)
    ended = run_to_end(run_command(folder / "ppo.yaml", *options, ranks=4))
    assert ended.code == 0, ended
    assert metrics_of(run_dir)[4]["kl_coef"] == coefficient
    assert len(list((run_dir / "rollouts").iterdir())) == 5
    released = Path("hf", "iter_0000004", "model.safetensors")
    assert (run_dir / released).read_bytes() == (unbroken / released).read_bytes()


@pytest.mark.slow
def test_another_placement_goes_on_with_the_same_numbers(unbroken: Path, folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = run_to_end(run_command(folder / "ppo.yaml", f"run_dir={run_dir}", "training.train_iters=3", ranks=4))
    assert first.code == 0, first
    alone = {"roles": {name: {"ranks": 0} for name in ("actor", "critic", "reference", "reward")}}
    alone["roles"]["critic"]["optimizer"] = {"lr": 2.0e-3}  # type: ignore[assignment]
    config = write_ppo(folder, tmp_path / "alone.yaml", **alone)
    second = run_to_end(run_command(config, f"run_dir={run_dir}", ranks=1))
    assert second.code == 0, second
    assert "changed since the checkpoint: roles.critic.parallel.pipeline_model_parallel_size 2 -> 1" in second.out
    for found, wanted in zip(metrics_of(run_dir), metrics_of(unbroken), strict=True):
        for name in ("critic_loss", "critic_grad_norm", "actor_grad_norm", "kl", "entropy"):
            assert found[name] == pytest.approx(wanted[name], rel=2e-3, abs=2e-5), (found["iteration"], name)


@pytest.mark.slow
def test_roles_begin_as_hf_folders_as_they_do_as_checkpoints(unbroken: Path, folder: Path, tmp_path: Path) -> None:
    last, dumps = unbroken / "checkpoints" / f"iter_{STEPS:07d}", []
    for name in ("actor", "critic"):
        to_hf(open_source("ckpt", last / name), tmp_path / name, dtype=None, tokenizer=None, say=print)
    of = {"actor": "actor", "reference": "actor", "critic": "critic", "reward": "critic"}
    for kind, origin in (("ckpt", last), ("hf", tmp_path)):
        run_dir = tmp_path / f"run-{kind}"
        loads = [f"roles.{role}.model={{load: {kind}:{origin / name}}}" for role, name in of.items()]
        command = run_command(folder / "ppo.yaml", f"run_dir={run_dir}", "training.train_iters=1", *loads, ranks=4)
        ended = run_to_end(command)
        assert ended.code == 0, ended
        assert abs(metrics_of(run_dir)[0]["kl"]) < 1e-4  # the reference is what the actor begins as
        dumps.append(load_file(run_dir / "rollouts" / "iter_0000001.safetensors"))
    assert dumps[0].keys() == dumps[1].keys()
    for name, tensor in dumps[0].items():
        assert torch.equal(tensor, dumps[1][name]), name
    fresh = load_file(unbroken / "rollouts" / "iter_0000001.safetensors")
    assert not torch.equal(fresh["values"], dumps[0]["values"]), "what is loaded is not what a fresh run draws"


def test_a_rule_in_place_of_the_reward_model_stopped_and_resumed(folder: Path, tmp_path: Path) -> None:
    """Its file is edited meanwhile: what a checkpoint tells is the one that has judged."""
    run_dir, rule = tmp_path / "run", tmp_path / "rule.py"
    rule.write_text(RULE)
    config = write_ppo(
        folder,
        tmp_path / "rule.yaml",
        model={"vocab_size": VOCAB_SIZE + 9},  # rows that the tokenizer does not know, as many a published model has
        ppo={"reward_function": f"{rule}:share_of_e", "responses": None},
    )
    values = yaml.safe_load(config.read_text())
    del values["roles"]["reward"]
    config.write_text(yaml.safe_dump(values))
    with started(run_command(config, f"run_dir={run_dir}", ranks=4)) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=0, iteration=2), process=process)
        rule.unlink()
        process.send_signal(signal.SIGTERM)
        ended = wait_for_end(process)
    assert ended.code == 75, ended
    rule.write_text(RULE)
    newest = max((run_dir / "checkpoints").iterdir())
    told = read_manifest(newest / "critic").state["settings"]["ppo.reward_function"]
    assert told == f"{rule}:share_of_e (sha256 {hashlib.sha256(RULE.encode()).hexdigest()[:12]})"
    ended = run_to_end(run_command(config, f"run_dir={run_dir}", ranks=4))
    assert ended.code == 0, ended
    records = metrics_of(run_dir)
    assert [record["iteration"] for record in records] == list(range(1, STEPS + 1))
    assert 0 < records[0]["score_mean"] < 1
    said = [load_file(path)["tokens"].max() for path in (run_dir / "rollouts").iterdir()]
    assert max(said) >= VOCAB_SIZE, "no answer tried what this is about"


def refused(config: Path, *overrides: str) -> tuple[int, str]:
    ended = run_to_end(run_command(config, *overrides, ranks=4))
    return ended.code, ended.out + ended.err


def test_bad_input_is_named_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    path = tmp_path / "long.jsonl"
    rows = [*[{"response_tokens": [5, 2]}] * 3, {"response_tokens": [3] * 13}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = refused(folder / "ppo.yaml", run_dir, f"ppo.responses={path}", "training.train_iters=1")
    assert code == 65 and f"{path}:4: response_tokens has 13 tokens, must have 1 to 12" in said, said
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "word " * 400}) + "\n")
    code, said = refused(folder / "ppo.yaml", run_dir, f"ppo.prompts={prompts}")
    assert code == 65 and f"{prompts}:1: the prompt has" in said, said
    code, said = refused(folder / "ppo.yaml", run_dir, "roles.reward.model.vocab_size=500")
    assert code == 78 and "roles.reward has a vocabulary of 500, the actor one of 400" in said, said


def test_a_run_goes_on_with_what_it_draws_and_learns(unbroken: Path, folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken / "checkpoints", run_dir / "checkpoints")
    longer = (f"run_dir={run_dir}", "training.train_iters=7", "ppo.rollout_batch_size=4")
    code, said = refused(folder / "ppo.yaml", *longer)
    assert code == 78 and "ppo.rollout_batch_size (4) is 8 in" in said, said
    assert "checkpoint.allow_changes=true" in said


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_skipped_and_told_until_it_is_too_often(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    given = (f"run_dir={run_dir}", "training.max_skipped_in_a_row=3", "ppo.entropy_coef=1.0e+300")
    ended = run_to_end(run_command(folder / "ppo.yaml", *given, "ppo.missing_end_penalty=0", ranks=4))
    assert ended.code == 65, ended
    assert [record["skipped"] for record in metrics_of(run_dir)] == [True] * 3
    assert "SKIPPED 4 of 4 updates of the actor: gradient not finite" in ended.out
    assert "all updates of the actor were skipped in 3 steps in a row, up to step 3" in ended.err


def test_where_no_answer_ended_the_actor_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Under `missing_end: mask` nothing is left to learn from: no step of momentum or weight decay, and it is said.

    A row of such steps is counted over a resume, too."""
    run_dir, responses = tmp_path / "run", tmp_path / "cut.jsonl"
    responses.write_text(json.dumps({"response_tokens": [20, 30, 11]}) + "\n")
    responses.write_text(responses.read_text() * (3 * ANSWERS))
    given = (f"run_dir={run_dir}", f"ppo.responses={responses}", "ppo.missing_end=mask", "ppo.missing_end_penalty=0")
    steps = ("checkpoint.save_interval=1", "training.max_skipped_in_a_row=3")
    ended = run_to_end(run_command(folder / "ppo.yaml", *given, *steps, "training.train_iters=2", ranks=4))
    assert ended.code == 0, ended
    ended = run_to_end(run_command(folder / "ppo.yaml", *given, *steps, "training.train_iters=3", ranks=4))
    assert "SKIPPED 4 of 4 updates of the actor: no answer that ended to learn from" in ended.out
    assert ended.code == 65 and "no answer that ended to learn from; raise ppo.max_response_length" in ended.err, ended
    for record in metrics_of(run_dir):
        assert record["skipped"] and record["actor_grad_norm"] == 0.0 < record["critic_grad_norm"]
    first, second = (run_dir / "checkpoints" / f"iter_{number:07d}" for number in (1, 2))
    assert hash_of(first / "actor") == hash_of(second / "actor")
    assert hash_of(first / "critic") != hash_of(second / "critic")


FLIP = """
import os
import torch
from megatron_xy.checkpoint import replicas

weight_sums = replicas._weight_sums

def flipped(role):
    if role.name == "critic" and os.environ["RANK"] == "3":
        next(iter(role.named_parameters())).parameter.detach().view(torch.int32)[0, 0] ^= 1
    return weight_sums(role)

replicas._weight_sums = flipped

def score(prompts, responses, rows):
    return [1.0] * len(rows)
"""


def test_replicas_of_the_critic_that_part_end_the_run_before_a_save(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "flip.py").write_text(FLIP)
    config = write_ppo(folder, tmp_path / "flip.yaml", ppo={"reward_function": f"{tmp_path / 'flip.py'}:score"})
    values = yaml.safe_load(config.read_text())
    del values["roles"]["reward"]
    values["roles"]["critic"]["parallel"] = {}
    config.write_text(yaml.safe_dump(values))
    run_dir = tmp_path / "run"
    code, said = refused(config, f"run_dir={run_dir}")
    record = read_exit(run_dir)
    assert code == 76 and record is not None, said
    assert "ranks 2, 3 hold other weights" in record.message and "before the update of step 2" in record.message
    assert not list((run_dir / "checkpoints").glob("iter_*"))


def test_a_score_that_is_no_number_ends_the_run_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "nan.py").write_text("def score(prompts, responses, rows):\n    return [float('nan')] * len(rows)\n")
    config = write_ppo(folder, tmp_path / "nan.yaml", ppo={"reward_function": f"{tmp_path / 'nan.py'}:score"})
    values = yaml.safe_load(config.read_text())
    del values["roles"]["reward"]
    config.write_text(yaml.safe_dump(values))
    run_dir = tmp_path / "run"
    code, said = refused(config, f"run_dir={run_dir}")
    record = read_exit(run_dir)
    assert code == 65 and record is not None, said
    assert "ppo.reward_function gave nan for an answer to the prompt on line" in record.message
    assert "prompts.jsonl; it must give finite numbers" in record.message


@contextmanager
def busy_disks(path: Path) -> Iterator[None]:
    """Inside, a thread writes 8 MiB a second to a file and waits for the disk."""
    is_over = threading.Event()

    def write() -> None:
        while not is_over.wait(1.0):
            with path.open("wb") as stream:
                stream.write(os.urandom(2**23))
                os.fsync(stream.fileno())

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_a_hung_role_ends_the_run_by_name(folder: Path, tmp_path: Path) -> None:
    """As soon as it would alone, while another process keeps the machine's disks busy."""
    run_dir = tmp_path / "run"
    config = write_ppo(folder, tmp_path / "hung.yaml", runtime={"timeout_seconds": 4})
    with started(run_command(config, f"run_dir={run_dir}", "training.train_iters=5", ranks=4)) as process:
        wait_until(lambda: live_rank_at(run_dir, rank=2, iteration=2), process=process)
        os.kill(live_rank_at(run_dir, rank=2, iteration=2) or 0, signal.SIGSTOP)
        stopped = time.monotonic()
        with busy_disks(tmp_path / "written"):
            ended = wait_for_end(process)
    assert ended.code == 76, ended
    assert time.monotonic() - stopped < 34  # about 8 s on an idle machine; ten times the timeout where disks count
    record = read_exit(run_dir)
    assert record is not None
    assert "rank 2" in record.message and "critic" in record.message
    assert not processes_naming(str(config))
