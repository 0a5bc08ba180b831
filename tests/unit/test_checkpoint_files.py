"""The checkpoint format on disk: what was written comes back, and nothing that was changed since opens."""

import dataclasses
import errno
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from megatron_xy.checkpoint import files
from megatron_xy.checkpoint.choice import shared_problem
from megatron_xy.checkpoint.files import Manifest, Piece, TensorEntry
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.tensors.block_reader import BlockReader, tensor_hashes
from megatron_xy.tensors.files import TensorReader, bits_of, dtype_name, write_tensors
from megatron_xy.tensors.safetensors_file import FileRange, SafetensorsFile, write_safetensors
from megatron_xy.tensors.shards import Box, ParameterShard, whole
from tests.unit.whole_tensors import read_full

# Global name -> [(file, boxes)]: rows, the gated fc1, columns, one whole, int64 and bf16.
FULL = {
    "embedding.weight": torch.arange(30.0).reshape(10, 3),
    "fc1.weight": torch.arange(100.0, 124.0).reshape(8, 3),
    "fc2.weight": torch.arange(200.0, 224.0).reshape(4, 6).bfloat16(),
    "norm.weight": torch.tensor([1.5, -2.5, 0.25]),
    "counts": torch.tensor([1, 2**40, -3]),
}
CUTS = {
    "embedding.weight": [("a", [((0, 0), (6, 3))]), ("b", [((6, 0), (10, 3))])],
    "fc1.weight": [("a", [((0, 0), (2, 3)), ((4, 0), (6, 3))]), ("b", [((2, 0), (4, 3)), ((6, 0), (8, 3))])],
    "fc2.weight": [("a", [((0, 0), (4, 3))]), ("b", [((0, 3), (4, 6))])],
    "norm.weight": [("a", [((0,), (3,))])],
    "counts": [("b", [((0,), (3,))])],
}

STATE = {
    "iteration": 3, "data_step": 3, "consumed_samples": 6, "consumed_tokens": 96, "optimizer_steps": 3, "lr": 1e-05,
    "world_size": 1, "model": {},
}  # fmt: skip


def write_checkpoint(folder, *, cuts=CUTS, full=FULL, state=None):
    """FULL as `cuts` cuts it."""
    folder.mkdir(parents=True)
    held = {}
    manifest = Manifest(state={**STATE, **(state or {})}, tensors={}, files={})
    for name, pieces in cuts.items():
        tensor = full[name]
        entry = TensorEntry(tuple(tensor.shape), dtype_name(tensor.dtype))
        for letter, boxes in pieces:
            file = f"{letter}.safetensors"
            shard = ParameterShard(entry.shape, tuple(Box(*box) for box in boxes))
            parts = [tensor[tuple(map(slice, box.start, box.stop))] for box in shard.boxes]
            held.setdefault(file, {})[name] = torch.cat(parts).contiguous()
            entry.pieces.append(Piece(file, shard))
        manifest.tensors[name] = entry
    for file, tensors in held.items():
        manifest.files[file] = write_tensors(folder / file, tensors, metadata=files.METADATA)
    files.write_manifest(folder, manifest)
    return manifest


def open_whole(folder):
    """Everything that is checked before a checkpoint is used."""
    manifest = files.read_manifest(folder)
    files.verify_files(folder, manifest)
    files.verify_coverage(folder, manifest)
    return manifest


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "iter_0000003"
    write_checkpoint(folder)
    return folder


def test_what_was_written_comes_back(checkpoint, tmp_path):
    again = tmp_path / "again"
    assert write_checkpoint(again) == open_whole(again) == open_whole(checkpoint)
    manifest = open_whole(checkpoint)
    assert manifest.state == STATE
    with TensorReader(checkpoint, manifest) as reader:
        for name, full in FULL.items():
            found = read_full(reader, name)
            assert found.dtype == full.dtype and torch.equal(found, full)
            assert name in reader
        assert "other" not in reader


