"""`data build`: a corpus -> a data folder of packed samples, and one of held-out documents in it.

What is asked for is checked before anything is written; then build_folder.py makes each folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

from megatron_xy.data.building.build_folder import FolderBuild, Share, build_folder
from megatron_xy.data.building.tokenize import group_parts, part_bytes_for
from megatron_xy.data.building.work_folder import WORK_FOLDER
from megatron_xy.data.building.workers import Advance, ExecutorName, Progress, Workers
from megatron_xy.data.chat.encode import ChatOptions, ChatOverflow
from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.corpus.documents import BadLinePolicy, Part, ScannedFile
from megatron_xy.data.corpus.inputs import find_inputs, input_size, is_prefix, scan_file
from megatron_xy.data.corpus.row_contents import DEFAULT_SOURCE
from megatron_xy.data.corpus.selection import MOST_FILES, Selection
from megatron_xy.data.encoding.loaded import load_anew, load_engines
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.data.manifest import HELD_OUT_NAME, MANIFEST_NAME, RESERVED_NAMES, SOURCE_RULE, is_source_name
from megatron_xy.data.packing.pack import (
    WINDOW_DOCUMENTS,
    Overflow,
    Packing,
    check_buckets,
    check_policy,
)
from megatron_xy.errors import ConfigError, UsageError

DEFAULT_BUCKETS = (2048, 4096, 8192, 16384)
WORK_FORMAT = 2  # of what an unfinished build leaves there: another version starts over


def build_dataset(
    inputs: Sequence[Path | str],
    *,
    tokenizer: Path | str,
    output: Path | str,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    source: str = DEFAULT_SOURCE,
    source_field: str | None = None,
    source_optional: bool = False,
    text_field: str = "text",
    append_eod: bool = False,
    workers: int = 1,
    bad_lines: BadLinePolicy = "limit",
    packing: Packing = "best_fit",
    overflow: Overflow = "split",
    deduplicate: bool = False,
    held_out: float = 0.0,
    chat_template: str | None = None,
    chat_overflow: ChatOverflow = "refuse",
    last_turn_only: bool = False,
    shard: Share | None = None,
    executor: ExecutorName = "local",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise and pack a corpus into the data folder `output`; returns `dataset_stats`, "finished" and "reused".

    deduplicate: of documents with the same text, over all inputs, the first one stays. held_out: this fraction of the
    documents, chosen by the hash of their text, goes into OUTPUT/held_out, a data folder of its own. append_eod: end
    every text with the end-of-document token; documents of Megatron datasets are taken as they lie, and refuse it.
    source: of documents of which no field tells it. source_optional: a row without the source field is one, and no bad
    line.
    chat_template: take rows that hold conversations as such, rendered by this template (see load_chat_template); their
    answers are learned, or with last_turn_only the last one. chat_overflow: see ChatOverflow.

    The same call may be made by several processes, on several machines that see the same folders, at once or later:
    each does what no other is doing, one of them finishes, and all return the same. executor: see Workers.
    shard: tokenise this share only, and finish the data set if all other shares are there; else "finished" is false and
    nothing but "missing", the number of token shards not made yet, is returned, without waiting for them.

    The result is the same for any number of workers and machines. Killed at any moment, the same call goes on where it
    was; where it is already finished, nothing is done and "reused" is true. `bad_lines` (see BadLinePolicy): all that
    are left out are counted and listed in OUTPUT/bad_lines.txt. `packing` and `overflow`: see packing/pack.py.
    `progress(phase, done, total, unit)` is called about twice a second.
    Raises UsageError (source, buckets), ConfigError (other arguments, paths, another data set in `output`), DataError
    (corpus, tokenizer), StorageError.
    """
    if not is_source_name(source):
        taken = ", ".join(sorted(RESERVED_NAMES))
        raise UsageError(f"source ({source[:100]}) must be {SOURCE_RULE}, and none of {taken}")
    sizes = check_buckets(buckets)
    check_policy(packing, overflow, buckets=sizes)
    loaded = load_anew(tokenizer)
    if append_eod and loaded.eos_id is None:
        raise ConfigError(f"append_eod (true): {loaded.without_end_token}; leave it off")
    chat = _chat_options(
        chat_template, loaded, overflow=chat_overflow, last_turn_only=last_turn_only, longest=sizes[-1], packing=packing
    )
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out ({held_out}) must be a fraction from 0 to below 1, such as 0.01")
    files = find_inputs(inputs)
    _check_inputs(files, append_eod=append_eod, source_field=source_field, looks_at_texts=deduplicate or held_out > 0)
    folder = Path(output)
    _check_output(folder, inputs, held_out=held_out)
    options = {
        "buckets": list(sizes),
        "append_eod": append_eod,
        "text_field": text_field,
        "source_field": source_field,
        "window_documents": WINDOW_DOCUMENTS,
        "packing": packing,
        "overflow": overflow,
        "deduplicate": deduplicate,
        "work_format": WORK_FORMAT,
        **({} if source == DEFAULT_SOURCE else {"source": source}),
        **({} if chat is None else {"chat": asdict(chat)}),
    }
    prepare = partial(load_engines, loaded.path)
    with Workers(workers, progress=progress, executor=executor, prepare=prepare) as pool:
        total = sum(input_size(file) for file in files)
        part_bytes = part_bytes_for(total)
        to_scan = [(file, index, part_bytes) for index, file in enumerate(files)]
        scanned = list(pool.run("scan", _scan, to_scan, total=total, unit="bytes"))
        groups = _group_parts(scanned, part_bytes=part_bytes)
        main = Selection(held_out_fraction=held_out)
        sides = {folder: main}
        if held_out:  # the held-out data first, so that a finished data set has its held-out part
            sides = {folder / HELD_OUT_NAME: replace_fields(main, held_out=True), folder: main}
        results = [
            build_folder(
                pool,
                groups,
                build=FolderBuild(
                    side,
                    scanned,
                    loaded,
                    {**options, "selection": asdict(selection)},
                    selection,
                    bad_lines,
                    chat,
                    source_optional,
                ),
                shard=shard,
            )
            for side, selection in sides.items()
        ]
    if not all(result["finished"] for result in results):
        return {"finished": False, "missing": sum(result.get("missing", 0) for result in results)}
    return results[-1]


