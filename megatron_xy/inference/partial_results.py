"""A file of results in the making: OUTPUT.partial keeps what is done, in any order, until OUTPUT is written whole.

Each writer appends lines to a file of its own, each with a checksum: a killed run loses nothing that was done but a
line that was being written, and the same command goes on from there, under any layout. OUTPUT itself appears in one
step, in order.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xy.errors import ConfigError, DataError, MegatronXYError, StorageError
from megatron_xy.inference.model_job import ModelJob, run_job
from megatron_xy.run_folder import RunDirBusy
from megatron_xy.storage import replace, storage_errors, temporary_name, write_json

Write = Callable[[Path, Iterable[bytes]], None]  # a file of all results in order, each a line of JSON

FACTS = "facts.json"
RUN = "run"  # the work folder of the processes that make the results


@dataclass(frozen=True)
class _Place:
    """Where a result's line begins."""

    file: Path
    offset: int


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """A jsonl file."""
    with path.open("wb") as target:
        target.writelines(lines)


class PartialResults:
    """The results of `output` by their numbers, from 0."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.partial")
        self.run_dir = self.folder / RUN

    def begin(self, facts: dict[str, Any]) -> None:
        """Makes the folder, or finds it as a run with the same `facts` (JSON) left it.

        Raises ConfigError otherwise, and as `make_beside`.
        """
        make_beside(self.output, self.folder)
        path = self.folder / FACTS
        if not path.exists():
            try:
                write_json(path, facts)
            except StorageError:
                with contextlib.suppress(OSError):  # it holds something
                    self.folder.rmdir()
                raise
            return
        try:
            before = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}; remove {self.folder} to start afresh") from None
        if changed := [name for name in facts if before.get(name) != facts[name]]:
            raise ConfigError(
                f"{self.folder} holds results of a run that was not finished and differs in {', '.join(changed)}; give "
                f"the same options to go on, or remove the folder to start afresh"
            )

    def complete(
        self,
        facts: dict[str, Any],
        *,
        wanted: int,
        what: str,
        work: Callable[[], int],
        say: Callable[[str], None],
        write: Write = write_lines,
    ) -> int:
        """Has `work` make what is missing of `wanted` results, then writes them whole; returns its exit code.

        what: the results' name. `work` returns an exit code or raises; what was done until then is kept.
        """
        self.begin(facts)
        if there := len(self.done()):
            say(f"going on: {there:,} of {wanted:,} {what} are there")
        if there < wanted:
            try:
                code = work()
            except RunDirBusy:
                raise  # the folder is another run's
            except MegatronXYError:
                self.discard_if_empty()
                raise
            if code:
                self.discard_if_empty()
                return code
        self.finish(wanted, write=write)
        return 0

    def done(self) -> set[int]:
        """The numbers of the results that are there."""
        return set(self._places())

    def left(self, wanted: int) -> list[int]:
        """Of `wanted` results those that are not there; to be asked before a rank of this run can have written."""
        return sorted(set(range(wanted)) - self.done())

    def writer(self, number: int) -> ResultWriter:
        """For one of the processes that make results; each has a number of its own."""
        return ResultWriter(self.folder / f"results-{number:05d}")

    def writing(self, number: int | None) -> AbstractContextManager[ResultWriter | None]:
        """Inside, the writer of that number; None for a process that writes none."""
        return contextlib.nullcontext() if number is None else contextlib.closing(self.writer(number))

    def finish(self, count: int, *, write: Write = write_lines) -> None:
        """Writes results 0 to count - 1 to `output`, in order, in one step, and lets go of the folder."""
        places = self._places()
        assert set(places) >= set(range(count)), "a file is written once every result is there"
        temporary = self.output.with_name(temporary_name(self.output.name))
        streams = {path: path.open("rb") for path in {place.file for place in places.values()}}

        def lines() -> Iterator[bytes]:
            for number in range(count):
                stream = streams[places[number].file]
                stream.seek(places[number].offset)
                yield stream.readline().split(b"\t", 2)[2]

        try:
            with storage_errors(self.output):
                write(temporary, lines())
            replace(temporary, self.output)
        finally:
            for stream in streams.values():
                stream.close()
            temporary.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def discard_if_empty(self) -> None:
        """Lets go of a folder without results: a run that could not begin leaves nothing behind."""
        if self.folder.is_dir() and not self.done():
            shutil.rmtree(self.folder)

    def _places(self) -> dict[int, _Place]:
        places: dict[int, _Place] = {}
        for path in sorted(self.folder.glob("results-*")):
            for offset, number in _whole_lines(path):
                places[number] = _Place(path, offset)
        return places


def complete_job(
    job: ModelJob,
    facts: dict[str, Any],
    *,
    wanted: int,
    what: str,
    in_this_process: Callable[[], None],
    say: Callable[[str], None],
    write: Write = write_lines,
) -> int:
    """`PartialResults.complete` of a verb's --output by its ranks, or `in_this_process` where there is one."""
    results = PartialResults(Path(job.arguments["output"]))

    def work() -> int:
        return run_job(job, in_this_process=in_this_process)

    code = results.complete(facts, wanted=wanted, what=what, work=work, say=say, write=write)
    if code == 0:
        say(f"wrote {results.output}: {wanted:,} {what}")
    return code


def make_beside(output: Path, folder: Path) -> None:
    """Makes the work folder of `output`, or finds it there. Raises ConfigError, StorageError that name --output."""
    if not output.parent.is_dir():
        raise ConfigError(f"--output ({output}): there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise ConfigError(f"--output ({output}) is a folder; name a file")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"--output ({output}) cannot be written: {error.strerror}; make room or choose another folder"
        ) from None


class ResultWriter:
    """Appends results to one file: lines of the number, the CRC-32 of the rest in hex, and the result as JSON."""

    def __init__(self, path: Path) -> None:
        with storage_errors(path):
            self._path, self._stream = path, path.open("ab")
            self._stream.write(b"\n")  # behind what a kill may have cut off

    def add(self, number: int, result: dict[str, Any]) -> None:
        """One result, handed to the system when this returns."""
        with storage_errors(self._path):
            self._stream.write(_line(number, json.dumps(result, ensure_ascii=False).encode() + b"\n"))
            self._stream.flush()

    def close(self) -> None:
        """Ends the file."""
        self._stream.close()


def _line(number: int, rest: bytes) -> bytes:
    return b"%d\t%08x\t%b" % (number, zlib.crc32(rest, number), rest)


def _whole_lines(path: Path) -> Iterator[tuple[int, int]]:
    """(where it begins, the result's number) of each line that is as it was written."""
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            number, _, rest = line.partition(b"\t")
            if number.isdigit() and line == _line(int(number), rest.partition(b"\t")[2]):
                yield offset, int(number)
            offset += len(line)
