"""A role's checkpoints: every rank writes its own part, any layout opens it, the newest valid one is found again.

Saving copies the state, then writes it (in a thread under `async_save`): shards into a temporary folder, each with a
small note of its pieces; the leader waits for all notes, writes the manifest last and renames the folder. What has the
final name is whole. Loading reads each rank's boxes out of whatever pieces there are.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xy import checkpoint_files as files
from megatron_xy import device
from megatron_xy.checkpoint_files import TrainingState
from megatron_xy.errors import ConfigError, DataError, PeerLost, StorageError
from megatron_xy.host_copy import HostCopy
from megatron_xy.liveness import waiting_for
from megatron_xy.model.build import EMBEDDING, NamedParameter
from megatron_xy.model.heads import VALUE_HEAD
from megatron_xy.model.parts import part_of_model
from megatron_xy.optimizer import OwnedParameter
from megatron_xy.parallel import Groups, barrier, joined_over, sum_over
from megatron_xy.role import Role
from megatron_xy.shards import ParameterShard
from megatron_xy.storage import TEMPORARY_PREFIX, sync_folder, write_json
from megatron_xy.tensor_reader import TensorReader

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN_PARAM = "main_param"
FROZEN_UPDATES = "frozen_updates"  # of a manifest: {part of the model: updates in which it stayed as it was}


@dataclass(frozen=True)
class _Part:
    """A tensor of this rank, its global name and place, and whether this rank writes it for its replicas."""

    name: str
    tensor: torch.Tensor
    shard: ParameterShard
    is_writer: bool


def iteration_folder(checkpoints: Path, iteration: int) -> Path:
    """CHECKPOINTS/iter_0000100."""
    return checkpoints / f"iter_{iteration:07d}"


def saved_iterations(checkpoints: Path) -> list[int]:
    """Iterations that have a folder of their own, newest first; whether they are whole is not looked at."""
    if not checkpoints.is_dir():
        return []
    names = (folder.name.removeprefix("iter_") for folder in checkpoints.glob("iter_*") if folder.is_dir())
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def sweep(checkpoints: Path) -> list[str]:
    """Removes what a killed save left half-written; returns the names. Only the run's one leader calls it."""
    leftovers = sorted(checkpoints.glob(f"{TEMPORARY_PREFIX}*")) if checkpoints.is_dir() else []
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [leftover.name for leftover in leftovers]


