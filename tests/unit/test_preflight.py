"""What `check --paths` says of the run folder and of the weights that a run loads: whether it can begin with them."""

import json
import os
import shutil
import signal
import tempfile

import pytest

from megatron_xy import preflight
from megatron_xy.checkpoint.continuation import facts
from megatron_xy.checkpoint.files import Manifest, write_manifest
from megatron_xy.checkpoint.folders import iteration_folder
from megatron_xy.config import InvalidConfig, load_config
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.hf.convert import to_checkpoint
from megatron_xy.hf.source import open_source
from megatron_xy.preflight import check_paths, open_data
from megatron_xy.run_dir import check_space
from tests.building import build_dataset
from tests.unit.hollow_weights import hf_folder
from tests.unit.small_corpus import texts, train_tokenizer, write_rows


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    base = tmp_path_factory.mktemp("preflight")
    corpus = write_rows(base / "corpus.jsonl", [{"text": text} for text in texts(40)])
    build_dataset([corpus], tokenizer=train_tokenizer(base / "tokenizer.model"), output=base / "data", buckets=(16, 64))
    return base / "data"


@pytest.fixture
def config(built, tmp_path):
    """Of overrides, a config whose run folder, TMP/runs/one, holds a checkpoint of iteration 8."""
    shape = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 300}
    training = {"global_batch_tokens": 256, "micro_batch_tokens": 64}
    sections = {"model": shape, "data": {"path": str(built)}, "training": training}
    (tmp_path / "run.yaml").write_text(json.dumps({"run_dir": str(tmp_path / "runs" / "one"), **sections}))

    def of(*overrides):
        return load_config(tmp_path / "run.yaml", overrides=overrides)

    first = of()
    stored = facts(first, model=first.model, data_fingerprints=PackedDataset([built]).fingerprints)
    folder = iteration_folder(first.run_dir / "checkpoints", 8)
    folder.mkdir(parents=True)
    place = {"iteration": 8, "data_step": 8, "consumed_samples": 0, "consumed_tokens": 0, "optimizer_steps": 8}
    write_manifest(folder, Manifest({**place, **stored, "world_size": 1}, tensors={}, files={}))
    return of


def test_what_the_run_would_not_go_on_with_is_found_before_it(config):
    check_paths(config())
    check_paths(config("checkpoint.resume=8"))
    check_paths(config("model.num_layers=3", "checkpoint.resume=never"))
    check_paths(config("seed=5", "checkpoint.allow_changes=true"))
    for override, told in {
        "model.num_layers=3": r"model\.num_layers \(3\) is 2 in .*iter_0000008: a run goes on with the model it has",
        "model.rotary_base=500000": r"model\.rotary_base \(500000\.0\) is 10000\.0 in .*iter_0000008",
        "seed=5": r"seed \(5\) is 1234 in .*checkpoint\.allow_changes=true",
        "checkpoint.resume=6": r"checkpoint\.resume \(6\): .* holds no such iteration; there are: 8",
    }.items():
        with pytest.raises(ConfigError, match=told):
            check_paths(config(override))


def test_check_paths_looks_at_all_shards_in_whatever_world_it_is_called(config, built, tmp_path, monkeypatch):
    data = tmp_path / "copy"
    shutil.copytree(built, data)
    for shard in data.glob("*/*/*.bin"):
        os.truncate(shard, 0)
        for rank, size in (("0", "7"), ("6", "7"), ("", "0")):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", size)
            with pytest.raises(DataError, match=rf"{shard.name} has 0 bytes"):
                check_paths(config(f"data.path={data}"))


def test_held_out_data_that_do_not_fit_are_named_themselves(config, built, tmp_path):
    corpus = write_rows(tmp_path / "held_out.jsonl", [{"text": text} for text in texts(10)])
    held_out = tmp_path / "held_out"
    build_dataset([corpus], tokenizer=built / "tokenizer.model", output=held_out, buckets=(24, 48))
    evaluated = f"data.eval_path={held_out}", "training.eval_interval=4"
    with pytest.raises(
        InvalidConfig, match=r"common multiple of the buckets of data\.eval_path \(.*held_out\) \(24, 48\)"
    ):
        check_paths(config(*evaluated))
    shorter = "model.max_position_embeddings=32", "training.micro_batch_tokens=192", "training.global_batch_tokens=768"
    with pytest.raises(InvalidConfig, match=r"largest bucket of .*held_out \(48\)"):
        check_paths(config(*evaluated, *shorter, "checkpoint.allow_changes=true"))


def test_what_is_wrong_with_the_data_is_not_told_of_the_rows_that_are_held_out_too(config, built, tmp_path):
    data = tmp_path / "copy"
    shutil.copytree(built, data)
    (data / "manifest.json").write_text("{")
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = write_rows(tmp_path / "held_out.jsonl", [{"messages": conversation}])
    tokenizer = f"data.tokenizer={built / 'tokenizer.model'}"
    evaluated = f"data.eval_path={rows}", "training.eval_interval=4"
    spoilt = config("task=sft", f"data.path={data}", tokenizer, *evaluated)
    for look in (check_paths, open_data):
        with pytest.raises(DataError) as raised:
            look(spoilt)
        assert str(raised.value).count("manifest.json") == 1


