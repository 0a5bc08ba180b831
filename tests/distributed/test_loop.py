"""The loop over real ranks: phases, spikes, skipped steps; resumed anywhere, against an unbroken run, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_xy.checkpoint import writer
from megatron_xy.checkpoint.files import read_manifest, verify_files
from megatron_xy.config import dump_config
from megatron_xy.data.dataset import PackedDataset, collate
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.inspection.plan_steps import trace_steps
from megatron_xy.hf.source import open_source
from megatron_xy.hf.verify import tensors_agree
from megatron_xy.losses import token_cross_entropy
from megatron_xy.training import evaluation
from megatron_xy.training.train_step import forward_pass, on_device
from tests.building import build_dataset
from tests.distributed import loop, models
from tests.distributed.spawn import run_ranks
from tests.end_to_end.tiny_run import BUCKETS, hash_of, make_data, metrics_of, without_clock


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


PHASES = [
    {"from_iter": 5, "weights": {"code": 9, "prose": 1}, "global_batch_tokens": 2048},
    {"from_iter": 9, "global_batch_tokens": 1024},
]
BY_TOKENS = {"lr_decay_iters": None, "lr_warmup_tokens": 4096, "lr_decay_tokens": 16384}


def test_phases_are_followed_and_a_run_broken_within_them_equals_the_unbroken_one(data, tmp_path):
    """lr by tokens, batch size, mixture and counters follow the phases; stops lie within and on their borders."""
    changes = {"training": {"phases": PHASES}, "optimizer": BY_TOKENS, "data": {"weights": {"code": 1, "prose": 9}}}
    whole, broken = (loop.config_of(data, tmp_path / name, **changes) for name in ("whole", "broken"))
    parts = [loop.until(broken, iteration) for iteration in (5, 7)]
    run_ranks(loop.train, whole, *parts, broken, world_size=2)
    records = metrics_of(tmp_path / "whole")
    assert without_clock(metrics_of(tmp_path / "broken")) == without_clock(records)
    last = "checkpoints/iter_0000012"
    assert hash_of(tmp_path / "broken" / last) == hash_of(tmp_path / "whole" / last)
    consumed = 0
    for record in records:
        assert record["iteration"] == record["data_step"] + 1
        consumed += 2048 if 5 <= record["data_step"] < 9 else 1024
        assert record["consumed_tokens"] == consumed
        want = 1e-2 * consumed / 4096 if consumed <= 4096 else None
        assert want is None or record["lr"] == pytest.approx(want, rel=1e-12)
    assert records[-1]["lr"] == pytest.approx(1e-3, rel=1e-12) and consumed == 16384
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    code = [record["num_loss_tokens_by_source"].get("code", 0) / record["num_loss_tokens"] for record in records]
    assert sum(code[5:]) / 7 > 0.75 > 0.3 > sum(code[:5]) / 5


def test_ranks_that_were_given_another_run_are_named_by_all(data, tmp_path):
    corpus = tmp_path / "other.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n} is a number", "source": "code"}) + "\n" for n in range(300)))
    build_dataset([corpus], tokenizer=data / "tokenizer.model", output=tmp_path / "other", buckets=BUCKETS)
    config = loop.config_of(data, tmp_path / "run")
    others = [loop.config_of(tmp_path / "other", tmp_path / "run"), config.model_copy(update={"seed": 7})]
    for other, told in zip(others, ("data.path (data.path: ", "seed (seed: 7 and not 1234); give every"), strict=True):
        ends = run_ranks(train_one_of, [config, config, other], world_size=3)
        assert len(set(ends)) == 1
        assert ends[0].startswith(f"78: all ranks must be given the same run: rank 2 differs from rank 0 in {told}")


def train_one_of(configs) -> str:
    return loop.train_into_an_error(configs[dist.get_rank()])


TWO_STAGES = [{"from_iter": 0, "train_only": ["embedding", "output_layer"]}, {"from_iter": 6}]


@pytest.mark.parametrize("distributed", [False, True], ids=["fp32", "bf16-distributed"])
def test_embedding_and_output_layer_train_first_then_everything(data, tmp_path, distributed):
    """The rest stays as it was, moments too, and begins afresh; a broken run is the unbroken one bit for bit."""
    parallel = {"use_distributed_optimizer": distributed, "overlap_grad_reduce": distributed}
    if not distributed:
        parallel["pipeline_model_parallel_size"] = 2
    changes = {
        "training": {"phases": TWO_STAGES},
        "parallel": parallel,
        "model": {"params_dtype": "bf16" if distributed else "fp32"},
        "checkpoint": {"save_interval": 1, "keep_latest": 20},
    }
    whole, broken = (loop.config_of(data, tmp_path / name, **changes) for name in ("whole", "broken"))
    run_ranks(loop.train, whole, *(loop.until(broken, stop) for stop in (3, 6, 8)), broken, world_size=2)
    assert without_clock(metrics_of(tmp_path / "broken")) == without_clock(metrics_of(tmp_path / "whole"))
    hashes = {number: hash_of(tmp_path / "whole" / "checkpoints" / f"iter_{number:07d}") for number in (1, 6, 7, 12)}
    assert hash_of(tmp_path / "broken" / "checkpoints" / "iter_0000012") == hashes[12]
    trained = {"embedding.word_embeddings.weight", "output_layer.weight"}
    weights = {name for name in hashes[12] if not name.startswith("optimizer.")}
    assert {name for name in weights if hashes[1][name] != hashes[6][name]} == trained
    assert {name for name in weights if hashes[6][name] == hashes[7][name]} == set()
    moments = {name.removeprefix("optimizer.exp_avg.") for name in hashes[6] if ".exp_avg." in name}
    assert moments == trained
    assert read_manifest(tmp_path / "whole" / "checkpoints" / "iter_0000012").state["frozen_updates"] == {"rest": 6}


def test_a_save_that_takes_long_keeps_the_counts_of_its_own_step(data, tmp_path):
    frozen = {"phases": [{"from_iter": 0, "train_only": ["embedding"]}], "train_iters": 7}
    config = loop.config_of(data, tmp_path / "run", training=frozen)
    run_ranks(train_while_step_4_is_written, config, world_size=1)
    state = read_manifest(config.run_dir / "checkpoints" / "iter_0000004").state
    assert state["frozen_updates"] == {"rest": 4, "output_layer": 4}
    assert saved_in(config.run_dir) == {4, 7}, "the last step is saved, too"


def train_while_step_4_is_written(config) -> None:
    """The shard of step 4 waits until two more steps are done."""
    write = writer.write_tensors

    def held_back(path, *arguments, **options):
        deadline = time.monotonic() + 60
        while "0000004" in str(path) and len(metrics_of(config.run_dir)) < 6:
            assert time.monotonic() < deadline, "training did not go on"
            time.sleep(0.01)
        return write(path, *arguments, **options)

    writer.write_tensors = held_back
    loop.train(config)


# Prose alone, but for one step of nothing but code: a spike, made of real data.
ONE_STRANGE_STEP = [
    {"from_iter": 30, "weights": {"code": 1, "prose": 0}},
    {"from_iter": 31, "weights": {"code": 0, "prose": 1}},
]


def test_a_spike_is_flagged_and_under_the_policy_skip_leaves_no_trace(data, tmp_path):
    def config(name, *, policy, train_iters=36):
        return loop.config_of(
            data,
            tmp_path / name,
            data={"weights": {"code": 0, "prose": 1}},
            training={"phases": ONE_STRANGE_STEP, "train_iters": train_iters, "spike_policy": policy},
            optimizer={"lr_decay_iters": 40},
            checkpoint={"save_interval": 6 if policy == "log" else 1, "keep_latest": 40},
        )

    logged, skipped, broken = (
        config("log", policy="log"),
        config("skip", policy="skip"),
        config("broken", policy="skip"),
    )
    run_ranks(loop.train, logged, skipped, loop.until(broken, 23), broken, world_size=2)
    for run in (logged, skipped):
        records = metrics_of(run.run_dir)
        assert [(record["iteration"], record["data_step"]) for record in records if record["spike"]] == [(31, 30)]
        assert [record["iteration"] for record in records if record["skipped"]] == ([31] if run is skipped else [])
        for record in records:
            parts = [record["seconds_by_phase"][name] for name in ("data", "forward_backward", "optimizer")]
            assert sum(parts) == pytest.approx(record["step_seconds"], rel=1e-6)
        (event,) = events_of(run.run_dir)
        assert (event["iteration"], event["data_step"], event["skipped"]) == (31, 30, run is skipped)
        assert "sigma above" in event["reasons"][0]
    (event,) = events_of(skipped.run_dir)
    (tmp_path / "run.yaml").write_text(dump_config(skipped))
    rows = list(trace_steps(data, config_path=tmp_path / "run.yaml", overrides=[], steps=range(30, 31)))
    assert {row["source"] for row in rows} == set(event["samples"]) == {"code"}
    assert sorted(row["sample"] for row in rows) == sorted(event["samples"]["code"])
    assert {row["bucket"] for row in rows} == {event["bucket"]} and all(row["documents"] for row in rows)

    at = [hash_of(skipped.run_dir / "checkpoints" / f"iter_{number:07d}") for number in (30, 31, 32)]
    assert at[0] == at[1] != at[2]
    assert metrics_of(logged.run_dir)[31]["loss"] != metrics_of(skipped.run_dir)[31]["loss"]
    assert without_clock(metrics_of(broken.run_dir)) == without_clock(metrics_of(skipped.run_dir))
    assert events_of(broken.run_dir) == events_of(skipped.run_dir)
    assert hash_of(broken.run_dir / "checkpoints" / "iter_0000032") == at[2]


def test_steps_that_are_skipped_again_and_again_end_the_run_with_65_on_all_ranks(data, tmp_path):
    config = loop.config_of(
        data, tmp_path / "run", optimizer={"lr": 1e30, "lr_warmup_iters": 0}, training={"max_skipped_in_a_row": 3}
    )
    ends = run_ranks(loop.train_into_an_error, config, world_size=2)
    assert len(set(ends)) == 1
    assert ends[0].startswith("65: the updates of 3 steps in a row were skipped (gradient not finite at step 4)")
    assert [record["skipped"] for record in metrics_of(config.run_dir)] == [False, True, True, True]
    events = events_of(config.run_dir)
    assert [event["iteration"] for event in events] == [2, 3, 4]
    assert all(event["grad_norm"] is None and event["reasons"] == ["gradient not finite"] for event in events)


def saved_in(run_dir: Path) -> set[int]:
    return {int(path.name.removeprefix("iter_")) for path in (run_dir / "checkpoints").glob("iter_*")}


def test_what_a_run_goes_back_to_from_a_row_of_skipped_steps_is_not_let_go_of(data, tmp_path):
    """Step 5's update spoils the weights: every later one is skipped and saved, and step 4's checkpoint stays."""
    keep_two = {"save_interval": 1, "keep_latest": 2, "allow_changes": True}
    config = loop.config_of(data, tmp_path / "run", checkpoint=keep_two, training={"max_skipped_in_a_row": 4})
    run_ranks(loop.train, loop.until(config, 4), world_size=1)
    assert saved_in(config.run_dir) == {3, 4}
    spoilt = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e30, "min_lr": 1e30})})
    (end,) = run_ranks(loop.train_into_an_error, spoilt, world_size=1)
    assert end.startswith("65: the updates of 4 steps in a row were skipped")
    assert saved_in(config.run_dir) == {4, 7, 8}


def test_a_damaged_checkpoint_that_was_passed_over_takes_no_place_of_a_whole_one(data, tmp_path):
    config = loop.config_of(data, tmp_path / "run", checkpoint={"save_interval": 4, "keep_latest": 2})
    run_ranks(loop.train, loop.until(config, 8), world_size=1)
    with (config.run_dir / "checkpoints/iter_0000008/rank-00000-of-00001.safetensors").open("r+b") as shard:
        shard.truncate(1000)
    later = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"save_interval": 5})})
    run_ranks(loop.train, loop.until(later, 10), world_size=1)
    assert saved_in(config.run_dir) == {5, 8, 10}
    for whole in (5, 10):
        folder = config.run_dir / "checkpoints" / f"iter_{whole:07d}"
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("policy", ["log", "skip"])
def test_a_step_without_any_label_is_skipped_and_says_so(data, tmp_path, policy):
    """One step draws nothing but documents of one token, which have no next one to learn."""
    corpus = tmp_path / "single.jsonl"
    corpus.write_text("".join(json.dumps({"text": letter, "source": "single"}) + "\n" for letter in "abcd" * 300))
    single = tmp_path / "single"
    build_dataset([corpus], tokenizer=data / "tokenizer.model", output=single, buckets=BUCKETS, source_field="source")
    config = loop.config_of(
        data,
        tmp_path / "run",
        data={"path": [str(data), str(single)], "weights": {"code": 1, "prose": 1, "single": 0}},
        training={
            "phases": [
                {"from_iter": 5, "weights": {"code": 0, "prose": 0, "single": 1}},
                {"from_iter": 6, "weights": {"code": 1, "prose": 1, "single": 0}},
            ],
            "spike_policy": policy,
        },
        checkpoint={"save_interval": 1, "keep_latest": 40},
    )
    run_ranks(loop.train, config, world_size=2)
    records = metrics_of(config.run_dir)
    assert [record["iteration"] for record in records if record["skipped"]] == [6]
    empty = records[5]
    assert (empty["loss"], empty["loss_by_source"], empty["num_loss_tokens"]) == (None, {}, 0)
    (event,) = events_of(config.run_dir)
    assert event["reasons"] == ["no label to learn from"] and set(event["samples"]) == {"single"}
    at = [hash_of(config.run_dir / "checkpoints" / f"iter_{number:07d}") for number in (5, 6, 7)]
    assert at[0] == at[1] != at[2]


def test_a_save_that_fails_in_the_background_ends_the_run_within_its_next_steps_with_74(data, tmp_path):
    config = loop.config_of(data, tmp_path / "run", checkpoint={"save_interval": 4})
    (end,) = run_ranks(train_with_files_up_to_64_kb, config, world_size=1)
    assert end.startswith("74: ") and "rank-00000-of-00001.safetensors cannot be written" in end
    assert 4 <= len(metrics_of(config.run_dir)) < 8, "not only the next save finds it"


def train_with_files_up_to_64_kb(config) -> str:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        return loop.train_into_an_error(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    """Of steps; that a rank is slow may be told besides, where the machine is busy."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in events if "straggler" not in event]


