"""The verbs over a model in a folder: converting, answering, scoring, comparing, and extending its vocabulary."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_xy.cli.options import Layout, NprocPerNode, OtherTemplate, OtherTokenizer, say, start_rank_device
from megatron_xy.config import MIN_TEMPERATURE
from megatron_xy.errors import EXIT_COMPARISON_FAILED, ConfigError, UsageError
from megatron_xy.runtime.signals import cleaned_up_on_signals

# The verbs over a model whose ranks keep what is done: their modules, and what stays when one is stopped.
_OVER_MODEL = {
    "generate": (
        "megatron_xy.inference.answers",
        "; the answers that had ended are kept, and the same command goes on",
    ),
    "score": ("megatron_xy.inference.scores", "; the scores that were there are kept, and the same command goes on"),
    "logprobs": ("megatron_xy.inference.logprobs", "; the rows that were done are kept, and the same command goes on"),
    "evaluate": (
        "megatron_xy.benchmarks.answering",
        "; the answers that were there are kept where the command keeps its work",
    ),
}

vocab_app = typer.Typer(no_args_is_help=True, help="Extend a model's vocabulary.")


def convert(
    source: Annotated[str, typer.Option("--from", metavar="ckpt:DIR|hf:DIR")],
    target: Annotated[str, typer.Option("--to", metavar="hf:DIR|ckpt:DIR")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="fp32|bf16|fp16", help="the source's unless given")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="a tokenizer.model; the run's own unless given")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", metavar="5GB", help="of a file of weights; 5GB, or 1GB of a checkpoint's"),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="compare weights and logits with transformers'")] = False,
    verify_text: Annotated[
        Path | None, typer.Option("--verify-text", metavar="FILE", help="--verify on this text; else on drawn tokens")
    ] = None,
) -> None:
    """Converts a checkpoint or an HF folder into either; the same command goes on where a killed one stopped."""
    from megatron_xy.hf import verb

    verify = verify or verify_text is not None
    if verify and find_spec("transformers") is None:
        raise ConfigError("--verify needs transformers; it comes with the extra: pip install 'megatron-xy[hf]'")
    if verify_text is not None and not verify_text.is_file():
        raise ConfigError(f"--verify-text {verify_text}: there is no such file")
    with cleaned_up_on_signals("; the same command goes on with the files that are done", second_leaves=True):
        verb.convert(
            source,
            target,
            dtype=dtype,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            may_be_there=verify,
            say=say,
        )
        if not verify:
            return
        from megatron_xy import device

        device.start()
        from megatron_xy.hf.verify import verify as agrees

        if not agrees(source, target, text=verify_text, say=say):
            sys.exit(EXIT_COMPARISON_FAILED)


def generate(
    model: Annotated[str, typer.Argument(metavar="ckpt:DIR|hf:DIR", help="the model")],
    prompts: Annotated[
        Path, typer.Option("--prompts", metavar="F.jsonl", help='rows {"prompt": a string, or messages}')
    ],
    output: Annotated[Path, typer.Option("--output", metavar="F.jsonl", help="the answers, in the prompts' order")],
    overrides: Layout = None,
    num_answers: Annotated[int, typer.Option("-n", min=1, help="answers to each prompt")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: greedy")] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", max=1, help="draw from the likeliest tokens with this share in all; 1: all")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="draw from this many of the likeliest tokens; 0: all")
    ] = 0,
    max_response_length: Annotated[
        int, typer.Option("--max-response-length", min=1, help="tokens, with the stop token")
    ] = 512,
    min_response_length: Annotated[
        int, typer.Option("--min-response-length", min=0, help="tokens at least, with the stop token")
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TOKEN", help="a control token or a token id that ends an answer; repeat"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 1234,
    tokenizer: OtherTokenizer = None,
    chat_template: OtherTemplate = None,
    max_sequences: Annotated[
        int, typer.Option("--max-sequences", min=1, help="answers that each replica generates at a time")
    ] = 64,
    nproc_per_node: NprocPerNode = 1,
) -> None:
    """Answers prompts: sampled or greedy, n answers each, under any layout; goes on where a killed run stopped."""
    if not top_p > 0:
        raise UsageError(f"--top-p {top_p}: must be above 0")
    if 0 < temperature < MIN_TEMPERATURE:
        raise UsageError(f"--temperature {temperature}: must be 0, which is greedy, or at least {MIN_TEMPERATURE}")
    if min_response_length > max_response_length:
        raise UsageError(
            f"--min-response-length {min_response_length}: more than --max-response-length ({max_response_length})"
        )
    arguments = {
        "prompts": str(prompts), "num_answers": num_answers, "temperature": temperature,
        "top_p": top_p, "top_k": top_k, "min_response_length": min_response_length,
        "max_response_length": max_response_length, "max_sequences": max_sequences, "seed": seed, "stop": stop or [],
        "tokenizer": str(tokenizer) if tokenizer else None, "chat_template": chat_template,
    }  # fmt: skip
    _over_model("generate", model, overrides, nproc_per_node, output=output, arguments=arguments)


def score(
    model: Annotated[str, typer.Argument(metavar="ckpt:DIR|hf:DIR", help="a reward model")],
    input_file: Annotated[
        Path, typer.Option("--input", metavar="F.jsonl", help="rows with prompt and response or response_tokens")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="F.jsonl", help="the rows with their scores, in order")],
    overrides: Layout = None,
    tokenizer: OtherTokenizer = None,
    chat_template: OtherTemplate = None,
    micro_batch_tokens: Annotated[
        int, typer.Option("--micro-batch-tokens", min=1, help="each replica's; longer answers widen it")
    ] = 4096,
    nproc_per_node: NprocPerNode = 1,
) -> None:
    """Scores answers by a reward model, under any layout; goes on where a killed run stopped."""
    arguments = {
        "input": str(input_file), "micro_batch_tokens": micro_batch_tokens,
        "tokenizer": str(tokenizer) if tokenizer else None, "chat_template": chat_template,
    }  # fmt: skip
    _over_model("score", model, overrides, nproc_per_node, output=output, arguments=arguments)


def logprobs(
    model: Annotated[str, typer.Argument(metavar="ckpt:DIR|hf:DIR", help="the model")],
    input_file: Annotated[Path, typer.Option("--input", metavar="IDS.jsonl", help='rows {"tokens": [...]}')],
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="F.safetensors", help='row i as tensor "i", a number for each token but the first'
        ),
    ],
    overrides: Layout = None,
    nproc_per_node: NprocPerNode = 1,
) -> None:
    """Log-probabilities of given token rows, under any layout; goes on where a killed run stopped."""
    arguments = {"input": str(input_file)}
    _over_model("logprobs", model, overrides, nproc_per_node, output=output, arguments=arguments)


def _over_model(
    verb: str,
    model: str,
    overrides: list[str] | None,
    nproc_per_node: int,
    *,
    output: Path,
    arguments: dict[str, Any],
) -> None:
    """Such a verb's work to its end, here or on the ranks that it starts; ends this process."""
    from megatron_xy.inference.model_job import ModelJob, leave_on_signals
    from megatron_xy.inference.partial_results import PartialResults

    module, what_stays = _OVER_MODEL[verb]
    if nproc_per_node == 1:
        leave_on_signals(what_stays)
    run_dir = str(PartialResults(output).run_dir)
    job = ModelJob(verb, model, nproc_per_node, overrides or [], run_dir, arguments | {"output": str(output)})
    options = job.options()  # looked at first: what is wrong with them need not wait for torch
    from megatron_xy import device

    device.start(num_threads=options.runtime.num_threads)
    sys.exit(importlib.import_module(module).run(job, say=say))


