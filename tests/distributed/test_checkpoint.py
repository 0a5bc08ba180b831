"""Checkpoints: any layout opens any other's, resumed = unbroken bit for bit, one hash for every layout."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_xy.checkpoint import files
from megatron_xy.config import ModelConfig, OptimizerConfig
from megatron_xy.errors import StorageError
from megatron_xy.tensors.block_reader import tensor_hashes
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks
from tests.unit.test_checkpoint_files import write_checkpoint

OPTIMIZER = OptimizerConfig(lr=1e-3, lr_warmup_iters=0, adam_eps=1e-6)
TIED = models.MODEL.model_copy(update={"untie_embeddings_and_output_weights": False})
SOURCES = [
    Layout(),
    Layout(tp=2, pp=2, sp=True, vp=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, dp=2, distributed=True, overlap=True),
]
TARGETS = [
    Layout(),
    Layout(pp=4),
    Layout(tp=2, dp=2, sp=True),
    Layout(pp=2, dp=2, vp=2),
    Layout(dp=4, distributed=True),
    Layout(tp=2, dp=2, distributed=True),
]


def train_and_save(layout: Layout, model: ModelConfig, checkpoints: Path, asynchronous: bool = False) -> dict[str, Any]:
    """Three steps, a checkpoint, three steps more; the losses of the latter."""
    from megatron_xy.checkpoint.writer import CheckpointWriter, TrainingState

    role = models.make_role(layout, model=model, optimizer=OPTIMIZER)
    assert role is not None
    steps(role, range(3))
    writer = CheckpointWriter(checkpoints, keep_latest=2, asynchronous=asynchronous, timeout_seconds=30)
    state = TrainingState(iteration=3, data_step=3, consumed_samples=24, consumed_tokens=1536, optimizer_steps=3)
    writer.save(role, state, facts={"model": model.model_dump(mode="json")})
    after = steps(role, range(3, 6), before_update=writer.before_update)
    writer.finish(role.groups)
    return {"after": after, "shard_bytes": parameter_bytes(role)}


def load_and_train(layout: Layout, model: ModelConfig, folder: Path) -> list[tuple[float, float]]:
    """Opens a checkpoint into a role with other fresh weights and takes the next three steps."""
    from megatron_xy.checkpoint.state import load_state

    role = models.make_role(layout, model=model, optimizer=OPTIMIZER, seed=99)
    assert role is not None
    state = load_state(role, folder, files.read_manifest(folder))
    assert state.iteration == 3 and state.optimizer_steps == 3
    return steps(role, range(3, 6))


def load_and_save(layout: Layout, model: ModelConfig, folder: Path, checkpoints: Path) -> None:
    """Opens a checkpoint under `layout` and writes it again as it is."""
    from megatron_xy.checkpoint.state import load_state
    from megatron_xy.checkpoint.writer import CheckpointWriter

    role = models.make_role(layout, model=model, optimizer=OPTIMIZER, seed=99)
    assert role is not None
    state = load_state(role, folder, files.read_manifest(folder))
    writer = CheckpointWriter(checkpoints, keep_latest=2, asynchronous=False, timeout_seconds=30)
    writer.save(role, state, facts={"model": model.model_dump(mode="json")})
    writer.finish(role.groups)


def steps(role: Any, numbers: range, before_update: Callable[[], object] = lambda: None) -> list[tuple[float, float]]:
    from megatron_xy.training.train_step import train_step

    curve = []
    for number in numbers:
        batches = models.micro_batches(number, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
        result = train_step(role, batches, num_sources=2, lr=OPTIMIZER.lr, clip_grad=1.0, before_update=before_update)
        curve.append((result.loss, result.grad_norm))
    return curve


def parameter_bytes(role: Any) -> int:
    return sum(named.parameter.numel() * named.parameter.element_size() for named in role.named_parameters())


def two_roles_on_a_slow_disk(checkpoints: Path) -> list[str]:
    """Actor and critic of one checkpoint, the actor's manifest slow to reach the disk; the names that are left."""
    import time

    from megatron_xy import storage
    from megatron_xy.checkpoint.writer import CheckpointWriter, TrainingState

    role = models.make_role(Layout(), optimizer=OPTIMIZER)
    assert role is not None
    sync_folder = storage.sync_folder

    def slow(folder: Path) -> None:
        if folder.name == "actor":
            time.sleep(0.5)
        sync_folder(folder)

    storage.sync_folder = slow
    options: dict[str, Any] = {"keep_latest": 2, "asynchronous": True, "timeout_seconds": 30}
    writers = [
        CheckpointWriter(checkpoints, part="actor", **options),
        CheckpointWriter(checkpoints, part="critic", publishes=["actor"], **options),
    ]
    for writer in writers:
        writer.save(role, TrainingState(iteration=3), facts={"model": models.MODEL.model_dump(mode="json")})
    for writer in writers:
        writer.finish(role.groups)
    return sorted(str(path.relative_to(checkpoints)) for path in checkpoints.glob("*/*"))