@pytest.mark.parametrize("resumed_at", [None, pytest.param(6, marks=pytest.mark.slow)])
def test_a_profile_is_written_for_its_window_on_the_ranks_named(data, tmp_path, resumed_at):
    config = loop.config_of(data, tmp_path / "run", runtime={"profile": "5:8", "profile_ranks": [1]})
    run_ranks(loop.train, *([] if resumed_at is None else [loop.until(config, resumed_at)]), config, world_size=2)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "rank-00001.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    updates = sum(name.startswith("Optimizer.step#") for name in names)
    assert updates == (3 if resumed_at is None else 1), "steps 5, 6 and 7; after a resume at 6, step 7"
    assert "aten::mm" in names


def test_a_window_that_a_run_in_epochs_does_not_reach_is_told(data, tmp_path):
    config = loop.config_of(data, tmp_path / "run", runtime={"profile": "2:4"})
    run_ranks(loop.train, loop.until(config, 1), world_size=1)
    (log,) = (tmp_path / "run" / "logs").glob("rank-*.log")
    assert "runtime.profile (2:4) begins after the last step (1): nothing is recorded" in log.read_text()


def test_a_resume_makes_up_for_an_export_that_a_kill_prevented_and_leaves_no_half(data, tmp_path):
    config = loop.config_of(data, tmp_path / "run", checkpoint={"hf_interval": 4})
    run_ranks(loop.train, loop.until(config, 8), world_size=2)
    exports = tmp_path / "run" / "hf"
    shutil.rmtree(exports / "iter_0000008")
    for name in (".tmp-iter_0000008", ".tmp-iter_0000010"):
        (exports / name).mkdir()
        (exports / name / "model.safetensors").write_bytes(b"half")
    run_ranks(loop.train, loop.until(config, 9), world_size=2)
    assert sorted(path.name for path in exports.iterdir()) == ["iter_0000004", "iter_0000008"]
    checkpoint = open_source("ckpt", tmp_path / "run" / "checkpoints" / "iter_0000008")
    assert tensors_agree(checkpoint, open_source("hf", exports / "iter_0000008"), say=print)