def test_a_checkpoint_that_keeps_states_of_generators_opens(tmp_path):
    """As they did while each rank wrote these beside its pieces."""
    folder = tmp_path / "iter_0000003"
    manifest = write_checkpoint(folder)
    held = load((folder / "a.safetensors").read_bytes())
    tensors = {**held, "rank_state.cpu": torch.arange(16, dtype=torch.uint8)}
    facts = write_tensors(folder / "a.safetensors", tensors, metadata=files.METADATA)
    signed(folder, lambda body: body["files"].update({"a.safetensors": facts}))
    signed(folder, lambda body: body.update(rank_state={"0": {"cpu": "a.safetensors"}}))
    found = open_whole(folder)
    assert found.tensors == manifest.tensors
    with TensorReader(folder, found) as reader:
        assert torch.equal(read_full(reader, "norm.weight"), FULL["norm.weight"])


def test_a_part_is_read_into_another_dtype_and_its_padding_stays(checkpoint):
    manifest = open_whole(checkpoint)
    shard = ParameterShard((8, 3), (Box((1, 0), (3, 3)), Box((5, 0), (7, 3))))
    local = torch.full((6, 3), -1.0, dtype=torch.bfloat16)
    with TensorReader(checkpoint, manifest) as reader:
        reader.read_into("fc1.weight", local, shard)
        with pytest.raises(DataError, match=r"holds no other\.weight"):
            reader.read_into("other.weight", local, shard)
        with pytest.raises(DataError, match=r"\[8, 3\] there and \[9, 3\]"):
            reader.read_into("fc1.weight", local, dataclasses.replace(shard, global_shape=(9, 3)))
    assert torch.equal(local[:2], FULL["fc1.weight"][1:3].bfloat16())
    assert torch.equal(local[2:4], FULL["fc1.weight"][5:7].bfloat16())
    assert (local[4:] == -1).all()


def test_what_takes_several_reads_and_writes_comes_back_whole(tmp_path):
    """Columns of which a part of the rows is read at a time, written by more than a megabyte; also in another type."""
    full = torch.randn(700, 1500, generator=torch.Generator().manual_seed(0))
    cuts = {"w": [("a", [((0, 0), (700, 701))]), ("b", [((0, 701), (700, 1500))])]}
    manifest = write_checkpoint(tmp_path / "columns", cuts=cuts, full={"w": full})
    files.verify_files(tmp_path / "columns", manifest)
    assert torch.equal(load_file(tmp_path / "columns" / "a.safetensors")["w"], full[:, :701])
    cast = torch.full((702, 1500), -1.0, dtype=torch.bfloat16)
    with TensorReader(tmp_path / "columns", manifest) as reader:
        assert torch.equal(read_full(reader, "w"), full)
        reader.read_into("w", cast, whole((700, 1500)))
        blocks = np.concatenate([block.copy() for block in reader.blocks("w", dtype="bfloat16")])
    assert torch.equal(cast[:700], full.bfloat16()) and (cast[700:] == -1).all()
    assert np.array_equal(blocks, bits_of(cast[:700]))


def test_hashes_are_those_of_the_tensors_however_they_are_cut(checkpoint, tmp_path):
    uncut = {name: [("w", [((0,) * full.dim(), tuple(full.shape))])] for name, full in FULL.items()}
    other = tmp_path / "uncut"
    write_checkpoint(other, cuts=uncut)
    hashes = [dict(tensor_hashes(folder, open_whole(folder))) for folder in (checkpoint, other)]
    assert hashes[0] == hashes[1] and hashes[0].keys() == FULL.keys()
    changed = tmp_path / "changed"
    write_checkpoint(changed, full={**FULL, "fc2.weight": FULL["fc2.weight"] + 2})
    third = dict(tensor_hashes(changed, open_whole(changed)))
    assert [name for name in FULL if third[name] != hashes[0][name]] == ["fc2.weight"]