class CheckpointWriter:
    """Saves a role's state at iterations. At most one save is under way; the next one waits for it.

    A save is scheduled (`save`), copied to the host (`before_update` waits for that), written (`on_written` is told,
    on the leader), and verified when it is opened again.
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        keep_latest: int,
        asynchronous: bool,
        timeout_seconds: float,
        on_progress: Callable[[int], object] = lambda num_bytes: None,
        on_written: Callable[[str], object] = lambda text: None,
        part: str = "",
        publishes: Sequence[str] = (),
        is_kept: Callable[[int], bool] = lambda iteration: False,
        on_published: Callable[[int, Path], object] = lambda iteration, folder: None,
    ) -> None:
        """part: the role's folder in iter_N, where several roles share it; of these, one gives the whole its name, once
        the parts that it `publishes` are there. is_kept: which iterations are never let go of. on_published: called
        with what is whole, on the leader, in the thread that writes; the next save waits for it.
        """
        self.checkpoints = checkpoints
        self.part, self.publishes, self.is_kept = part, tuple(publishes), is_kept
        self.keep_latest = keep_latest
        self.asynchronous = asynchronous
        self.timeout_seconds = timeout_seconds
        self._on_progress, self._on_written, self._on_published = on_progress, on_written, on_published
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._held_seconds = 0.0  # of the save under way

    def save(self, role: Role, state: TrainingState, *, facts: dict[str, Any]) -> float:
        """Writes iter_N; returns the seconds for which the caller was held up. Collective over the role's ranks.

        Asynchronously: forward and backward passes may follow at once; before weights or moments are changed,
        `before_update` waits for the copy. facts: what else the manifest says of the run (its model section, versions).
        """
        began = time.monotonic()
        self.wait()
        parts = [part for part in _parts(role) if part.is_writer]
        tensors = {part.name: part.shard.trim(part.tensor) for part in parts}
        shards = {part.name: part.shard for part in parts}
        rank_state = {f"rank_state.{name}": value.clone() for name, value in role.generator_states.items()}
        place = {"world_size": len(role.groups.ranks), "device": device.current().type}
        body = {**asdict(state), **place, "parallel": role.parallel.model_dump(), **facts}
        groups = role.groups
        self._copy.mark()

        def write() -> None:
            copies = self._copy.run(tensors)
            self._write(groups, state.iteration, tensors=copies, shards=shards, rank_state=rank_state, state=body)

        if self.asynchronous:
            self._thread = threading.Thread(target=self._guarded, args=(write,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()
        self._held_seconds = time.monotonic() - began
        return self._held_seconds

    def before_update(self) -> float:
        """Waits until a save under way has its copy of what an update changes; returns the seconds."""
        seconds = self._copy.wait()
        self._held_seconds += seconds
        return seconds

    def wait(self) -> None:
        """Waits for this rank's part of the save under way, and raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def finish(self, groups: Groups) -> None:
        """Waits until the save under way is whole on disk. Collective over the role's ranks."""
        self.wait()
        barrier(groups)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # handed to the training thread, which raises it in `wait`
            self._failure = error

    def _write(
        self,
        groups: Groups,
        iteration: int,
        *,
        tensors: dict[str, torch.Tensor],
        shards: dict[str, ParameterShard],
        rank_state: dict[str, torch.Tensor],
        state: dict[str, Any],
    ) -> None:
        """This rank's shard and note; on the leader also the manifest, the rename and the retention."""
        began = time.monotonic()
        folder = self.checkpoints / f"{TEMPORARY_PREFIX}iter_{iteration:07d}" / self.part
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder} cannot be made: {error}") from error
        size = len(groups.ranks)
        file = f"rank-{groups.role_rank:05d}-of-{size:05d}.safetensors"
        contents = {**tensors, **rank_state}
        facts = files.write_shard(folder, file=file, tensors=contents, on_progress=self._on_progress)
        note = {
            "file": file,
            "facts": facts,
            "tensors": {
                name: {
                    "shape": list(shard.global_shape),
                    "dtype": files.DTYPE_NAMES[tensors[name].dtype],
                    **files.shard_to_json(shard),
                }
                for name, shard in shards.items()
            },
            "rank_state": [name.removeprefix("rank_state.") for name in rank_state],
        }
        write_json(folder / f"note-{groups.role_rank:05d}.json", note)
        if groups.is_leader:
            num_bytes = self._complete(folder, iteration, num_ranks=size, state=state)
            seconds = time.monotonic() - began
            whose = f" of {self.part}" if self.part else ""
            self._on_written(
                f"checkpoint{whose} of step {iteration} written: {num_bytes / 1e6:,.1f} MB in {seconds:.2f} s "
                f"(training held for {self._held_seconds:.2f} s)"
            )
            if not self.part or self.publishes:
                self._on_published(iteration, iteration_folder(self.checkpoints, iteration))

    def _complete(self, folder: Path, iteration: int, *, num_ranks: int, state: dict[str, Any]) -> int:
        """Gathers the notes into the manifest, gives the folder its name, and lets go of the oldest checkpoints.

        Returns the bytes of all shards.
        """
        notes = {}
        for rank in range(num_ranks):
            with waiting_for(f"rank {rank}'s part of the checkpoint"):
                notes[rank] = self._await_note(folder / f"note-{rank:05d}.json")
        manifest = files.Manifest(state=state, tensors={}, rank_state={}, files={})
        for rank, note in notes.items():
            manifest.files[note["file"]] = note["facts"]
            manifest.rank_state[str(rank)] = dict.fromkeys(note["rank_state"], note["file"])
            for name, part in note["tensors"].items():
                shape = tuple(part["shape"])
                entry = manifest.tensors.setdefault(name, files.TensorEntry(shape, part["dtype"]))
                entry.pieces.append(files.Piece(note["file"], files.shard_from_json(part, shape=shape)))
        for rank in notes:
            (folder / f"note-{rank:05d}.json").unlink()
        files.write_manifest(folder, manifest)  # last: from now on another role may give the whole its name
        if not self.part or self.publishes:
            self._publish(folder.parent if self.part else folder, iteration)
        return sum(int(facts["bytes"]) for facts in manifest.files.values())

    def _publish(self, folder: Path, iteration: int) -> None:
        """Gives what is whole its name, and lets go of the oldest checkpoints."""
        for part in self.publishes:
            with waiting_for(f"the checkpoint of {part}"):
                self._await_file(folder / part / files.MANIFEST)
        final = iteration_folder(self.checkpoints, iteration)
        if final.exists():  # an older run's, damaged or of an abandoned course
            self._remove(final)
        folder.rename(final)
        sync_folder(self.checkpoints)
        # Later ones, damaged or of an abandoned course, do not count among those kept.
        course = [saved for saved in saved_iterations(self.checkpoints) if saved <= iteration]
        for old in course[self.keep_latest :]:
            if not self.is_kept(old):
                self._remove(iteration_folder(self.checkpoints, old))

    def _await_note(self, path: Path) -> dict[str, Any]:
        """Another rank's note, as soon as it is there."""
        self._await_file(path)
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return note

    def _await_file(self, path: Path) -> None:
        """Returns once it is there. Writing a shard may take long; a rank that died never will."""
        deadline = time.monotonic() + max(self.timeout_seconds, 60.0) * 10
        while not path.exists():
            if time.monotonic() > deadline:
                raise PeerLost(f"{path} did not appear: that rank's part of the checkpoint was never written")
            time.sleep(0.01)

    def _remove(self, folder: Path) -> None:
        """Takes the name away first, so that a kill in between leaves nothing that looks like a checkpoint."""
        doomed = folder.with_name(f"{TEMPORARY_PREFIX}old-{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def find_resumable(
    checkpoints: Path,
    groups: Groups,
    *,
    resume: str | int,
    say: Callable[[str], None],
    parts: Sequence[str] = ("",),
) -> tuple[Path, files.Manifest] | None:
    """The checkpoint to go on from, verified by all ranks together; None where a run starts afresh. Collective.

    parts: the roles' folders in it; the manifest is the first one's.

    `auto` takes the newest valid one and says which were passed over; a number names one, which must be there
    (ConfigError) and whole (DataError). Where checkpoints exist and none is whole: DataError, never from scratch.
    """
    if resume == "never":
        return None
    wanted = None if resume == "auto" else int(resume)
    damaged = []
    for iteration in _agreed_candidates(checkpoints, groups, wanted=wanted):
        folder = iteration_folder(checkpoints, iteration)
        problem = next((found for part in parts if (found := shared_problem(folder / part, groups))), None)
        if problem is None:
            return folder, files.read_manifest(folder / parts[0])
        if wanted is not None:
            raise DataError(
                f"{problem}; checkpoint.resume names iteration {wanted}: use `auto` for the newest valid one"
            )
        say(f"checkpoint {folder.name} is passed over: {problem}")
        damaged.append(problem)
    if damaged:
        raise DataError(
            f"no checkpoint in {checkpoints} is whole ({damaged[0]}); restore one, choose another run_dir, or start "
            f"afresh with checkpoint.resume=never"
        )
    return None


