"""`data build`: a corpus -> a data folder of packed samples, and one of held-out documents in it.

What is asked for is checked before anything is written; then build_folder.py makes each folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_xy.data.building.build_folder import FolderBuild, build_folder
from megatron_xy.data.building.options import BuildOptions, Share
from megatron_xy.data.building.work_folder import WORK_FOLDER
from megatron_xy.data.building.workers import Advance, ExecutorName, Progress, Workers
from megatron_xy.data.chat.encode import ChatOptions
from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.corpus.documents import ScannedFile
from megatron_xy.data.corpus.inputs import find_inputs, group_parts, input_size, is_prefix, part_bytes_for, scan_file
from megatron_xy.data.corpus.selection import MOST_FILES, Selection
from megatron_xy.data.encoding.loaded import load_anew, load_engines
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.manifest import HELD_OUT_NAME, MANIFEST_NAME
from megatron_xy.errors import ConfigError


def build_dataset(
    inputs: Sequence[Path | str],
    *,
    tokenizer: Path | str,
    output: Path | str,
    options: BuildOptions,
    workers: int = 1,
    executor: ExecutorName = "local",
    shard: Share | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise and pack a corpus into the data folder `output`; returns `dataset_stats`, "finished" and "reused".

    The same call may be made by several processes, on several machines that see the same folders, at once or later:
    each does what no other is doing, one of them finishes, and all return the same. executor: see Workers.
    shard: tokenise this share only, and finish the data set if all other shares are there; else "finished" is false and
    nothing but "missing", the number of token shards not made yet, is returned, without waiting for them.

    The result is the same for any number of workers and machines. Killed at any moment, the same call goes on where it
    was; where it is already finished, nothing is done and "reused" is true.
    `progress(phase, done, total, unit)` is called about twice a second.
    Raises ConfigError (options that do not fit inputs or tokenizer, paths, another data set in `output`), DataError
    (corpus, tokenizer), StorageError.
    """
    loaded = load_anew(tokenizer)
    if options.append_eod and loaded.eos_id is None:
        raise ConfigError(f"append_eod (true): {loaded.without_end_token}; leave it off")
    chat = _chat_options(options, loaded)
    files = find_inputs(inputs)
    _check_inputs(files, options)
    folder = Path(output)
    _check_output(folder, inputs, held_out=options.held_out)
    prepare = partial(load_engines, loaded.path)
    with Workers(workers, progress=progress, executor=executor, prepare=prepare) as pool:
        total = sum(input_size(file) for file in files)
        part_bytes = part_bytes_for(total)
        to_scan = [(file, index, part_bytes) for index, file in enumerate(files)]
        scanned = list(pool.run("scan", _scan, to_scan, total=total, unit="bytes"))
        of_folder = partial(FolderBuild, scanned=scanned, tokenizer=loaded, options=options, chat=chat)
        builds = [of_folder(folder, selection=Selection(held_out_fraction=options.held_out))]
        if options.held_out:  # the held-out data first, so that a finished data set has its held-out part
            held_out = Selection(held_out_fraction=options.held_out, held_out=True)
            builds.insert(0, of_folder(folder / HELD_OUT_NAME, selection=held_out))
        groups = group_parts(scanned, part_bytes=part_bytes)
        results = [build_folder(pool, groups, build=build, shard=shard) for build in builds]
    if not all(result["finished"] for result in results):
        return {"finished": False, "missing": sum(result.get("missing", 0) for result in results)}
    return results[-1]


def _chat_options(options: BuildOptions, tokenizer: Tokenizer) -> ChatOptions | None:
    """None where no conversations are taken."""
    if options.chat_template is None:
        return None
    template = load_chat_template(options.chat_template, tokenizer)
    return ChatOptions(
        template.name, template.source, options.chat_overflow, options.last_turn_only, options.buckets[-1]
    )


def _check_inputs(files: Sequence[Path], options: BuildOptions) -> None:
    """What is asked for can be done with inputs of these kinds."""
    tokens = [file for file in files if is_prefix(file)]
    if tokens and (options.deduplicate or options.held_out):
        raise ConfigError(
            f"deduplicate and held_out look at texts, and input ({tokens[0]}) holds tokens; build from the texts"
        )
    if tokens and options.append_eod:
        raise ConfigError(
            f"append_eod (true) cannot be given with token inputs, whose documents are taken as they lie, and input "
            f"({tokens[0]}) holds tokens; leave it off, or build from the texts"
        )
    if options.source_field is not None and all(is_prefix(file) or file.suffix == ".txt" for file in files):
        raise ConfigError(
            f"source_field ({options.source_field}) names a field of rows, and no input has rows: {files[0]} and the "
            "like have no fields; name their source itself (source)"
        )
    if len(files) >= MOST_FILES:
        raise ConfigError(f"input names {len(files)} files, must be fewer than {MOST_FILES}; join small ones")


def _check_output(folder: Path, inputs: Sequence[Path | str], *, held_out: float) -> None:
    """The output folder is new, empty, finished, or of an unfinished build; and no input folder holds it."""
    for given in inputs:
        if Path(given).is_dir() and folder.resolve().is_relative_to(Path(given).resolve()):
            raise ConfigError(f"output ({folder}) lies inside the input {given}; name a folder elsewhere")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output ({folder}) is a file; name a folder")
    if not held_out and (folder / HELD_OUT_NAME).exists():
        raise ConfigError(f"output ({folder}) holds a {HELD_OUT_NAME} of a build with held_out; name another folder")
    # Listed before it is asked whose it is: another process may just be beginning the same build, or ending it.
    entries = list(folder.iterdir()) if folder.is_dir() else []
    holds = any(entry.name != HELD_OUT_NAME or not entry.is_dir() or any(entry.iterdir()) for entry in entries)
    begun = [side / name for name in (WORK_FOLDER, MANIFEST_NAME) for side in (folder / HELD_OUT_NAME, folder)]
    if holds and not any(path.exists() for path in begun):
        raise ConfigError(f"output ({folder}) holds other files; name a new or empty folder")


def _scan(task: tuple[Path, int, int], advance: Advance) -> ScannedFile:
    path, index, part_bytes = task
    return scan_file(path, part_bytes=part_bytes, file=index, advance=advance)
