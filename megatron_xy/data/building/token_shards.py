"""Parts of the inputs -> token shards, from text and Megatron's .bin/.idx alike; bad lines are judged and listed."""

from __future__ import annotations

from dataclasses import replace as replace_fields
from pathlib import Path

from megatron_xy.data.building.claims import CLAIMS_FOLDER
from megatron_xy.data.building.prefixes import copy_documents
from megatron_xy.data.building.tokenize import (
    MadeMeanwhile,
    TokenizeTask,
    TokenShard,
    read_receipt,
    tokenize_documents,
    write_receipt,
)
from megatron_xy.data.building.workers import Advance, Workers
from megatron_xy.data.corpus.documents import BadLinePolicy, LineReport
from megatron_xy.data.corpus.inputs import is_prefix
from megatron_xy.data.encoding.fast_engine import FAST_ENGINE
from megatron_xy.data.manifest import BAD_LINES_NAME
from megatron_xy.storage import storage_errors, temporary_name


def make_token_shards(
    pool: Workers, tasks: list[TokenizeTask], *, most_lines: int | None, work: Path
) -> tuple[list[TokenShard], LineReport, Path]:
    """Run all tasks, but for what other builds do; last comes the list of bad lines: a file of this build's own.

    most_lines: as many as all inputs have at most, also where `tasks` are a share of them. Raises DataError with the
    bad lines seen so far, at the end of the first file after which the policy is sure to be broken.
    """
    listing = work / temporary_name(BAD_LINES_NAME)
    shards: list[TokenShard] = []
    report = LineReport()
    last_task = {part.path: index for index, task in enumerate(tasks) for part in task.parts}
    claims = [work / CLAIMS_FOLDER / f"tokenize-{task.folder.name}" for task in tasks]
    total = sum(part.stop - part.start for task in tasks for part in task.parts)
    made = pool.run("tokenize", make_token_shard, tasks, total=total, unit="bytes", claims=claims)
    judged_after = len(tasks) - 1  # the task that ends the first file with bad lines
    with storage_errors(listing), listing.open("w", encoding="utf-8") as stream:
        for index, shard in enumerate(made):
            shards.append(shard)
            if shard.report.bad_lines and not report.bad_lines:
                judged_after = min(last_task[path] for path in _bad_files(tasks[index], shard.report))
            report.add(shard.report)
            stream.writelines(f"{line}\n" for line in shard.report.listed)
            if more := shard.report.bad_lines - len(shard.report.listed):
                stream.write(f"{tasks[index].parts[-1].path}: {more} more\n")
            if index >= judged_after:
                _judge(report, policy=tasks[index].bad_lines, most_lines=most_lines)
    return shards, report, listing


def make_token_shard(task: TokenizeTask, advance: Advance) -> TokenShard:
    """One token shard, unless its receipt says that it is done.

    Raises as `tokenize_documents` and `copy_documents`; a shard with bad lines is not done where they are an error.
    """
    task = _in_its_folder(task)
    done = read_receipt(task.folder)
    if done is not None:
        advance(sum(part.stop - part.start for part in task.parts))
        return done
    make = copy_documents if is_prefix(task.parts[0].path) else tokenize_documents
    try:
        shard = make(task, advance)
    except MadeMeanwhile:
        return make_token_shard(task, lambda size: None)
    if not (shard.report.bad_lines and task.bad_lines == "fail"):
        write_receipt(shard)
    return shard


def _in_its_folder(task: TokenizeTask) -> TokenizeTask:
    """In another folder where fastokens made the shard and this build does not trust it: others may be reading it."""
    done = read_receipt(task.folder)
    if task.fast or done is None or not done.engine.startswith(FAST_ENGINE):
        return task
    return replace_fields(task, folder=task.folder.with_name(f"{task.folder.name}-reference"))


def _bad_files(task: TokenizeTask, report: LineReport) -> list[str]:
    """The files of one task that have bad lines."""
    return [path for path in {part.path for part in task.parts} if any(x.startswith(f"{path}:") for x in report.listed)]


def _judge(report: LineReport, *, policy: BadLinePolicy, most_lines: int | None) -> None:
    """Raises DataError where what is known so far breaks the policy."""
    if policy == "fail":
        report.raise_if_bad()
    if policy == "limit" and most_lines is not None:
        report.raise_if_too_bad(most_lines=most_lines)
