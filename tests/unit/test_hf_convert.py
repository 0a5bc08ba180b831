"""Conversion between checkpoint and HF folder: byte-equal round trips, whole or absent, and what is refused."""

import errno
import json
import os
import re
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_xy.checkpoint import files
from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError, DataError, StorageError, UsageError
from megatron_xy.hf import convert, release, verb
from megatron_xy.hf import target as hf_target
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.convert import to_checkpoint, to_hf
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.reader import DTYPES, INDEX, hf_manifest
from megatron_xy.hf.source import open_source
from megatron_xy.hf.verify import tensors_agree
from megatron_xy.inference import model_ranks
from megatron_xy.model.source import resolve_model
from megatron_xy.runtime.liveness import SIGNS
from megatron_xy.tensors import block_reader
from megatron_xy.tensors.files import TensorReader, dtype_name, torch_dtype, write_tensors
from megatron_xy.tensors.shards import whole
from tests.unit.whole_tensors import read_full
from tools.train_tokenizer import train

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=301
)
SINGLE = "model.safetensors"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def random_tensors(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shard.local_shape, generator=generator).to(dtype)
        for global_name in global_names(model)
        for name, shard in hf_shards(global_name, model).items()
    }


def hf_to_checkpoint(folder, target, *, dtype=None, say=print):
    to_checkpoint(open_source("hf", folder), target, dtype=DTYPES[dtype] if dtype else None, say=say)


def checkpoint_to_hf(folder, target, *, dtype=None, tokenizer=None, say=print, **options):
    wanted = DTYPES[dtype] if dtype else None
    to_hf(open_source("ckpt", folder), target, dtype=wanted, tokenizer=tokenizer, say=say, **options)


def read_hf(folder):
    return TensorReader(folder, hf_manifest(folder, model=MODEL))


def hf_folder(folder, *, model=MODEL, dtype=torch.float32, tensors=None):
    """A folder as transformers lays it out, with tokenizer files that nobody here reads."""
    folder.mkdir(parents=True)
    token_ids = {"bos_token_id": 5, "eos_token_id": [6, 7]}
    config = hf_config(model, dtype=dtype_name(dtype), token_ids=token_ids)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(model, dtype) if tensors is None else tensors, folder / SINGLE, metadata={"format": "pt"})
    for name in FILES:
        (folder / name).write_text(f'{{"file": "{name}"}}')
    return folder


def indexed(folder, changes=()):
    """The folder, its one file under another name and an index that finds all of the model there, but for changes."""
    file = "model-00001-of-00001.safetensors"
    (folder / SINGLE).rename(folder / file)
    weight_map = dict.fromkeys(random_tensors(MODEL), file) | dict(changes)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def there_and_back(folder, tmp_path, **options):
    hf_to_checkpoint(folder, tmp_path / "ckpt")
    checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "back", **options)
    return tmp_path / "back"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_folder_comes_back_byte_for_byte(tmp_path, groups, tied, dtype):
    changes = {"num_query_groups": groups, "untie_embeddings_and_output_weights": not tied}
    folder = hf_folder(tmp_path / "hf", model=MODEL.model_copy(update=changes), dtype=dtype)
    back = there_and_back(folder, tmp_path)
    original, again = load_file(folder / SINGLE), load_file(back / SINGLE)
    assert original.keys() == again.keys()
    for name, tensor in original.items():
        assert tensor.dtype == again[name].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), name
    assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    for name in FILES:
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_written_counts_as_going_forward(tmp_path):
    hf_folder(tmp_path / "hf")
    before = SIGNS.marks
    hf_to_checkpoint(tmp_path / "hf", tmp_path / "ckpt")
    assert SIGNS.marks > before