def positions(path, count):
    size = path.stat().st_size
    chosen = random.Random(path.name).sample(range(size), min(count, size))
    return sorted({0, 1, 7, 8, size // 2, size - 1, *chosen})


@pytest.mark.parametrize("file", ["a.safetensors", "b.safetensors"])
def test_every_flipped_bit_of_a_shard_is_found(checkpoint, file):
    path = checkpoint / file
    good, manifest = path.read_bytes(), open_whole(checkpoint)
    for position in positions(path, 300):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{file} is damaged"):
            files.verify_files(checkpoint, manifest)
    path.write_bytes(good)
    files.verify_files(checkpoint, manifest)


def test_every_flipped_bit_of_the_manifest_is_found(checkpoint):
    path = checkpoint / files.MANIFEST
    good, manifest = path.read_bytes(), open_whole(checkpoint)
    found = 0
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert files.read_manifest(checkpoint) == manifest, f"byte {position} changed what is read"
        except DataError:
            found += 1
    # JSON has two spellings of an exponent: 1e-05 and 1E-05 are one number, so that flip changes nothing.
    assert found >= len(good) - 1


@pytest.mark.parametrize("change", [-1, -1000000, 1, 4096])
@pytest.mark.parametrize("file", ["a.safetensors", files.MANIFEST])
def test_a_cut_or_grown_file_is_found(checkpoint, file, change):
    path = checkpoint / file
    content = path.read_bytes()
    cut = content[:change] if change > -len(content) else b""
    path.write_bytes(cut if change < 0 else content + bytes(change))
    if file == files.MANIFEST and change == -1:  # the newline at its end
        assert open_whole(checkpoint)
        path.write_bytes(content[:-2])
    with pytest.raises(DataError, match="damaged"):
        open_whole(checkpoint)


def test_a_missing_shard_or_manifest_or_folder_is_said(checkpoint, tmp_path):
    (checkpoint / "b.safetensors").unlink()
    with pytest.raises(DataError, match=r"b\.safetensors is missing"):
        open_whole(checkpoint)
    (checkpoint / files.MANIFEST).unlink()
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        open_whole(checkpoint)
    for role in ("actor", "critic"):
        (checkpoint / role).mkdir()
        (checkpoint / role / files.MANIFEST).touch()
    with pytest.raises(DataError, match="is a PPO run's checkpoint, of actor and critic; name the folder of one"):
        open_whole(checkpoint)
    with pytest.raises(ConfigError, match="no such folder"):
        open_whole(tmp_path / "nowhere")


def test_a_shard_that_is_a_link_or_a_folder_is_refused(checkpoint, tmp_path):
    path = checkpoint / "b.safetensors"
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(DataError, match="no plain file"):
        open_whole(checkpoint)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="no plain file"):
        open_whole(checkpoint)


def test_what_the_storage_does_not_give_back_is_no_finding_about_the_checkpoint(checkpoint, monkeypatch):
    """/proc/self/mem answers with an error of the device; so does, in place of a file server, every open of a file."""
    unreadable = Manifest({}, {}, {"mem": {"bytes": 0, "sha256": ""}})
    with pytest.raises(StorageError, match="/proc/self/mem cannot be read: Input/output error; try again"):
        files.verify_files(Path("/proc/self"), unreadable)
    with pytest.raises(StorageError, match="/proc/self/mem cannot be read"):
        SafetensorsFile(Path("/proc/self/mem"))
    with pytest.raises(DataError, match=r"none\.safetensors cannot be read"):
        SafetensorsFile(checkpoint / "none.safetensors")

    def stale(self, *_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))

    manifest = open_whole(checkpoint)
    monkeypatch.setattr(Path, "open", stale)
    for read in (files.read_manifest, lambda folder: files.verify_files(folder, manifest)):
        with pytest.raises(StorageError, match="cannot be read: Stale file handle"):
            read(checkpoint)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"a": 1}', "not json", "\x00", '{"format_version": 1}'])