def test_a_stop_signal_leaves_no_folder_behind(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def stopped(_, findings, *, build_into):
        (build_into / "half").touch()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(preflight, "_look_at_data", stopped)
    with pytest.raises(SystemExit) as ended:
        check_paths(config())
    assert ended.value.code == 75 and capsys.readouterr().err == "stopped by SIGTERM; nothing is kept\n"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_damaged_newest_checkpoint_is_left_to_the_run_which_passes_it_over(config):
    checkpoints = config().run_dir / "checkpoints"
    newest = iteration_folder(checkpoints, 9)
    newest.mkdir()
    (newest / "manifest.json").write_text("{")
    check_paths(config())
    with pytest.raises(ConfigError, match=r"model\.num_layers \(3\) is 2 in .*iter_0000008"):
        check_paths(config("model.num_layers=3"))


def loading(tmp_path, kind, *, architecture):
    """A folder of the fixture's shape, and the override that loads it."""
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    folder = tmp_path / "hf"
    hf_folder(folder, architecture=architecture, vocab_size=300, max_position_embeddings=2048, **shape, **heads)
    if kind == "ckpt":
        to_checkpoint(open_source("hf", folder), tmp_path / "ckpt", dtype=None, say=print)
    return tmp_path / kind, f"model.load={kind}:{tmp_path / kind}"


@pytest.mark.parametrize(
    ("kind", "file", "size", "told"),
    [
        ("hf", "model.safetensors", 3000, "is damaged: 3000 bytes instead of"),
        ("hf", "model.safetensors", None, "holds neither model.safetensors nor"),
        ("ckpt", "rank-00000-of-00001.safetensors", 3000, "is damaged: 3000 bytes instead of"),
        ("ckpt", "rank-00000-of-00001.safetensors", None, "is missing from the checkpoint"),
    ],
)
def test_weights_that_a_run_begins_with_are_looked_at(config, tmp_path, kind, file, size, told):
    folder, load = loading(tmp_path, kind, architecture="LlamaForCausalLM")
    check_paths(config(load, "checkpoint.resume=never"))
    (folder / file).unlink() if size is None else os.truncate(folder / file, size)
    with pytest.raises(DataError, match=rf"^model\.load: .*{told}"):
        check_paths(config(load, "checkpoint.resume=never"))
    check_paths(config(load))  # it goes on from its checkpoint


@pytest.mark.parametrize("kind", ["hf", "ckpt"])
def test_a_reward_model_is_no_beginning_of_a_language_model(config, tmp_path, kind):
    folder, load = loading(tmp_path, kind, architecture="LlamaForSequenceClassification")
    told = rf"model\.load \({kind}:{folder}\) is a reward model or critic, which says nothing; name a language model"
    with pytest.raises(ConfigError, match=told):
        check_paths(config(load))


def test_a_run_folder_that_cannot_be_had_is_found_and_nothing_made(config, tmp_path):
    there = sorted(tmp_path.rglob("*"))
    check_paths(config(f"run_dir={tmp_path / 'not' / 'yet'}"))
    for place in (tmp_path / "run.yaml", tmp_path / "run.yaml" / "below"):
        with pytest.raises(ConfigError, match=r"run_dir \(.*run\.yaml.*\) must be a folder that can be made"):
            check_paths(config(f"run_dir={place}"))
    assert sorted(tmp_path.rglob("*")) == there


def test_checkpoints_for_which_the_disk_has_no_room_are_found_before_the_first_one(config, built):
    huge = (
        "model.num_layers=1000",
        "model.hidden_size=32768",
        "model.ffn_hidden_size=131072",
        "checkpoint.keep_latest=4",
        "training.train_iters=1000",
    )
    told = r"run_dir \(.*\) has [\d,.]+ MB free, and 1,030,.* needed, for 5 .*\.keep_latest \(4\) are .* 0 are there"
    with pytest.raises(StorageError, match=told):
        check_paths(config(*huge, f"run_dir={built.parent / 'another'}"))
    with pytest.raises(StorageError, match=r", and 824,.* 1 are there"):
        check_space(config(*huge), [config(*huge).model])
    few = config(*huge, "checkpoint.keep_latest=1000000", "training.train_iters=60", "checkpoint.save_interval=50")
    with pytest.raises(StorageError, match=r"needed, for 2 of"):  # of steps 50 and 60
        check_space(few, [few.model])
    restarted = config("checkpoint.resume=6")  # whose first start has gone on from there, and let go of it since
    check_space(restarted, [restarted.model])


def test_hf_folders_that_could_not_have_the_tokenizer_are_refused(config, tmp_path):
    check_paths(config("checkpoint.hf_interval=50"))
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(40)])
    tokenizer = train_tokenizer(tmp_path / "squeezed.model", remove_extra_whitespaces=True)
    build_dataset([corpus], tokenizer=tokenizer, output=tmp_path / "data", buckets=(16, 64))
    squeezed = config(f"data.path={tmp_path / 'data'}", "checkpoint.resume=never")
    check_paths(squeezed)
    squeezed = config(f"data.path={tmp_path / 'data'}", "checkpoint.resume=never", "checkpoint.hf_interval=50")
    told = rf"checkpoint\.hf_interval \(50\): .* {tmp_path}/data/tokenizer\.model .*: it removes .*; set it to 0, or"
    for look in (check_paths, open_data):
        with pytest.raises(InvalidConfig, match=told):
            look(squeezed)


def test_what_a_killed_save_left_counts_as_free(config):
    left = config().run_dir / "checkpoints" / ".tmp-iter_0000012" / "rank-00000-of-00001.safetensors"
    left.parent.mkdir()
    huge = config("model.num_layers=1000", "model.hidden_size=32768", "model.ffn_hidden_size=131072")
    with left.open("wb") as stream:
        stream.truncate(10**12)  # a hole: it takes no room
    with pytest.raises(StorageError, match=r"has 1,[\d,.]+ MB free, and 412,"):
        check_space(huge, [huge.model])
