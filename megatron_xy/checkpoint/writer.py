"""How a role's checkpoints are written: every rank its own part, and what has the final name is whole.

Saving copies the state, then writes it (in a thread under `async_save`): shards into a temporary folder, each with a
small note of its pieces; the leader waits for all notes, writes the manifest last and renames the folder.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_xy import device
from megatron_xy.checkpoint import files
from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.checkpoint.folders import iteration_folder, remove, saved_iterations
from megatron_xy.checkpoint.host_copy import HostCopy
from megatron_xy.checkpoint.state import StatePart, state_parts
from megatron_xy.errors import PeerLost, StorageError
from megatron_xy.parallel import Groups, barrier
from megatron_xy.role import Role
from megatron_xy.runtime.liveness import waiting_for
from megatron_xy.storage import TEMPORARY_PREFIX, sync_folder, write_json
from megatron_xy.tensors.files import dtype_name, write_tensors
from megatron_xy.tensors.shards import ParameterShard


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
        # Of the checkpoints behind that which the run has gone on from, those are whole that are its own.
        self._resumed_from = 0
        self._own: set[int] = set()
        self._wanted_before = 0
        self.asynchronous = asynchronous
        self.timeout_seconds = timeout_seconds
        self._on_progress, self._on_written, self._on_published = on_progress, on_written, on_published
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._held_seconds = 0.0  # of the save under way

    def begin(self, role: Role, *, iteration: int, train_iters: int) -> None:
        """Before the first step, if there is one: what the run goes on from, and the room for copies of its state in
        this host's memory.

        Raises ConfigError where the host has no room.
        """
        self._resumed_from = iteration
        if iteration < train_iters:
            parts = state_parts(role, with_moments_to_come=True)
            self._copy.prepare(_tensors(parts), on_progress=self._on_progress)

    def save(
        self, role: Role, state: TrainingState, *, facts: dict[str, Any], wanted_before: int | None = None
    ) -> float:
        """Writes iter_N; returns the seconds for which the caller was held up. Collective over the role's ranks.

        Asynchronously: forward and backward passes may follow at once; before weights or moments are changed,
        `before_update` waits for the copy. facts: what else the manifest says of the run (its model section, versions).
        wanted_before: the newest one before this iteration is not let go of, however many have come since.
        """
        began = time.monotonic()
        self.wait()
        self._wanted_before = wanted_before or 0
        parts = state_parts(role)
        tensors = _tensors(parts)
        shards = {part.name: part.shard for part in parts}
        place = {"world_size": len(role.groups.ranks), "device": device.current().type}
        body = {**asdict(state), **place, "parallel": role.parallel.model_dump(), **facts}
        groups = role.groups
        self._copy.mark()

        def write() -> None:
            copies = self._copy.run(tensors)
            self._write(groups, state.iteration, tensors=copies, shards=shards, state=body)

        if self.asynchronous:
            self._start(write)
        else:
            write()
        self._held_seconds = time.monotonic() - began
        return self._held_seconds

    def before_update(self) -> float:
        """Waits until a save under way has its copy of what an update changes; returns the seconds.

        Raises what went wrong in the save, if it has: what would be learned from here on could not be kept.
        """
        seconds = self._copy.wait()
        self._held_seconds += seconds
        self._raise_failure()
        return seconds

    def publish_again(self, iteration: int, groups: Groups) -> None:
        """Calls `on_published` for what was written before, in a thread; the next save waits for it. What goes wrong is
        said: another start would only meet it again."""

        def publish() -> None:
            try:
                self._on_published(iteration, iteration_folder(self.checkpoints, iteration))
            except Exception as error:
                self._on_written(f"warning: what follows the checkpoint of step {iteration} failed again: {error!r}")

        if groups.is_leader and self.is_publisher:
            self._start(publish)

    @property
    def is_publisher(self) -> bool:
        """Whether this role gives the whole its name."""
        return not self.part or bool(self.publishes)

    def wait(self) -> None:
        """Waits for this rank's part of the save under way, and raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def finish(self, groups: Groups) -> None:
        """Waits until the save under way is whole on disk. Collective over the role's ranks."""
        self.wait()
        barrier(groups)

    def _start(self, work: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=self._guarded, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # handed to the training thread, which raises it in `wait`
            self._failure = error

    def _write(
        self,
        groups: Groups,
        iteration: int,
        *,
        tensors: dict[str, torch.Tensor],
        shards: dict[str, ParameterShard],
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
        facts = write_tensors(folder / file, tensors, metadata=files.METADATA, on_progress=self._on_progress)
        note = {
            "file": file,
            "facts": facts,
            "tensors": {
                name: {
                    "shape": list(shard.global_shape),
                    "dtype": dtype_name(tensors[name].dtype),
                    **files.shard_to_json(shard),
                }
                for name, shard in shards.items()
            },
        }
        # The last that this rank does in the folder: once the leader has all notes, it syncs it and gives it its name.
        write_json(folder / f"note-{groups.role_rank:05d}.json", note, durable=False)
        if groups.is_leader:
            num_bytes = self._complete(folder, iteration, num_ranks=size, state=state)
            if self.is_publisher:
                self._publish(folder.parent if self.part else folder, iteration)
                self._let_go_of_the_oldest()
            else:  # nothing of this role is under way in the folder from here on
                _whole(folder).touch()
            seconds = time.monotonic() - began
            whose = f" of {self.part}" if self.part else ""
            self._on_written(
                f"checkpoint{whose} of step {iteration} written: {num_bytes / 1e6:,.1f} MB in {seconds:.2f} s "
                f"(training held for {self._held_seconds:.2f} s)"
            )
            if self.is_publisher:
                self._on_published(iteration, iteration_folder(self.checkpoints, iteration))

    def _complete(self, folder: Path, iteration: int, *, num_ranks: int, state: dict[str, Any]) -> int:
        """Gathers the notes into the manifest; returns the bytes of all shards."""
        notes = [folder / f"note-{rank:05d}.json" for rank in range(num_ranks)]
        manifest = files.Manifest(state=state, tensors={}, files={})
        for rank, path in enumerate(notes):
            with waiting_for(f"rank {rank}'s part of the checkpoint"):
                self._await_file(path)
            note = json.loads(path.read_text(encoding="utf-8"))
            manifest.files[note["file"]] = note["facts"]
            for name, part in note["tensors"].items():
                shape = tuple(part["shape"])
                entry = manifest.tensors.setdefault(name, files.TensorEntry(shape, part["dtype"]))
                entry.pieces.append(files.Piece(note["file"], files.shard_from_json(part, shape=shape)))
        for path in notes:
            path.unlink()
        files.write_manifest(folder, manifest)  # last: from now on it is a checkpoint
        return sum(int(facts["bytes"]) for facts in manifest.files.values())

    def _publish(self, folder: Path, iteration: int) -> None:
        """Gives what is whole its name."""
        for part in self.publishes:
            with waiting_for(f"the checkpoint of {part}"):
                self._await_file(_whole(folder / part))
            _whole(folder / part).unlink()
        final = iteration_folder(self.checkpoints, iteration)
        if final.exists():  # an older run's, damaged or of an abandoned course
            remove(final)
        folder.rename(final)
        sync_folder(self.checkpoints)
        self._own.add(iteration)

    def _let_go_of_the_oldest(self) -> None:
        """Removes all but those to keep; what the run has passed over does not count among these."""
        saved = saved_iterations(self.checkpoints)
        course = [number for number in saved if number <= self._resumed_from or number in self._own]
        wanted = next((number for number in course if number < self._wanted_before), None)
        for old in course[self.keep_latest :]:
            if old != wanted and not self.is_kept(old):
                remove(iteration_folder(self.checkpoints, old))

    def _await_file(self, path: Path) -> None:
        """Returns once it is there. Writing a shard may take long; a rank that died never will."""
        deadline = time.monotonic() + max(self.timeout_seconds, 60.0) * 10
        while not path.exists():
            if time.monotonic() > deadline:
                raise PeerLost(f"{path} did not appear: that rank's part of the checkpoint was never written")
            time.sleep(0.01)


def _tensors(parts: Sequence[StatePart]) -> dict[str, torch.Tensor]:
    return {part.name: part.shard.trim(part.tensor) for part in parts}


def _whole(part: Path) -> Path:
    """The file that tells that a role has written its part: beside it, for whoever gives both their name."""
    return part.with_name(f"{part.name}.whole")