def test_foreign_json_is_refused(checkpoint, text):
    (checkpoint / files.MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        files.read_manifest(checkpoint)


def signed(folder, change):
    """Rewrites the manifest after `change` with a checksum that fits: what somebody could do by hand."""
    path = folder / files.MANIFEST
    body = json.loads(path.read_text())
    del body["manifest_sha256"]
    change(body)
    path.write_text(json.dumps({**body, "manifest_sha256": files._digest_of(body)}))


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_format_version_is_refused(checkpoint, version):
    signed(checkpoint, lambda body: body.update(format_version=version))
    with pytest.raises(DataError, match="format_version"):
        files.read_manifest(checkpoint)


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "x/b.safetensors", "..", ".", ""])
@pytest.mark.parametrize("where", ["files", "pieces"])
def test_a_file_name_that_leads_elsewhere_is_refused(checkpoint, where, name):
    def change(body):
        if where == "files":
            body["files"][name] = body["files"].pop("a.safetensors")
        else:
            body["tensors"]["norm.weight"]["pieces"][0]["file"] = name

    signed(checkpoint, change)
    with pytest.raises(DataError, match=r"no plain file name|not among its files"):
        files.read_manifest(checkpoint)


def test_a_signed_manifest_of_another_layout_is_refused(checkpoint):
    def without(*keys):
        def change(body):
            for key in keys[:-1]:
                body = body[key]
            del body[keys[-1]]

        return change

    good = (checkpoint / files.MANIFEST).read_text()
    changes = [without(key) for key in ("state", "tensors", "files")]
    changes += [without("tensors", "norm.weight", key) for key in ("shape", "dtype", "pieces")]
    changes += [lambda body: body.update(tensors=[]), lambda body: body.update(files=None)]
    changes += [lambda body: body["tensors"]["norm.weight"].update(dtype="complex64")]
    changes += [lambda body: body["tensors"].update(scalar={"shape": [], "dtype": "float32", "pieces": []})]
    for boxes in ([[0, 3]], [[[0], [4]]], [[[-1], [3]]], [[[2], [1]]], [[[0, 0], [3, 3]]], [[[0], [3], [1]]], 7):
        changes.append(lambda body, boxes=boxes: body["tensors"]["norm.weight"]["pieces"][0].update(boxes=boxes))
    for change in changes:
        (checkpoint / files.MANIFEST).write_text(good)
        signed(checkpoint, change)
        with pytest.raises(DataError, match=r"manifest\.json"):
            files.read_manifest(checkpoint)


@pytest.mark.parametrize("boxes", [[[[0], [2]]], [[[0], [2]], [[1], [3]]], [], [[[0], [3]], [[0], [3]]]])
def test_pieces_that_leave_or_repeat_something_are_refused(checkpoint, boxes):
    signed(checkpoint, lambda body: body["tensors"]["norm.weight"]["pieces"][0].update(boxes=boxes))
    with pytest.raises(DataError, match=r"norm\.weight do not make up its shape \[3\]"):
        files.verify_coverage(checkpoint, files.read_manifest(checkpoint))


@pytest.mark.parametrize("parts", [[(0, 5), (5, 29)], [(1, 30)], [(0, 5), (6, 30)], [(0, 6), (5, 30)]])
def test_flat_parts_that_leave_or_repeat_something_are_refused(checkpoint, parts):
    """As the distributed optimizer cuts a tensor, here of 30 elements."""
    manifest = files.read_manifest(checkpoint)
    entry = manifest.tensors["embedding.weight"]
    for flat, is_whole in (([(0, 5), (5, 30)], True), (parts, False)):
        entry.pieces = [Piece("a.safetensors", dataclasses.replace(whole(entry.shape), flat=part)) for part in flat]
        if is_whole:
            files.verify_coverage(checkpoint, manifest)
    with pytest.raises(DataError, match=r"embedding\.weight do not make up its shape \[10, 3\]"):
        files.verify_coverage(checkpoint, manifest)


def test_who_goes_on_alone_looks_at_every_file_and_every_piece(checkpoint, alone):
    """However many ranks wrote them."""
    assert shared_problem(checkpoint, alone) is None
    for name in ("a.safetensors", "b.safetensors"):
        good = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert f"{name} is damaged" in shared_problem(checkpoint, alone)
        (checkpoint / name).write_bytes(good)
    signed(checkpoint, lambda body: body["tensors"]["norm.weight"].update(pieces=[]))
    assert "norm.weight do not make up its shape" in shared_problem(checkpoint, alone)