def model_rank(job_file: Path) -> None:
    """One rank of a verb over a model, started by that verb."""
    from megatron_xy.inference.model_job import read_job
    from megatron_xy.runtime.worker import run_model_rank

    job = read_job(job_file)

    def work(config: Any, stop: Any, watchdog: Any) -> None:
        start_rank_device(config)
        name, stop.nothing_to_save = _OVER_MODEL[job.verb]
        module = importlib.import_module(name)
        watchdog.beat(iteration=0, phase="weights")
        module.run_in_rank(job, beat=lambda: watchdog.beat(iteration=1, phase="step"))

    run_model_rank(job, work=work)


@vocab_app.command("extend")
def vocab_extend(
    source: Annotated[str, typer.Option("--from", metavar="hf:DIR")],
    target: Annotated[str, typer.Option("--to", metavar="hf:DIR")],
    size: Annotated[int, typer.Option("--size", min=1, help="of the vocabulary when all is added")],
    characters: Annotated[
        str | None,
        typer.Option(
            "--characters", metavar="FILE|corpus:PATH", help="those of a text file, in its order, or of a corpus"
        ),
    ] = None,
    pieces: Annotated[
        str | None,
        typer.Option(
            "--pieces", metavar="FILE|corpus:PATH", help="pieces of several characters, one a line, or of a corpus"
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", metavar="PATH", help="count its tokens before and after")
    ] = None,
) -> None:
    """Adds characters, then pieces, to a SentencePiece tokenizer, and a row for each to embedding and output layer.

    Old ids stay, and so does the encoding of text in which no new piece applies.
    """
    from megatron_xy.hf.extend import extend

    extend(source, target, characters=characters, pieces=pieces, size=size, corpus=corpus, say=say)