def test_evaluation_leaves_no_trace_and_a_resumed_run_evaluates_the_same(data, tmp_path):
    def config(name, interval, **parallel):
        evaluated = {"training": {"eval_interval": interval}, "data": {"eval_path": str(data)}} if interval else {}
        return loop.config_of(data, tmp_path / name, parallel=parallel, **evaluated)

    plain, whole, broken = config("plain", 0), config("whole", 5), config("broken", 5)
    run_ranks(loop.train, plain, whole, loop.until(broken, 7), broken, world_size=2)
    assert without_clock(metrics_of(plain.run_dir)) == without_clock(metrics_of(whole.run_dir))
    last = "checkpoints/iter_0000012"
    assert hash_of(plain.run_dir / last) == hash_of(whole.run_dir / last) == hash_of(broken.run_dir / last)
    records = evaluations_of(whole.run_dir)
    assert [record["iteration"] for record in records] == [5, 10, 12]
    assert [record for record in evaluations_of(broken.run_dir) if record["iteration"] != 7] == records
    for record in records:
        assert set(record["loss_by_source"]) == {"code", "prose"}
        assert set(record["loss_by_position"]) == {"0-2k"}
        assert record["loss_by_position"]["0-2k"] == pytest.approx(record["loss"], rel=1e-12)
    assert records[-1]["loss"] < records[0]["loss"]


