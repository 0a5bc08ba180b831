"""The verbs over data folders: building one, and looking at one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from megatron_xy.cli.options import AsJson, Overrides, say, tell_whole
from megatron_xy.errors import UsageError
from megatron_xy.runtime.signals import cleaned_up_on_signals

FILE_COLUMNS = 120  # of tables that go into a file or a pipe, where no number is to be cut
DIR_OF_RUN = "the run's data folder, or one of several in data.path, which are joined"

data_app = typer.Typer(no_args_is_help=True, help="Build, look at and verify bucketed datasets.")


@data_app.command("build")
def data_build(
    inputs: Annotated[
        list[str], typer.Option("--input", metavar="PATH...", help="files, folders or globs; repeat, or list them")
    ],
    tokenizer: Annotated[
        Path,
        typer.Option("--tokenizer", help="a SentencePiece tokenizer.model, a tokenizer.json, or a folder with one"),
    ],
    output: Annotated[Path, typer.Option("--output", help="the data folder to make")],
    more_inputs: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="further inputs")] = None,
    buckets: Annotated[
        str | None, typer.Option("--buckets", help="sizes in tokens, ascending; 2048,4096,8192,16384 unless given")
    ] = None,
    source: Annotated[
        str, typer.Option("--source", metavar="NAME", help="of documents of which no field tells it")
    ] = "default",
    source_field: Annotated[
        str | None, typer.Option("--source-field", help="the row's field that names its source")
    ] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="the row's field that holds the text")] = "text",
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="end every text with the end-of-document token")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="processes")] = 1,
    bad_lines: Annotated[
        Literal["limit", "fail", "skip"],
        typer.Option("--bad-lines", help="limit: leave out up to 0.1% of the lines; fail: none; skip: any number"),
    ] = "limit",
    packing: Annotated[
        Literal["best_fit", "concatenate"],
        typer.Option("--packing", help="concatenate: Megatron's fixed-length samples, of --seq-length tokens"),
    ] = "best_fit",
    seq_length: Annotated[int | None, typer.Option("--seq-length", min=1, help="with --packing concatenate")] = None,
    overflow: Annotated[
        Literal["split", "drop", "truncate", "truncate_left"],
        typer.Option("--overflow", help="what becomes of documents longer than the largest bucket"),
    ] = "split",
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="of documents with the same text only the first stays")
    ] = False,
    held_out: Annotated[
        float, typer.Option("--held-out", metavar="FRACTION", help="this share of the documents goes into DIR/held_out")
    ] = 0.0,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="NAME|FILE",
            help="take conversations: xuanyuan, xuanyuan-70b, llama-2, chatml, tokenizer (its own), or a Jinja file",
        ),
    ] = None,
    chat_overflow: Annotated[
        Literal["refuse", "truncate_left", "split"],
        typer.Option("--chat-overflow", help="what becomes of conversations longer than the largest bucket"),
    ] = "refuse",
    last_turn_only: Annotated[
        bool, typer.Option("--last-turn-only", help="of a conversation only the last answer is learned")
    ] = False,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="this share only; the last one to end finishes")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"],
        typer.Option("--executor", help="where the workers are: processes here, or tasks of the running Ray cluster"),
    ] = "local",
    as_json: AsJson = False,
) -> None:
    """Tokenises a corpus, texts or conversations, and packs it into buckets, as Megatron's .bin/.idx.

    The same command on several machines that share the folders does the work together. Stopped or killed, it goes on
    where it was (exit code 75 after ctrl-C, SIGTERM or SIGUSR1). A --shard that is done ends with 0, whether or not
    the others are there: the data set is finished once DIR/manifest.json is.
    """
    # A process with threads cannot be forked, and numpy would start some, of which a build has no use.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from megatron_xy.data.building.build import build_dataset
    from megatron_xy.data.building.options import DEFAULT_BUCKETS, BuildOptions, Share
    from megatron_xy.data.inspection.progress import showing_progress

    if (packing == "concatenate") != (seq_length is not None):
        raise UsageError("--packing concatenate and --seq-length go together; give both, or neither")
    if seq_length is not None and buckets is not None:
        raise UsageError("--seq-length gives samples of one length; leave --buckets off")
    sizes: Sequence[int] = DEFAULT_BUCKETS if buckets is None else _numbers(buckets, option="--buckets")
    options = BuildOptions(
        buckets=sizes if seq_length is None else [seq_length],
        source=source,
        source_field=source_field,
        text_field=text_field,
        append_eod=append_eod,
        bad_lines=bad_lines,
        packing=packing,
        overflow=overflow,
        deduplicate=deduplicate,
        held_out=held_out,
        chat_template=chat_template,
        chat_overflow=chat_overflow,
        last_turn_only=last_turn_only,
    )
    with showing_progress() as progress, cleaned_up_on_signals("; the same command goes on where it was"):
        stats = build_dataset(
            [*inputs, *(more_inputs or [])],
            tokenizer=tokenizer,
            output=output,
            options=options,
            workers=workers,
            executor=executor,
            shard=Share.parse(shard) if shard is not None else None,
            progress=progress,
        )
    if stats["finished"]:
        _show_stats(stats, output, as_json=as_json)
    elif as_json:
        print(json.dumps(stats))
    else:
        print(f"share {shard} is done; {stats['missing']} token shard(s) of others are not there yet")


@data_app.command("stats")
def data_stats(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="FOLDER", help="also histograms, as PNG")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Documents, tokens, samples, shares and the three ratios of a data folder, beside samples of fixed length; what of
    the corpus was left out.
    """
    from megatron_xy.data.inspection.examine import dataset_stats

    if pictures is not None:
        from megatron_xy.data.inspection.pictures import draw_statistics

        for path in draw_statistics(directory, pictures):
            say(f"wrote {path}")
    _show_stats(dataset_stats(directory), directory, as_json=as_json)