def _chat_options(
    name: str | None,
    tokenizer: Tokenizer,
    *,
    overflow: ChatOverflow,
    last_turn_only: bool,
    longest: int,
    packing: Packing,
) -> ChatOptions | None:
    """None where no conversations are taken."""
    if overflow not in get_args(ChatOverflow):
        raise ConfigError(f"chat_overflow ({overflow}) must be one of {', '.join(get_args(ChatOverflow))}")
    if name is None:
        return None
    if packing == "concatenate":
        raise ConfigError("packing (concatenate) cuts documents anywhere; conversations need best_fit")
    template = load_chat_template(name, tokenizer)
    return ChatOptions(template.name, template.source, overflow, last_turn_only, longest)


def _check_inputs(files: Sequence[Path], *, append_eod: bool, source_field: str | None, looks_at_texts: bool) -> None:
    """What is asked for can be done with inputs of these kinds."""
    tokens = [file for file in files if is_prefix(file)]
    if tokens and looks_at_texts:
        raise ConfigError(
            f"deduplicate and held_out look at texts, and input ({tokens[0]}) holds tokens; build from the texts"
        )
    if tokens and append_eod:
        raise ConfigError(
            f"append_eod (true) cannot be given with token inputs, whose documents are taken as they lie, and input "
            f"({tokens[0]}) holds tokens; leave it off, or build from the texts"
        )
    if source_field is not None and all(is_prefix(file) or file.suffix == ".txt" for file in files):
        raise ConfigError(
            f"source_field ({source_field}) names a field of rows, and no input has rows: {files[0]} and the like have "
            "no fields; name their source itself (source)"
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


def _group_parts(files: Sequence[ScannedFile], *, part_bytes: int) -> list[tuple[Part, ...]]:
    """What becomes one token shard each; texts and Megatron datasets never come together."""
    runs = [list(run) for _, run in itertools.groupby(files, key=lambda file: is_prefix(file.path))]
    return [group for run in runs for group in group_parts(run, part_bytes=part_bytes)]