def evaluated_twice(folder: Path) -> tuple[Any, Any]:
    """On one rank: what an evaluation tells, and sums and counts of the same sample by sample, token by token."""
    one_layer = models.MODEL.model_copy(update={"num_layers": 1})
    role = models.make_role(models.Layout(dp=dist.get_world_size()), model=one_layer)
    assert role is not None
    evaluation.POSITION_RANGES = {"0-8": 0, "8-64": 8, "64-": 64}
    whole = PackedDataset([folder])
    streams = [dataclasses.replace(stream, num_samples=7) for stream in whole.streams]
    data: Any = SimpleNamespace(buckets=whole.buckets, sources=whole.sources, sample=whole.sample, streams=streams)
    sizes = {"micro_batch_tokens": 2 * BUCKETS[-1], "micro_batches_per_pass": 2}
    held_out = evaluation.HeldOut(data, split_documents=True, **sizes)
    assert len(held_out.rows()) % role.groups.dp_size, "the last row is run again, and counts nothing"
    assert any(len(ids) * bucket < 2 * BUCKETS[-1] for bucket, ids in held_out.rows()), "nor does what fills one up"
    told = evaluation.evaluate(role, held_out, goes_on=lambda: True)

    def losses(batch: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        tp_group = role.groups.collection.tp
        return {"losses": token_cross_entropy(logits, batch.labels, vocab_size=models.VOCAB_SIZE, tp_group=tp_group)}

    sums: dict[str, dict[str, list[float]]] = {"bucket": {}, "source": {}, "position": {}}
    for stream in streams:
        for index in range(stream.num_samples):
            sample = data.sample(SampleId(stream.source, stream.bucket, index))
            alone = {"source_indices": [0], "split_documents": True}
            batch = on_device(collate([sample], bucket=stream.bucket, micro_batch_tokens=stream.bucket, **alone))
            (found,) = forward_pass(role, [batch], losses)
            columns = found["losses"][0], batch.loss_mask[0], batch.packed.position_ids
            for loss, counts, position in zip(*(column.tolist() for column in columns), strict=True):
                reach = "0-8" if position < 8 else "8-64" if position < 64 else "64-"
                keys = {"bucket": str(stream.bucket), "source": stream.source, "position": reach}
                for name, key in keys.items() if counts else ():
                    pair = sums[name].setdefault(key, [0.0, 0])
                    pair[0] += loss
                    pair[1] += 1
    return told, sums


def test_an_evaluation_counts_every_token_once_under_its_bucket_source_and_position(data):
    for told, sums in run_ranks(evaluated_twice, data, world_size=2):
        for name, pairs in sums.items():
            assert told["num_loss_tokens"] == sum(count for _, count in pairs.values())
            means = {key: total / count for key, (total, count) in pairs.items()}
            assert told[f"loss_by_{name}"] == pytest.approx(means, rel=1e-5)


@pytest.mark.slow
def test_every_layout_evaluates_to_the_same_numbers(data, tmp_path):
    layouts = {"alone": (1, {}), "tp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
               "vp": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
               "overlap": (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
                               "overlap_param_gather": True})}  # fmt: skip
    found = {}
    for name, (ranks, parallel) in layouts.items():
        config = loop.config_of(
            data, tmp_path / name, parallel=parallel, model={"num_layers": 4}, data={"eval_path": str(data)},
            training={"eval_interval": 1, "train_iters": 1}, optimizer={"lr": 1e-2, "min_lr": 1e-2},
        )  # fmt: skip
        run_ranks(loop.train, config, world_size=ranks)
        (found[name],) = evaluations_of(config.run_dir)
    for record in found.values():
        assert record["num_loss_tokens"] == found["alone"]["num_loss_tokens"]
        assert record["loss"] == pytest.approx(found["alone"]["loss"], rel=1e-5)
        for field in ("loss_by_bucket", "loss_by_source", "loss_by_position"):
            assert record[field] == pytest.approx(found["alone"][field], rel=1e-5)


def evaluations_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]


def test_a_continued_run_says_and_keeps_what_it_changes(data, tmp_path):
    first = loop.config_of(data, tmp_path / "first", training={"train_iters": 4})
    run_ranks(loop.train, first, world_size=1)
    load = f"ckpt:{first.run_dir}/checkpoints/iter_0000004"
    new = {"load": load, "rotary_base": 500000, "max_position_embeddings": 512}
    second = loop.config_of(data, tmp_path / "second", model=new, training={"train_iters": 8})
    run_ranks(loop.train, loop.until(second, 4), second, world_size=1)
    told = (second.run_dir / "logs" / "rank-00000.log").read_text()
    assert f"model.rotary_base is 500000.0 from here on; it was 10000.0 in {load}" in told
    assert f"model.max_position_embeddings is 512 from here on; it was {BUCKETS[-1]} in {load}" in told
    for iteration in (4, 8):
        state = read_manifest(second.run_dir / "checkpoints" / f"iter_{iteration:07d}").state
        changes = {"rotary_base": [10000.0, 500000.0], "max_position_embeddings": [BUCKETS[-1], 512]}
        assert state["continued_from"] == {"load": load, "changes": changes}