def test_a_whole_gets_its_name_once_no_part_is_being_written(tmp_path: Path) -> None:
    (left,) = run_ranks(two_roles_on_a_slow_disk, tmp_path, world_size=1)
    assert left == ["iter_0000003/actor", "iter_0000003/critic"]


def a_rank_on_a_slow_disk(checkpoints: Path) -> None:
    """Saves while the names in a folder take long to reach the disk of the rank that the leader waits for."""
    import time

    from megatron_xy import storage
    from megatron_xy.checkpoint.writer import CheckpointWriter, TrainingState

    sync_folder = storage.sync_folder

    def slow(folder: Path) -> None:
        time.sleep(0.5)
        sync_folder(folder)

    role = models.make_role(Layout(tp=2), optimizer=OPTIMIZER)
    assert role is not None
    if role.groups.role_rank == 1:
        storage.sync_folder = slow
    writer = CheckpointWriter(checkpoints, keep_latest=2, asynchronous=True, timeout_seconds=30)
    writer.save(role, TrainingState(iteration=3), facts={"model": models.MODEL.model_dump(mode="json")})
    writer.finish(role.groups)


def test_a_checkpoint_gets_its_name_once_no_rank_is_at_work_in_it(tmp_path: Path) -> None:
    run_ranks(a_rank_on_a_slow_disk, tmp_path, world_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000003"]


def how_a_save_ends(checkpoints: Path) -> list[str]:
    """On one rank: what reaches the disk from the moment on in which the checkpoint gets its name."""
    import os

    from megatron_xy.checkpoint.writer import CheckpointWriter, TrainingState

    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append(f"{Path(f'/proc/self/fd/{descriptor}').readlink().name} is on the disk")
        sync(descriptor)

    def renamed(folder: Path, target: Path) -> Path:
        done.append(f"{target.name} is named")
        return rename(folder, target)

    os.fsync, Path.rename = synced, renamed  # type: ignore[assignment,method-assign]
    role = models.make_role(Layout(), optimizer=OPTIMIZER)
    assert role is not None
    writer = CheckpointWriter(checkpoints, keep_latest=2, asynchronous=False, timeout_seconds=30)
    writer.save(role, TrainingState(iteration=3), facts={"model": models.MODEL.model_dump(mode="json")})
    return done[done.index("iter_0000003 is named") :]


def test_a_save_has_ended_once_the_checkpoints_name_is_on_the_disk(tmp_path: Path) -> None:
    (done,) = run_ranks(how_a_save_ends, tmp_path / "checkpoints", world_size=1)
    assert done == ["iter_0000003 is named", "checkpoints is on the disk"]


def resume_past_a_stale_file(checkpoints: Path, damaged: bool) -> str:
    """What a rank says that looks for a checkpoint; rank 1 is not given its file of the newest, iteration 6."""
    from megatron_xy.checkpoint.choice import find_resumable

    role = models.make_role(Layout(dp=2))
    assert role is not None
    if role.groups.role_rank == 1:
        read = files.file_sha256

        def stale(path: Path) -> str:
            if path.parent.name == "iter_0000006":
                raise OSError(errno.ESTALE, "Stale file handle")
            return read(path)

        files.file_sha256 = stale
    elif damaged:
        (checkpoints / "iter_0000006" / "a.safetensors").write_bytes(b"")
    said: list[str] = []
    try:
        found = find_resumable(checkpoints, role.groups, resume="auto", say=said.append)
    except StorageError as error:
        return f"{error.exit_code}: {error}"
    assert found is not None and "a.safetensors is damaged" in said[0]
    return found[0].name


def test_a_file_that_a_rank_is_not_given_ends_all_ranks_and_damage_is_passed_over(tmp_path: Path) -> None:
    for iteration in (3, 6):
        write_checkpoint(tmp_path / f"iter_{iteration:07d}")
    said = f"74: {tmp_path}/iter_0000006/b.safetensors cannot be read: Stale file handle; try again once the storage"
    for answer in run_ranks(resume_past_a_stale_file, tmp_path, False, world_size=2):
        assert answer.startswith(said)
    assert run_ranks(resume_past_a_stale_file, tmp_path, True, world_size=2) == ["iter_0000003"] * 2


@pytest.fixture(scope="module", params=SOURCES, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, Path, list[Any]]:
    layout: Layout = request.param
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    results = run_ranks(train_and_save, layout, models.MODEL, checkpoints, world_size=layout.world_size)
    return layout, checkpoints / "iter_0000003", results[0]["after"]


def test_the_same_layout_resumes_bit_for_bit(saved: tuple[Layout, Path, list[Any]]) -> None:
    layout, folder, unbroken = saved
    assert run_ranks(load_and_train, layout, models.MODEL, folder, world_size=layout.world_size)[0] == unbroken


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_another_layout_goes_on_with_the_same_losses(saved: tuple[Layout, Path, list[Any]], target: Layout) -> None:
    _, folder, unbroken = saved
    resumed = run_ranks(load_and_train, target, models.MODEL, folder, world_size=target.world_size)[0]
    for got, expected in zip(resumed, unbroken, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(Layout(tp=2, pp=2), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, dp=2), marks=pytest.mark.slow),
        Layout(pp=2, dp=2, distributed=True),
    ],
    ids=str,
)
def test_the_hash_is_the_same_for_every_layout(
    saved: tuple[Layout, Path, list[Any]], target: Layout, tmp_path: Path
) -> None:
    _, folder, _ = saved
    run_ranks(load_and_save, target, models.MODEL, folder, tmp_path, world_size=target.world_size)
    again = tmp_path / folder.name
    original = dict(tensor_hashes(folder, files.read_manifest(folder)))
    assert dict(tensor_hashes(again, files.read_manifest(again))) == original
    assert original["embedding.word_embeddings.weight"]["shape"] == [models.VOCAB_SIZE, 64]
    assert "optimizer.exp_avg_sq.decoder.layers.3.mlp.linear_fc1.weight" in original