def test_each_tensor_keeps_a_dtype_of_its_own(tmp_path):
    tensors = random_tensors(MODEL, torch.bfloat16)
    tensors["model.norm.weight"] = torch.randn(32)
    back = there_and_back(hf_folder(tmp_path / "hf", tensors=tensors), tmp_path)
    assert torch.equal(load_file(back / SINGLE)["model.norm.weight"], tensors["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_dtype_option_casts_every_tensor_either_way(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(block_reader, "BLOCK_BYTES", 1024)  # tensors of several blocks, as those of large models
    folder = hf_folder(tmp_path / "hf")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    expected = {name: tensor.to(kind) for name, tensor in load_file(folder / SINGLE).items()}
    exported = there_and_back(folder, tmp_path, dtype=dtype)
    hf_to_checkpoint(folder, tmp_path / "cast", dtype=dtype, say=print)
    checkpoint_to_hf(tmp_path / "cast", tmp_path / "from_cast")
    for result in (exported, tmp_path / "from_cast"):
        tensors = load_file(result / SINGLE)
        assert all(tensor.dtype == kind and torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        config = json.loads((result / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(kind).removeprefix("torch.")
    assert tensors_agree(open_source("ckpt", tmp_path / "ckpt"), open_source("hf", exported), say=print)
    assert tensors_agree(open_source("hf", folder), open_source("ckpt", tmp_path / "cast"), say=print)


@pytest.mark.parametrize("to", ["hf", "ckpt"])
def test_a_cast_that_would_make_weights_infinite_is_refused(tmp_path, to):
    tensors = random_tensors(MODEL)
    tensors["model.layers.1.mlp.down_proj.weight"][:, :2] = torch.tensor([65_520.0, -1e9])
    tensors["model.norm.weight"][:2] = torch.tensor([65_519.0, torch.inf])  # rounds down; was so before
    hf_folder(tmp_path / "hf", tensors=tensors)
    told = (
        r"decoder\.layers\.1\.mlp\.linear_fc2\.weight holds 64 value\(s\) too large for float16, which would become "
        r"infinite; take bfloat16 \(--dtype bf16\)"
    )
    write = {"hf": partial(to_hf, tokenizer=None), "ckpt": to_checkpoint}[to]
    with pytest.raises(DataError, match=told):
        write(open_source("hf", tmp_path / "hf"), tmp_path / "out", dtype="float16", say=print)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    write(open_source("hf", tmp_path / "hf"), tmp_path / "out", dtype="bfloat16", say=print)


def test_the_layouts_are_those_of_megatron(tmp_path):
    """Group by group the queries, the key, the value; gate above up: said with indices instead of reshapes."""
    folder = hf_folder(tmp_path / "hf")
    hf = load_file(folder / SINGLE)
    with read_hf(folder) as reader:
        qkv = read_full(reader, "decoder.layers.1.self_attention.linear_qkv.weight").reshape(2, 4, 8, 32)
        fc1 = read_full(reader, "decoder.layers.0.mlp.linear_fc1.weight")
    heads = {part: hf[f"model.layers.1.self_attn.{part}_proj.weight"].reshape(-1, 8, 32) for part in "qkv"}
    for group in range(2):
        assert torch.equal(qkv[group, 0], heads["q"][2 * group]) and torch.equal(
            qkv[group, 1], heads["q"][2 * group + 1]
        )
        assert torch.equal(qkv[group, 2], heads["k"][group]) and torch.equal(qkv[group, 3], heads["v"][group])
    assert torch.equal(fc1[:48], hf["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(fc1[48:], hf["model.layers.0.mlp.up_proj.weight"])


def raising(number):
    def answer(*_):
        raise OSError(number, "as a file system says it")

    return answer


def halting(*arguments, copy=os.copy_file_range):
    """A kernel that copies a byte at a time from even places and nothing from odd ones."""
    source, target, _, position, place = arguments
    return copy(source, target, 1, position, place) if position % 2 == 0 else 0


@pytest.mark.parametrize(
    "kernel", [raising(errno.EXDEV), raising(errno.EINVAL), raising(errno.ENOSYS), lambda *_: 0, halting]
)
def test_what_the_kernel_does_not_copy_is_copied_here(tmp_path, monkeypatch, kernel):
    folder = hf_folder(tmp_path / "hf")
    monkeypatch.setattr(os, "copy_file_range", kernel)
    back = there_and_back(folder, tmp_path)
    original, again = load_file(folder / SINGLE), load_file(back / SINGLE)
    assert original.keys() == again.keys() and all(torch.equal(again[name], original[name]) for name in original)
    files.verify_files(tmp_path / "ckpt", files.read_manifest(tmp_path / "ckpt"))


def test_a_disk_that_is_full_is_a_storage_error_and_leaves_nothing(tmp_path, monkeypatch):
    folder = hf_folder(tmp_path / "hf")
    monkeypatch.setattr(os, "copy_file_range", raising(errno.ENOSPC))
    with pytest.raises(StorageError, match="as a file system says it"):
        hf_to_checkpoint(folder, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_large_models_are_written_in_several_files_with_an_index(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    back = there_and_back(folder, tmp_path, max_shard_bytes=40_000)
    index = json.loads((back / INDEX).read_text())
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    original = load_file(folder / SINGLE)
    assert index["weight_map"].keys() == original.keys() and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    with read_hf(back) as several, read_hf(folder) as single:
        assert all(torch.equal(read_full(several, name), read_full(single, name)) for name in global_names(MODEL))


def test_a_checkpoint_from_hf_has_what_a_run_needs(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    hf_to_checkpoint(folder, tmp_path / "ckpt")
    manifest = files.read_manifest(tmp_path / "ckpt")
    files.verify_files(tmp_path / "ckpt", manifest)
    files.verify_coverage(tmp_path / "ckpt", manifest)
    state = TrainingState(**{name: manifest.state[name] for name in TrainingState.__dataclass_fields__})
    assert state == TrainingState() and manifest.state["world_size"] == 1
    from_checkpoint = resolve_model(ModelConfig(load=f"ckpt:{tmp_path / 'ckpt'}"))
    from_hf = resolve_model(ModelConfig(load=f"hf:{folder}"))
    assert from_checkpoint.model_copy(update={"load": None}) == from_hf.model_copy(update={"load": None})


def test_the_tokenizer_is_the_named_one_or_that_of_the_run(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    hf_to_checkpoint(folder, tmp_path / "ckpt")
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(train(["some text to train on"], vocab_size=290))
    checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "named", dtype=None, tokenizer=tokenizer, say=print)
    manifest = files.read_manifest(tmp_path / "ckpt")
    for name in FILES:
        (tmp_path / "ckpt" / name).unlink()
    manifest.state["tokenizer"] = str(tokenizer)
    files.write_manifest(tmp_path / "ckpt", manifest)
    checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "of_the_run")
    for result in (tmp_path / "named", tmp_path / "of_the_run"):
        assert (result / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
        config = json.loads((result / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 301)
        assert json.loads((result / "generation_config.json").read_text())["eos_token_id"] == 2
        assert not (result / "chat_template.jinja").exists()
    tokenizer.unlink()
    said = []
    checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "without", dtype=None, tokenizer=None, say=said.append)
    assert said[0].startswith("warning: no tokenizer found")
    assert json.loads((tmp_path / "without" / "config.json").read_text())["eos_token_id"] == [6, 7]


def test_a_qwen2_with_a_tokenizer_that_transformers_would_take_for_another_is_told(tmp_path):
    hf_to_checkpoint(
        hf_folder(tmp_path / "hf", model=MODEL.model_copy(update={"add_qkv_bias": True})), tmp_path / "ckpt"
    )
    hf_to_checkpoint(hf_folder(tmp_path / "llama"), tmp_path / "other")
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(train(["some text to train on"], vocab_size=290))
    for folder, is_told in {"ckpt": True, "other": False}.items():
        said = []
        checkpoint_to_hf(tmp_path / folder, tmp_path / f"{folder}-hf", tokenizer=tokenizer, say=said.append)
        assert any("AutoTokenizer takes a Qwen2 folder's" in line for line in said) == is_told


def test_a_licence_goes_with_the_weights_also_beside_another_tokenizer(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    licence = ("LICENSE", "NOTICE.txt", "USE_POLICY.md")
    for name in licence:
        (folder / name).write_text(f"the {name}")
    back = there_and_back(folder, tmp_path)
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(train(["some text to train on"], vocab_size=290))
    checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "named", tokenizer=tokenizer)
    for result in (back, tmp_path / "named"):
        assert [(result / name).read_text() for name in licence] == [f"the {name}" for name in licence]


def test_a_trained_checkpoint_is_released_as_the_family_that_it_comes_from(tmp_path):
    """With all end tokens of its source, and that of the template that it has learned, here <s>."""
    hf_to_checkpoint(hf_folder(tmp_path / "hf"), tmp_path / "ckpt")
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(train(["some text to train on"], vocab_size=290))
    for name in FILES:
        (tmp_path / "ckpt" / name).unlink()
    template = (
        "{% for turn in messages %}{% generation %}{{ turn['content'] + bos_token }}{% endgeneration %}{% endfor %}"
    )
    generation = {"eos_token_id": [2, 9, 11], "temperature": 0.6}
    facts = {"model_type": "mistral", "token_ids": {"eos_token_id": [2, 9]}, "generation_config": generation}
    files.amend_state(tmp_path / "ckpt", {**facts, "tokenizer": str(tokenizer), "chat_template": template})
    checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["architectures"], values["eos_token_id"]) == (["MistralForCausalLM"], [2, 9])
    released = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert released == {"eos_token_id": [2, 9, 11, 1], "temperature": 0.6}
    hf_to_checkpoint(tmp_path / "out", tmp_path / "again")
    assert files.read_manifest(tmp_path / "again").state["generation_config"] == released


def test_tokenizer_settings_of_transformers_5_are_written_so_that_version_4_opens_them(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    settings = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    back = there_and_back(folder, tmp_path)
    assert json.loads((back / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"], "pad_token": "</s>",
    }  # fmt: skip


@pytest.mark.parametrize(("dtype", "computed"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "bf16")])
def test_a_model_is_computed_in_the_type_of_its_weights(tmp_path, dtype, computed):
    """config.json says fp32; a converted checkpoint's model section says nothing."""
    folder = hf_folder(tmp_path / "hf", tensors=random_tensors(MODEL, torch_dtype(DTYPES[dtype])))
    hf_to_checkpoint(folder, tmp_path / "ckpt")
    assert model_ranks.stored_dtype(f"hf:{folder}") == model_ranks.stored_dtype(f"ckpt:{tmp_path / 'ckpt'}") == computed


def test_a_tokenizer_that_is_missing_or_too_large_is_refused(tmp_path):
    hf_to_checkpoint(hf_folder(tmp_path / "hf"), tmp_path / "ckpt")
    large = tmp_path / "large.model"
    large.write_bytes(train(["alpha beta gamma delta epsilon zeta eta theta iota kappa"], vocab_size=310))
    for tokenizer, kind, text in [
        (tmp_path / "none.model", ConfigError, "does not exist"),
        (large, DataError, r"has 310 pieces, more than the model's vocab_size \(301\)"),
    ]:
        with pytest.raises(kind, match=text):
            checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "out", dtype=None, tokenizer=tokenizer, say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf", "large.model"]


def test_others_may_read_what_was_written(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    back = there_and_back(folder, tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for out in (back, tmp_path / "ckpt") for path in out.iterdir()}
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}


class Stop(Exception):
    """Stands for anything that goes wrong half-way."""


@pytest.mark.parametrize(
    ("module", "where"), [(convert, "write_json"), (release, "copy_side_files"), (hf_target, "write_safetensors")]
)
def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch, module, where):
    hf_to_checkpoint(hf_folder(tmp_path / "hf"), tmp_path / "ckpt")

    def stop(*_, **__):
        raise Stop

    monkeypatch.setattr(module, where, stop)
    with pytest.raises(Stop):
        checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


@pytest.mark.parametrize("wrong", ["checkpoint", "place"])
def test_an_export_that_fails_is_told_and_does_not_end_the_run(tmp_path, wrong):
    checkpoint, said = tmp_path / "run" / "checkpoints" / "iter_0000004", []
    hf_to_checkpoint(hf_folder(tmp_path / "hf"), checkpoint)
    if wrong == "checkpoint":
        (checkpoint / "manifest.json").write_text("{")
    else:
        (tmp_path / "run" / "hf").write_text("a file")
    convert.export(checkpoint, tmp_path / "run", name="iter_0000004", say=said.append)
    command = f"megatron-xy convert --from ckpt:{checkpoint} --to hf:{tmp_path}/run/hf/iter_0000004"
    assert len(said) == 1 and said[0].startswith(f"warning: no HF folder of {checkpoint}") and command in said[0]


def test_a_failed_import_leaves_nothing_and_a_killed_one_is_no_hindrance(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("/etc/hostname")  # refused after the weights are written
    with pytest.raises(DataError, match="link out of its folder"):
        hf_to_checkpoint(folder, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (folder / "chat_template.jinja").unlink()
    (tmp_path / ".tmp-ckpt").mkdir()
    (tmp_path / ".tmp-ckpt" / "leftover").touch()
    hf_to_checkpoint(folder, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt" / "leftover").exists() and not (tmp_path / ".tmp-ckpt").exists()


def test_two_commands_do_not_write_one_target(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    with (
        hf_target.whole_or_absent(tmp_path / "ckpt", work={}),
        pytest.raises(ConfigError, match="another command is writing it at this moment"),
    ):
        hf_to_checkpoint(folder, tmp_path / "ckpt")
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == [".conversion.json"]


def test_a_second_command_finds_the_target_taken_until_its_files_are_on_the_disk(tmp_path, monkeypatch):
    folder, synced, second = hf_folder(tmp_path / "hf"), hf_target.sync_file, []

    def sync(path):
        with (
            pytest.raises(ConfigError, match="another command is writing it at this moment"),
            hf_target.whole_or_absent(tmp_path / "ckpt", work={}),
        ):
            pass
        second.append(path)
        synced(path)

    monkeypatch.setattr(hf_target, "sync_file", sync)
    hf_to_checkpoint(folder, tmp_path / "ckpt")
    assert second and files.read_manifest(tmp_path / "ckpt")
    assert not list((tmp_path / "ckpt").glob("conversion.json"))


def test_a_command_killed_in_its_last_step_has_done_its_work(tmp_path, monkeypatch):
    def killed(folder):
        if folder == tmp_path:
            raise KeyboardInterrupt

    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        hf_target.whole_or_absent(tmp_path / "out", work={"to": "out"}) as folder,
    ):
        (folder / "file").touch()
        patch.setattr(hf_target, "sync_folder", killed)
    assert (tmp_path / "out" / "conversion.json").exists()
    with pytest.raises(hf_target.AlreadyWritten), hf_target.whole_or_absent(tmp_path / "out", work={"to": "out"}):
        pass
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".conversion.json", "file"]


def interrupt_once_weights_are_written(folder, target, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hf_to_checkpoint(folder, target)


def test_what_another_conversion_has_left_is_not_gone_on_with(tmp_path, monkeypatch):
    """Interrupted once the weights are written; then the same folder in another type."""
    folder = hf_folder(tmp_path / "hf")
    interrupt_once_weights_are_written(folder, tmp_path / "ckpt", monkeypatch)
    assert len(list((tmp_path / ".tmp-ckpt").glob("*.receipt.json"))) == 1
    hf_to_checkpoint(folder, tmp_path / "ckpt", dtype="bf16")
    manifest = files.read_manifest(tmp_path / "ckpt")
    files.verify_files(tmp_path / "ckpt", manifest)
    assert {entry.dtype for entry in manifest.tensors.values()} == {"bfloat16"}
    (shard,) = (tmp_path / "ckpt").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.bfloat16}


def test_a_file_that_has_not_reached_the_disk_whole_is_written_anew(tmp_path, monkeypatch):
    """As a power cut leaves it: with its receipt."""
    folder = hf_folder(tmp_path / "hf")
    interrupt_once_weights_are_written(folder, tmp_path / "ckpt", monkeypatch)
    (shard,) = (tmp_path / ".tmp-ckpt").glob("*.safetensors")
    os.truncate(shard, 1000)
    hf_to_checkpoint(folder, tmp_path / "ckpt")
    files.verify_files(tmp_path / "ckpt", files.read_manifest(tmp_path / "ckpt"))


def test_another_type_is_that_of_the_weights_and_not_of_the_optimizers_state(tmp_path):
    hf_to_checkpoint(hf_folder(tmp_path / "hf"), tmp_path / "ckpt")
    manifest, moment = files.read_manifest(tmp_path / "ckpt"), "optimizer.exp_avg.decoder.final_layernorm.weight"
    entry = files.TensorEntry((32,), "float32", [files.Piece("more.safetensors", whole((32,)))])
    manifest.tensors[moment] = entry
    manifest.files["more.safetensors"] = write_tensors(
        tmp_path / "ckpt" / "more.safetensors", {moment: torch.randn(32)}, metadata=files.METADATA
    )
    files.write_manifest(tmp_path / "ckpt", manifest)
    to_checkpoint(open_source("ckpt", tmp_path / "ckpt"), tmp_path / "half", dtype="bfloat16", say=print)
    found = files.read_manifest(tmp_path / "half").tensors
    assert found.pop(moment).dtype == "float32" and {entry.dtype for entry in found.values()} == {"bfloat16"}


def test_an_existing_target_is_refused(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there exists; name a folder that does not"):
        hf_to_checkpoint(folder, tmp_path / "there")


def test_a_finished_target_is_known_by_the_command_that_wrote_it(tmp_path):
    source, target = f"hf:{hf_folder(tmp_path / 'hf')}", f"ckpt:{tmp_path / 'ckpt'}"

    def command(**options):
        verb.convert(source, target, **{"dtype": None, "tokenizer": None, "say": said.append, **options})

    said = []
    command()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ckpt").iterdir()}
    with pytest.raises(ConfigError, match="exists, written by this command"):
        command()
    command(may_be_there=True)
    assert said[-1] == f"{tmp_path / 'ckpt'} is there, as this command has written it before"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ckpt").iterdir()} == before
    with pytest.raises(ConfigError, match="exists; name a folder that does not"):  # what it would write is another
        command(may_be_there=True, dtype="bf16")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"source": "hf:"}, "--from hf:: must be ckpt:DIR or hf:DIR"),
        ({"target": "b"}, "--to b: must be ckpt:DIR or hf:DIR"),
        ({"dtype": "fp8"}, "--dtype fp8: must be one of fp32, bf16, fp16"),
        ({"max_shard_size": "5 GiB"}, "--max-shard-size 5 GiB: must be a number of bytes, KB, MB or GB"),
        ({"tokenizer": Path("tokenizer.model")}, "--tokenizer goes with --to hf:DIR"),
    ],
)
def test_malformed_options_are_bad_usage(options, text):
    with pytest.raises(UsageError, match=text) as caught:
        verb.convert(
            **{"source": "hf:a", "target": "ckpt:b", "dtype": None, "tokenizer": None, "say": print, **options}
        )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("source", "target"), [("hf:/nowhere/a", "ckpt:b"), ("ckpt:/nowhere/a", "hf:b")])
def test_a_path_that_is_not_there_is_bad_config(source, target):
    with pytest.raises(ConfigError, match="/nowhere/a: there is no such folder") as caught:
        verb.convert(source, target, dtype=None, tokenizer=None, say=print)
    assert caught.value.exit_code == 78


def refused(folder, text):
    with pytest.raises(DataError, match=text) as caught:
        hf_to_checkpoint(folder, folder.parent / "ckpt")
    assert caught.value.exit_code == 65
    assert not (folder.parent / "ckpt").exists()


def test_pickles_are_never_opened(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (folder / SINGLE).unlink()
    refused(folder, "holds neither model.safetensors nor")
    # Not even a pickle: opening it would be another error.
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    refused(folder, "a pickle, which is never opened; load and save it once with transformers' save_pretrained")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("../model.safetensors", "no plain name"),
        ("/etc/model.safetensors", "no plain name"),
        ("sub/model.safetensors", "no plain name"),
        ("model.bin", "which is no .safetensors file"),
        (7, "which is no .safetensors file"),
        ("a\0b.safetensors", "cannot be opened: .*null"),
        (f"{'a' * 300}.safetensors", "cannot be read: .*too long"),
        ("circle.safetensors", "cannot be opened: .*loop"),
        ("model-00001-of-00002.safetensors", "is named by model.safetensors.index.json and is not there"),
    ],
)
def test_an_index_names_files_of_its_folder_alone(tmp_path, file, text):
    folder = indexed(hf_folder(tmp_path / "hf"), {"model.norm.weight": file})
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    refused(folder, text)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "is damaged"),
        ("[]", "holds a list instead of a JSON object"),
        ('{"weight_map": []}', r"weight_map \(\[\]\) must be an object"),
        ('{"weight_map": {}, "metadata": 7}', r"metadata \(7\) must be an object"),
        ('{"weight_map": {}}', f"{INDEX} names no files: its weight_map is missing or empty"),
        ("{}", f"{INDEX} names no files: its weight_map is missing or empty"),
    ],
)
def test_a_damaged_index_is_bad_data(tmp_path, index, text):
    folder = indexed(hf_folder(tmp_path / "hf"))
    (folder / INDEX).write_text(index)
    refused(folder, text)


@pytest.mark.parametrize("file", [SINGLE, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, file):
    folder = hf_folder(tmp_path / "hf")
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to("../elsewhere")
    refused(folder, f"{file} is a link out of its folder, to {tmp_path / 'elsewhere'}; it is refused")


def test_a_snapshot_of_the_hub_cache_links_to_its_blobs(tmp_path):
    cache = tmp_path / "models--somebody--model"
    snapshot = hf_folder(cache / "snapshots" / "0a1b")
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(cache / "blobs" / f"{number:064x}")
        path.symlink_to(f"../../blobs/{number:064x}")
    back = there_and_back(snapshot, tmp_path)
    assert load_file(back / SINGLE).keys() == random_tensors(MODEL).keys()
    assert not any(path.is_symlink() for path in (tmp_path / "ckpt").iterdir())
    (snapshot / "config.json").unlink()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "config").write_text("{}")
    (snapshot / "config.json").symlink_to("../../../blobs/config")
    with pytest.raises(DataError, match="link out of its folder"):
        hf_to_checkpoint(snapshot, tmp_path / "again")


def test_the_one_file_goes_before_an_index_as_in_transformers(tmp_path):
    folder = indexed(hf_folder(tmp_path / "hf"))
    tensors = {name: 2 * tensor for name, tensor in random_tensors(MODEL).items()}
    save_file(tensors, folder / SINGLE)
    assert torch.equal(
        load_file(there_and_back(folder, tmp_path) / SINGLE)["lm_head.weight"], tensors["lm_head.weight"]
    )


def test_truncated_weights_are_damaged(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    content = (folder / SINGLE).read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        (folder / SINGLE).write_bytes(content[:size])
        refused(folder, r"model\.safetensors is damaged")


@pytest.mark.parametrize("has_index", [False, True])
def test_a_missing_tensor_is_named(tmp_path, has_index):
    tensors = random_tensors(MODEL)
    missing = "model.layers.1.mlp.up_proj.weight"
    del tensors[missing]
    folder = hf_folder(tmp_path / "hf", tensors=tensors)
    if has_index:
        indexed(folder)  # which promises what the file lacks
    refused(folder, rf"hold(s no)? {re.escape(missing)}, (which config\.json calls for|though {INDEX} says so)")


def test_a_tied_head_that_is_its_embedding_is_no_loss_and_another_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(block_reader, "BLOCK_BYTES", 1024)  # several blocks
    tied = MODEL.model_copy(update={"untie_embeddings_and_output_weights": False})
    tensors = random_tensors(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    hf_to_checkpoint(hf_folder(tmp_path / "same", model=tied, tensors=tensors), tmp_path / "same-ckpt")
    tensors["lm_head.weight"][7, 5] += 1
    folder = hf_folder(tmp_path / "hf", model=tied, tensors=tensors)
    refused(folder, r"1 tensor\(s\) that its config\.json has no place for, the first is lm_head\.weight")


def test_biases_are_refused_even_where_the_config_says_nothing(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = hf_folder(tmp_path / "hf", tensors={**random_tensors(MODEL), name: torch.zeros(32)})
    refused(folder, f"holds {name}; of biases")


def test_a_wrong_shape_is_told_with_both_shapes(tmp_path):
    tensors = random_tensors(MODEL)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    refused(
        hf_folder(tmp_path / "hf", tensors=tensors),
        r"model\.layers\.0\.self_attn\.k_proj\.weight is \[32, 32\], but config\.json makes it \[16, 32\]; there "
        r"hidden_size is 32, num_attention_heads is 4, num_key_value_heads is 2",
    )


def test_quantised_weights_are_refused(tmp_path):
    tensors = random_tensors(MODEL)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    refused(hf_folder(tmp_path / "hf", tensors=tensors), r"model\.norm\.weight is of type int8")


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    hf_to_checkpoint(hf_folder(tmp_path / "hf"), tmp_path / "ckpt")
    shard = next((tmp_path / "ckpt").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="do not match the checksum"):
        checkpoint_to_hf(tmp_path / "ckpt", tmp_path / "out")
    for target in ("hf:{}", "ckpt:{}"):  # the command compares checksums beside the writing
        with pytest.raises(DataError, match="do not match the checksum"):
            verb.convert(
                f"ckpt:{tmp_path / 'ckpt'}", target.format(tmp_path / "out"), dtype=None, tokenizer=None, say=print
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"num_layers": "x"}, "manifest.json: num_layers of its model section: "),
        ({"num_experts": 8}, "manifest.json: num_experts of its model section: "),
        ([], "its model section is no object"),
    ],
)
def test_a_model_section_of_another_version_is_bad_data(tmp_path, section, text):
    hf_to_checkpoint(hf_folder(tmp_path / "hf"), tmp_path / "ckpt")
    files.amend_state(tmp_path / "ckpt", {"model": section})
    for read in (
        lambda: open_source("ckpt", tmp_path / "ckpt"),
        lambda: resolve_model(ModelConfig(load=f"ckpt:{tmp_path / 'ckpt'}")),
    ):
        with pytest.raises(DataError, match=text):
            read()


def test_one_changed_weight_does_not_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(block_reader, "BLOCK_BYTES", 1024)  # in the first of several blocks
    folder = hf_folder(tmp_path / "hf")
    back = there_and_back(folder, tmp_path)
    said = []
    assert tensors_agree(open_source("ckpt", tmp_path / "ckpt"), open_source("hf", back), say=said.append)
    tensors = load_file(back / SINGLE)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = -tensors["model.layers.1.mlp.down_proj.weight"][3, 5]
    save_file(tensors, back / SINGLE, metadata={"format": "pt"})
    assert not tensors_agree(open_source("ckpt", tmp_path / "ckpt"), open_source("hf", back), say=said.append)
    assert said[-1] == "1 of 15 tensors differ, the first is decoder.layers.1.mlp.linear_fc2.weight"