@data_app.command("show")
def data_show(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    source: Annotated[str | None, typer.Option("--source", help="samples of this source only")] = None,
    bucket: Annotated[int | None, typer.Option("--bucket", help="samples of this bucket only")] = None,
    index: Annotated[int, typer.Option("--index", min=0, help="number of the first sample")] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="samples of each source and bucket")] = 1,
    as_json: AsJson = False,
) -> None:
    """Samples as text: a colour a document, a bar between two, tokens that the loss leaves out reversed or dim."""
    from megatron_xy.data.inspection.show import shown_samples

    samples = shown_samples(directory, source=source, bucket=bucket, index=index, count=count)
    if as_json:
        rows = [{"sample": each.heading, "text": each.plain, "learned": each.learned} for each in samples]
        print(json.dumps(rows))
        return
    console = Console()
    for sample in samples:
        console.rule(escape(sample.heading), align="left")
        console.print(sample.coloured, soft_wrap=True)


@data_app.command("verify")
def data_verify(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Checks sizes, checksums, sample lengths and token ids of a data folder."""
    from megatron_xy.data.inspection.examine import verify_dataset
    from megatron_xy.data.inspection.progress import showing_progress

    with showing_progress() as progress:
        verify_dataset(directory, progress=progress)
    tell_whole(directory, as_json=as_json)


@data_app.command("plan-steps")
def data_plan_steps(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help=DIR_OF_RUN)],
    config: Annotated[Path, typer.Option("--config", metavar="RUN.yaml")],
    steps: Annotated[str, typer.Option("--steps", metavar="A:B", help="data steps, half-open, from 0")],
    data_parallel_size: Annotated[int, typer.Option("--data-parallel-size", min=1)] = 1,
    data_parallel_rank: Annotated[int, typer.Option("--data-parallel-rank", min=0)] = 0,
    overrides: Overrides = None,
) -> None:
    """Which samples a data parallel rank draws at which step: JSON lines, one a (step, source)."""
    from megatron_xy.data.inspection.plan_steps import plan_steps

    rows = plan_steps(
        directory,
        config_path=config,
        overrides=overrides or [],
        steps=_steps(steps),
        data_parallel_size=data_parallel_size,
        data_parallel_rank=data_parallel_rank,
    )
    for row in rows:
        print(json.dumps(row))


@data_app.command("trace")
def data_trace(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help=DIR_OF_RUN)],
    config: Annotated[Path, typer.Option("--config", metavar="RUN.yaml")],
    steps: Annotated[str, typer.Option("--steps", metavar="A:B", help="data steps, half-open, from 0")],
    overrides: Overrides = None,
) -> None:
    """The documents (file, line) that were drawn at these steps: JSON lines, one a sample."""
    from megatron_xy.data.inspection.plan_steps import trace_steps

    for row in trace_steps(directory, config_path=config, overrides=overrides or [], steps=_steps(steps)):
        print(json.dumps(row))


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise UsageError(f"--steps {text}: must be A:B, such as 0:10")
    if int(first) >= int(last):
        raise UsageError(f"--steps {text}: holds no step; A must be below B")
    return range(int(first), int(last))


def _numbers(text: str, *, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"{option} {text}: must be numbers with commas between them")
    return [int(part) for part in parts]


def _show_stats(stats: Any, directory: Path, *, as_json: bool) -> None:
    from megatron_xy.data.inspection.progress import left_out, ratios_table, stats_table

    lines = left_out(stats, directory=directory)
    if as_json:
        print(json.dumps(stats))
        if lines:
            say("; ".join(lines))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, FILE_COLUMNS)
    console.print(stats_table(stats, title=str(directory)))
    console.print(ratios_table(stats))
    for line in lines:
        print(line)