def test_a_manifest_over_another_steps_shards_is_found(checkpoint, tmp_path):
    later = tmp_path / "iter_0000006"
    write_checkpoint(later, full={name: full + 1 for name, full in FULL.items()})
    shutil.copy(checkpoint / files.MANIFEST, later / files.MANIFEST)
    with pytest.raises(DataError, match="do not match the checksum"):
        open_whole(later)


def test_a_shard_without_the_tensor_that_the_manifest_promises_is_damaged(checkpoint):
    """A folder that is opened without `verify_files`."""
    save_file({"something.else": torch.ones(3)}, checkpoint / "a.safetensors")
    with (
        TensorReader(checkpoint, files.read_manifest(checkpoint)) as reader,
        pytest.raises(DataError, match=r"a\.safetensors is damaged"),
    ):
        read_full(reader, "norm.weight")
    (checkpoint / "a.safetensors").write_bytes(b"\xff" * 64)
    with (
        TensorReader(checkpoint, files.read_manifest(checkpoint)) as reader,
        pytest.raises(DataError, match=r"a\.safetensors is damaged"),
    ):
        read_full(reader, "norm.weight")


def test_a_file_that_is_cut_while_it_is_copied_is_damaged(checkpoint, tmp_path):
    with BlockReader(checkpoint, files.read_manifest(checkpoint)) as reader:
        parts = list(reader.parts("norm.weight", whole((3,)), dtype="float32"))
        assert all(isinstance(part, FileRange) for part in parts)
        os.truncate(checkpoint / "a.safetensors", parts[0].position + 5)
        with pytest.raises(DataError, match=rf"a\.safetensors is damaged: it ends at byte {parts[0].position + 5}"):
            write_safetensors(tmp_path / "x", {"w": ("float32", (3,))}, parts_of=lambda _: parts, metadata={})


def test_a_file_is_on_the_disk_once_its_checksum_is_told(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def note(descriptor):
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor).st_size))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    facts = write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, metadata={})
    assert synced == [(tmp_path / "a.safetensors", facts["bytes"])]


class Exploit:
    """Runs when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_in_a_shards_place_is_never_run(checkpoint, tmp_path):
    target = tmp_path / "ran"
    for payload in (pickle.dumps(Exploit(target)), None):
        if payload is None:
            torch.save(Exploit(target), checkpoint / "a.safetensors")
        else:
            (checkpoint / "a.safetensors").write_bytes(payload)
        with pytest.raises(DataError):
            open_whole(checkpoint)
        with TensorReader(checkpoint, files.read_manifest(checkpoint)) as reader, pytest.raises(DataError):
            read_full(reader, "norm.weight")
    assert not target.exists()


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        write_tensors(tmp_path / "nowhere" / "a.safetensors", {"x": torch.ones(2)}, metadata={})
    with pytest.raises(StorageError, match="cannot be written"):
        files.write_manifest(tmp_path / "nowhere", Manifest({}, {}, {}))


@pytest.mark.parametrize("missing", ["model", "world_size", "consumed_tokens"])
def test_a_state_without_what_loading_needs_is_refused(checkpoint, missing):
    manifest = files.read_manifest(checkpoint)
    del manifest.state[missing]
    files.write_manifest(checkpoint, manifest)
    with pytest.raises(DataError, match=f"its state lacks {missing}"):
        files.read_manifest(checkpoint)


def test_a_file_without_its_checksum_is_refused(checkpoint):
    manifest = files.read_manifest(checkpoint)
    del next(iter(manifest.files.values()))["sha256"]
    files.write_manifest(checkpoint, manifest)
    with pytest.raises(DataError, match="sha256"):
        files.read_manifest(checkpoint)


def test_brackets_beyond_measure_are_refused(checkpoint):
    (checkpoint / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="is damaged"):
        files.read_manifest(checkpoint)