def test_pieces_cover_every_tensor_once_and_replicas_share_the_writing(
    saved: tuple[Layout, Path, list[Any]],
) -> None:
    layout, folder, _ = saved
    manifest = files.read_manifest(folder)
    files.verify_files(folder, manifest)
    files.verify_coverage(folder, manifest)
    if layout.dp == 2:
        sizes = sorted(facts["bytes"] for facts in manifest.files.values())
        assert sizes[-1] < 1.5 * sizes[0]


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=2, dp=2, distributed=True)], ids=str)
def test_tied_embeddings_survive_every_pipeline_split(layout: Layout, tmp_path: Path) -> None:
    results = run_ranks(train_and_save, layout, TIED, tmp_path, world_size=layout.world_size)
    folder = tmp_path / "iter_0000003"
    assert "output_layer.weight" not in files.read_manifest(folder).tensors
    for target in (Layout(), Layout(tp=2, pp=2)):
        resumed = run_ranks(load_and_train, target, TIED, folder, world_size=target.world_size)[0]
        for got, expected in zip(resumed, results[0]["after"], strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=2, dp=2, distributed=True, overlap=True)], ids=str)
def test_bf16_keeps_its_main_weights(layout: Layout, tmp_path: Path) -> None:
    model = models.MODEL.model_copy(update={"params_dtype": "bf16"})
    results = run_ranks(train_and_save, layout, model, tmp_path, world_size=4)
    folder = tmp_path / "iter_0000003"
    manifest = files.read_manifest(folder)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert manifest.tensors[name].dtype == "bfloat16"
    assert manifest.tensors[f"optimizer.main_param.{name}"].dtype == "float32"
    assert run_ranks(load_and_train, layout, model, folder, world_size=4)[0] == results[0]["after"]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(Layout(tp=2), marks=pytest.mark.slow), Layout(tp=2, dp=2, distributed=True, overlap=True)],
    ids=str,
)
def test_a_save_in_the_background_holds_the_state_of_its_step(layout: Layout, tmp_path: Path) -> None:
    """Three steps follow while it is copied and written: what is on disk must be the state before them."""
    results = run_ranks(train_and_save, layout, models.MODEL, tmp_path, True, world_size=layout.world_size)
    folder = tmp_path / "iter_0000003"
    resumed = run_ranks(load_and_train, layout, models.MODEL, folder, world_size=layout.world_size)
    assert resumed[0] == results[0]["after"]
