"""The verbs of a release: benchmarks of a model or of a run's checkpoints, forms in fewer bits, their comparison."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_xy.cli.options import AsJson, Layout, NprocPerNode, OtherTemplate, OtherTokenizer, failure, say
from megatron_xy.errors import EXIT_BAD_DATA, ConfigError, UsageError
from megatron_xy.runtime.signals import cleaned_up_on_signals

Scheme = Literal["int8", "nf4", "gptq-w4a16", "w8a8", "w8a16"]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", min=0, help="examples before a question; unless given 5 for financeiq, else the task's own"
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="first questions of each task, for a trial")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="of financeiq; of other tasks' data sets, as OWNER/NAME in it")
]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="ask as in a conversation")]


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="ckpt:DIR|hf:DIR|RUN", help="the model; of a run the newest checkpoint")
    ],
    tasks: Annotated[str, typer.Option("--tasks", metavar="NAME,...", help="financeiq, or any of lm-eval's")],
    overrides: Layout = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="every checkpoint of RUN as it comes, until it is done")
    ] = False,
    apply_chat_template: ApplyChatTemplate = False,
    chat_template: OtherTemplate = None,
    tokenizer: OtherTokenizer = None,
    as_json: AsJson = False,
    nproc_per_node: NprocPerNode = 1,
) -> None:
    """Benchmarks by lm-eval, of a model under any layout, or of every checkpoint of a run as it comes."""
    from megatron_xy.config import load_model_options
    from megatron_xy.inference.model_job import leave_on_signals

    is_run = not model.startswith(("ckpt:", "hf:"))
    if watch and not is_run:
        raise UsageError(f"{model}: must be a run_dir, with --watch")
    if watch and as_json:
        raise UsageError("--json goes without --watch, which writes RUN/evaluations.jsonl")
    if nproc_per_node == 1:
        leave_on_signals("; the same command goes on" if watch else "; nothing is kept")
    _prepare_lm_eval()
    options = load_model_options(
        f"ckpt:{model}" if is_run else model, overrides=overrides or [], world_size=nproc_per_node
    )
    from megatron_xy import device

    device.start(num_threads=options.runtime.num_threads)
    from megatron_xy.benchmarks import suite, verb
    from megatron_xy.benchmarks.answering import JobEnded
    from megatron_xy.benchmarks.checkpoints import newest_checkpoint
    from megatron_xy.benchmarks.watch import watch as watch_run

    benchmarks = suite.load_benchmarks(
        tasks,
        data_dir=data_dir,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template or chat_template is not None,
        say=say,
    )
    placement = verb.Placement(nproc_per_node, overrides or [], str(tokenizer) if tokenizer else None, chat_template)
    if watch:
        sys.exit(watch_run(Path(model), benchmarks, placement, say=say))
    origin = f"ckpt:{newest_checkpoint(Path(model), say=say)}" if is_run else model
    try:
        metrics = verb.evaluate(origin, benchmarks, placement)
    except JobEnded as ended:
        if as_json:
            print(failure(ended, code=ended.code))
        sys.exit(ended.code)
    print(json.dumps(metrics) if as_json else "\n".join(suite.rows_of(metrics)))


def quantize(
    source: Annotated[str, typer.Option("--from", metavar="ckpt:DIR|hf:DIR")],
    target: Annotated[str, typer.Option("--to", metavar="hf:DIR")],
    scheme: Annotated[Scheme, typer.Option("--scheme", help="int8, nf4: bitsandbytes; the others: llm-compressor")],
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="DIR|F.jsonl", help="a folder of `data build`, or rows")
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="for the calibration")] = 256,
    chat_template: Annotated[
        str | None,
        typer.Option("--chat-template", metavar="NAME|FILE", help="for the messages in F.jsonl; else the model's"),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", metavar="NAME|re:PATTERN", help="layers to leave as they are; repeat; lm_head unless given"
        ),
    ] = None,
) -> None:
    """Writes a model in 8 or 4 bits as an HF folder, whole or not at all."""
    is_in_files = scheme in ("int8", "nf4")
    if is_in_files:
        _need("transformers", "accelerate", "bitsandbytes", extra="int8")
    else:
        _need("transformers", "llmcompressor", extra="quantize")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder without a tokenizer is not looked for elsewhere
    _quiet_libraries()
    goes_on = "the same command goes on with the files that are done" if is_in_files else "the same command begins anew"
    with cleaned_up_on_signals(f"; {goes_on}"):
        from megatron_xy.quantisation.verb import quantize as write_quantised

        write_quantised(
            source,
            target,
            scheme=scheme,
            calibration=calibration,
            num_samples=num_samples,
            chat_template=chat_template,
            ignore=ignore or ["lm_head"],
            say=say,
        )


def compare(
    forms: Annotated[list[str], typer.Argument(metavar="hf:DIR...", help="forms of one model, one not quantised")],
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="held-out documents, of `data build`")],
    num_samples: Annotated[int, typer.Option("--num-samples", min=1, help="of each source and bucket")] = 16,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,...", help="benchmarks of each form, as for `evaluate`")
    ] = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    apply_chat_template: ApplyChatTemplate = False,
    write_cards: Annotated[
        bool, typer.Option("--write-cards", help="write the table into each form's README.md too")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compares a model's released forms: size, memory, perplexity, divergence from bf16, benchmarks."""
    ways = {"--num-fewshot": num_fewshot, "--limit": limit, "--data-dir": data_dir}
    ways["--apply-chat-template"] = apply_chat_template or None
    if tasks is None and (idle := [name for name, value in ways.items() if value is not None]):
        raise UsageError(f"{', '.join(idle)}: of benchmarks; name them with --tasks")
    _need("transformers", "accelerate", extra="int8")
    if write_cards and limit is not None:
        raise UsageError("--limit is for a trial; --write-cards needs all questions")
    asked: dict[str, str] = {}
    ask = None
    if tasks is not None:
        _prepare_lm_eval()
        from megatron_xy.benchmarks.opened import ask_opened
        from megatron_xy.benchmarks.suite import load_benchmarks

        benchmarks = load_benchmarks(
            tasks,
            data_dir=data_dir,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            say=say,
        )
        asked = {name: benchmarks.title(name) for name in benchmarks.names}
        ask = partial(ask_opened, benchmarks=benchmarks)
    from megatron_xy.quantisation import compare as comparing

    table, failed = comparing.compare(forms, data, num_samples=num_samples, ask=ask, say=say)
    if write_cards and not failed:
        comparing.write_cards(table, data=data, num_samples=num_samples, tasks=asked, say=say)
    print(json.dumps(table) if as_json else "\n".join(comparing.rows_of(table, tasks=asked)))
    if failed:
        cards = ", and no card written" if write_cards else ""
        say(f"{', '.join(failed)}: not measured, as was said{cards}; the others are")
        sys.exit(EXIT_BAD_DATA)


def _prepare_lm_eval() -> None:
    """Before it is imported: data are what is there, and nothing is fetched behind anyone's back."""
    _need("lm_eval", extra="evaluate")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars for each task; ours say how far the model is


def _quiet_libraries() -> None:
    """Before they are imported: no bars, and no advice on what is as it should be."""
    os.environ.setdefault("TQDM_DELAY", "1e9")  # seconds until a bar is shown; some take no heed of TQDM_DISABLE
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    # What they warn of: no kernel from elsewhere; layers that lie on disk; a function that has another name now.
    for name in ("bitsandbytes", "accelerate", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")


def _need(*modules: str, extra: str) -> None:
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ConfigError(f"needs {', '.join(missing)}, of the extra {extra}: pip install 'megatron-xy[{extra}]'")