def _agreed_candidates(checkpoints: Path, groups: Groups, *, wanted: int | None) -> list[int]:
    """The leader's view of the folder, on all ranks: a shared file system may show them different ones."""
    size = 64
    seen = torch.zeros(size, dtype=torch.int64)
    found = saved_iterations(checkpoints)
    if wanted is not None:
        found = [wanted] if wanted in found else []
    if groups.role_rank == 0:
        for place, iteration in enumerate(found[:size]):
            seen[place] = iteration + 1
    agreed = sum_over(seen.to(device.current()), groups.all_ranks).tolist()
    candidates = [int(value) - 1 for value in agreed if value]
    if wanted is not None and not candidates:
        there = ", ".join(map(str, saved_iterations(checkpoints))) or "none"
        raise ConfigError(f"checkpoint.resume ({wanted}): {checkpoints} holds no such iteration; there are: {there}")
    return candidates


def shared_problem(folder: Path, groups: Groups) -> str | None:
    """Verifies a checkpoint, each rank its share of the files; all get the first finding. None: it is whole."""
    problem = None
    try:
        manifest = files.read_manifest(folder)
        files.verify_files(folder, manifest, files=sorted(manifest.files)[groups.role_rank :: len(groups.ranks)])
        if groups.role_rank == 0:
            files.verify_coverage(folder, manifest)
    except (ConfigError, DataError) as error:
        problem = str(error)
    size = 1024  # bytes of the message, for a tensor of one shape on all ranks
    text = (problem or "").encode()[:size].ljust(size, b"\0")
    told = joined_over(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device.current()), groups.all_ranks)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in told.reshape(-1, size).tolist()]
    return next((text for text in texts if text), None)


@torch.no_grad()
def load_weights(role: Role, folder: Path, manifest: files.Manifest) -> None:
    """Fills the role's weights, main weights included, from a folder's tensors of any layout; nothing else of it.

    A value head stays as it is where the folder, a language model's, holds none.
    """
    owned = role.owned_parameters()
    with TensorReader(folder, manifest) as reader:
        for named in role.named_parameters():
            if named.name in reader or named.name != VALUE_HEAD:
                _load_weight(reader, named, owned.get(named.parameter))


def load_state(role: Role, folder: Path, manifest: files.Manifest) -> TrainingState:
    """Fills weights, optimizer and random generators from a verified checkpoint; returns where the run stands.

    Generators are restored where there are as many ranks as the writer's, on the same kind of device; others keep their
    fresh ones.
    """
    state = TrainingState(**{name: manifest.state[name] for name in TrainingState.__dataclass_fields__})
    owned = role.owned_parameters()
    frozen = manifest.state.get(FROZEN_UPDATES, {})
    with TensorReader(folder, manifest) as reader:
        for named in role.named_parameters():
            mine = owned.get(named.parameter)
            _load_weight(reader, named, mine)
            if mine is not None:
                steps = state.optimizer_steps - frozen.get(part_of_model(named.name), 0)
                _load_moments(reader, named, mine, steps=steps)
        here = (len(role.groups.ranks), device.current().type)
        if (manifest.state["world_size"], manifest.state.get("device")) == here:
            role.generator_states = reader.read_rank_state(role.groups.role_rank) or role.generator_states
    return state


@torch.no_grad()
def _load_weight(reader: TensorReader, named: NamedParameter, owned: OwnedParameter | None) -> None:
    main_name = f"optimizer.{MAIN_PARAM}.{named.name}"
    full_precision = named.parameter.dtype == torch.float32 and main_name in reader
    reader.read_into(main_name if full_precision else named.name, named.parameter, named.shard)
    if owned is not None and owned.has_main_weights:
        # Without stored main weights: in the stored precision, which may be more than the parameter's.
        name = main_name if main_name in reader else named.name
        reader.read_into(name, owned.main, owned.shard_of(named.shard))


def _load_moments(reader: TensorReader, named: NamedParameter, owned: OwnedParameter, *, steps: int) -> None:
    main = owned.main
    moments = {name: torch.zeros_like(main, memory_format=torch.preserve_format) for name in MOMENTS}
    for name, moment in moments.items():
        if steps:
            reader.read_into(f"optimizer.{name}.{named.name}", moment, owned.shard_of(named.shard))
    step = torch.tensor(float(steps), device=main.device)
    owned.inner.state[main] = {"step": step, **moments} if steps else {}


def _parts(role: Role) -> list[_Part]:
    """This rank's tensors that make up the state, in the same order on all replicas, with the one that writes each.

    Replicas share the writing: under the distributed optimizer each writes the part that it updates, weights included
    (the rest may be stale until it is gathered); otherwise a tensor goes to the data parallel rank with the fewest
    bytes so far, the same computation on each. One that is not split by tensor parallelism is written by tensor
    parallel rank 0; a tied embedding by stage 0.
    """
    groups = role.groups
    owned = role.owned_parameters()
    is_distributed = role.optimizer is not None and role.parallel.use_distributed_optimizer
    load = [0] * groups.dp_size
    tied_copy = role.model.has_tied_output_layer and groups.pp_size > 1 and groups.is_last_stage
    parts = []
    for named in role.named_parameters():
        mine = owned.get(named.parameter)
        if is_distributed and mine is None:
            continue
        shard = mine.shard_of(named.shard) if mine is not None else named.shard
        tensors = _state_tensors(named, mine)
        if is_distributed:
            writer = groups.dp_rank
        else:
            writer = load.index(min(load))
            load[writer] += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        split = getattr(named.parameter, "tensor_model_parallel", False)
        is_embedding_copy = tied_copy and named.name == EMBEDDING
        is_writer = (
            writer == groups.dp_rank and (split or groups.tp_rank == 0) and not is_embedding_copy and shard.numel > 0
        )
        parts += [_Part(name, tensor, shard, is_writer) for name, tensor in tensors.items()]
    return parts


def _state_tensors(named: NamedParameter, owned: OwnedParameter | None) -> dict[str, torch.Tensor]:
    """A parameter's tensors by their names in the checkpoint: itself, its main weights, its moments; what is owned."""
    if owned is None:
        return {named.name: named.parameter.detach()}
    tensors = {named.name: owned.part_of(named.parameter.detach())}
    if owned.has_main_weights:
        tensors[f"optimizer.{MAIN_PARAM}.{named.name}"] = owned.main.detach()
    moments = owned.inner.state.get(owned.main, {})
    return {**tensors, **{f"optimizer.{name}.{named.name}": moments[name] for name in MOMENTS if name in moments}}
