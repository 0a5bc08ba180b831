"""The verbs of `megatron-xy`, from command line to exit code.

The one place that imports a verb's code only when it is called: what does not train starts fast.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from megatron_xy import __version__
from megatron_xy.errors import EXIT_BUG, EXIT_COMPARISON_FAILED, EXIT_IO, ConfigError, DataError, MegatronXYError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Megatron-style 3D-parallel training, from bucketed data to released models.",
    epilog="Exit codes: 0 done, 1 comparison failed, 2 usage, 65 bad data or checkpoint, 70 bug, 74 I/O, "
    "75 stopped and resumable, 76 peer lost or hung, 78 bad config.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build, look at and verify bucketed datasets.")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at and verify checkpoints.")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
vocab_app = typer.Typer(no_args_is_help=True, help="Extend a model's vocabulary.")
app.add_typer(vocab_app, name="vocab")

RunYaml = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="the run's config")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="override keys of RUN.yaml")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, everything else on stderr")]


def main() -> None:
    """Entry point: runs a verb and ends with the documented exit code."""
    try:
        app(standalone_mode=True)
    except MegatronXYError as error:
        fail(error, code=error.exit_code)
    except BrokenPipeError:
        sys.exit(EXIT_IO)
    except OSError as error:
        fail(error, code=EXIT_IO)
    except Exception:
        traceback.print_exc()
        print("this is a bug in megatron_xy", file=sys.stderr)
        sys.exit(EXIT_BUG)


def fail(error: Exception, *, code: int) -> None:
    """One calm message on stderr, and the code."""
    console = Console(stderr=True, soft_wrap=True, emoji=False, highlight=False)
    console.print(f"[red]error[/red] ({code}): {escape(str(error))}")
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    if version:
        print(f"megatron_xy {__version__}")
        raise typer.Exit


@app.command()
def pretrain(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """(Continued) pre-training in one rank of a torchrun world; `megatron-xy run` starts such a world."""
    _train("pretrain", "megatron_xy.pretrain", run_yaml, overrides)


@app.command()
def sft(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """Supervised fine-tuning on conversations, in one rank of a torchrun world, as pretrain."""
    _train("sft", "megatron_xy.pretrain", run_yaml, overrides)


@app.command()
def reward(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """A reward model from preference pairs, in one rank of a torchrun world, as pretrain."""
    _train("reward", "megatron_xy.reward.run", run_yaml, overrides)


@app.command()
def ppo(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """PPO over four roles in one rank of a torchrun world; `megatron-xy run` starts such a world."""
    _train("ppo", "megatron_xy.ppo.run", run_yaml, overrides)


def _train(task: str, module: str, run_yaml: Path, overrides: list[str] | None) -> None:
    """A task's work in this process, which ends with it; its module is imported once the device is settled."""
    began = time.monotonic()
    from megatron_xy.worker import run_worker

    def work(config: Any, stop: Any, watchdog: Any) -> None:
        from megatron_xy import device, environment

        device.start(
            local_rank=environment.local_rank(),
            num_threads=config.runtime.num_threads,
            deterministic=config.runtime.deterministic,
        )
        importlib.import_module(module).run(config, stop=stop, watchdog=watchdog, began=began)

    run_worker(task, config_path=run_yaml, overrides=overrides or [], work=work)


@app.command()
def run(
    run_yaml: RunYaml,
    overrides: Overrides = None,
    nproc_per_node: Annotated[int, typer.Option("--nproc-per-node", min=1, help="ranks on this machine")] = 1,
    restarts: Annotated[int, typer.Option("--restarts", min=0, help="restarts after a lost or failed rank")] = 0,
) -> None:
    """Starts and supervises torchrun on this machine: exit codes, restarts from the newest checkpoint, no orphans."""
    from megatron_xy import run_folder
    from megatron_xy.config import load_config, run_dir_of
    from megatron_xy.preflight import BUILT_DATA, check_paths
    from megatron_xy.supervise import supervise

    options = overrides or []
    try:
        config = load_config(run_yaml, overrides=options, world_size=nproc_per_node)
        run_folder.prepare(config.run_dir)
        check_paths(config, build_into=config.run_dir / BUILT_DATA)
    except MegatronXYError as error:
        run_dir = run_dir_of(run_yaml, overrides=options)
        if run_dir is not None:
            run_folder.prepare(run_dir)
            run_folder.record_exit(run_dir, code=error.exit_code, message=str(error), rank=None)
        raise
    print(f"starting {nproc_per_node} rank(s) on this machine, in {config.run_dir}", flush=True)
    code = supervise(
        str(run_yaml),
        overrides=options,
        nproc_per_node=nproc_per_node,
        restarts=restarts,
        run_dir=config.run_dir,
        task=config.task,
        num_threads=config.runtime.num_threads,
        timeout_seconds=config.runtime.timeout_seconds,
    )
    sys.exit(code)


@app.command()
def check(
    run_yaml: RunYaml,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option("--world-size", min=1, help="ranks it will run on")] = None,
    paths: Annotated[bool, typer.Option("--paths", help="also look at the files that it names")] = False,
    as_json: AsJson = False,
) -> None:
    """Checks a config without starting anything: all problems at once, with lines, rules and nearest valid values."""
    from megatron_xy.config import InvalidConfig, load_config
    from megatron_xy.preflight import check_paths, describe

    try:
        config = load_config(run_yaml, overrides=overrides or [], world_size=world_size)
        if paths:
            check_paths(config)
    except MegatronXYError as error:
        if as_json:
            problems = (
                [str(problem) for problem in error.problems] if isinstance(error, InvalidConfig) else [str(error)]
            )
            print(json.dumps({"ok": False, "exit_code": error.exit_code, "problems": problems}))
        raise
    if as_json:
        print(json.dumps({"ok": True, "exit_code": 0, "problems": [], "config": config.model_dump(mode="json")}))
    else:
        print(describe(config, path=run_yaml, world_size=world_size))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]) -> None:
    """Draws a run: losses, evaluations, odd steps, speed, time by phase, the mixture, as PNG and one HTML page."""
    from megatron_xy.report.verb import make_report

    print(make_report(run_dir))


@app.command()
def select(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="a reward run's folder")], as_json: AsJson = False
) -> None:
    """Names the epoch of a reward run that meets the criteria of its config best; ends with 1 where none does."""
    from megatron_xy.reward.select import select as selected

    selection = selected(run_dir)
    print(json.dumps(selection.to_json()) if as_json else "\n".join(selection.lines()))
    if selection.chosen is None:
        sys.exit(EXIT_COMPARISON_FAILED)


@app.command()
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
        str | None, typer.Option("--max-shard-size", metavar="5GB", help="of a file of weights; 5GB unless given")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="compare weights and logits with transformers'")] = False,
) -> None:
    """Converts a checkpoint or an HF folder into either; the same command goes on where a killed one stopped."""
    from megatron_xy.hf import verb

    if verify and find_spec("transformers") is None:
        raise ConfigError("--verify needs transformers; it comes with the extra: pip install 'megatron-xy[hf]'")
    verb.convert(source, target, dtype=dtype, tokenizer=tokenizer, max_shard_size=max_shard_size, say=_say)
    if not verify:
        return
    from megatron_xy import device

    device.start()
    from megatron_xy.hf.verify import verify as agrees

    if not agrees(source, target, say=_say):
        sys.exit(EXIT_COMPARISON_FAILED)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="ckpt:DIR|hf:DIR", help="the model")],
    prompts: Annotated[
        Path, typer.Option("--prompts", metavar="F.jsonl", help='rows {"prompt": a string, or messages}')
    ],
    output: Annotated[Path, typer.Option("--output", metavar="F.jsonl", help="the answers, in the prompts' order")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[parallel.key=value]...", help="the layout, as in a RUN.yaml")
    ] = None,
    num_answers: Annotated[int, typer.Option("-n", min=1, help="answers to each prompt")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: greedy")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", max=1, help="of the most likely tokens this share; 1: all")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="this many of the most likely tokens; 0: all")] = 0,
    max_response_length: Annotated[
        int, typer.Option("--max-response-length", min=1, help="tokens, the stop token included")
    ] = 512,
    min_response_length: Annotated[
        int, typer.Option("--min-response-length", min=0, help="no stop token before as many tokens are there")
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TOKEN", help="a control token or a token id that ends an answer; repeat"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 1234,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="the model's own unless given")] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="NAME|FILE", help="of messages; the model's unless given")
    ] = None,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, help="of a replica at a time")] = 64,
    nproc_per_node: Annotated[int, typer.Option("--nproc-per-node", min=1, help="ranks on this machine")] = 1,
) -> None:
    """Answers prompts: sampled or greedy, n answers each, under any layout; goes on where a killed run stopped."""
    from megatron_xy.model_job import ModelJob, leave_on_signals
    from megatron_xy.partial_results import PartialResults

    if not top_p > 0:
        raise typer.BadParameter(f"{top_p} must be above 0", param_hint="--top-p")
    if nproc_per_node == 1:
        leave_on_signals("; the answers that had ended are kept, and the same command goes on")
    arguments = {
        "prompts": str(prompts), "output": str(output), "num_answers": num_answers, "temperature": temperature,
        "top_p": top_p, "top_k": top_k, "min_response_length": min_response_length,
        "max_response_length": max_response_length, "max_sequences": max_sequences, "seed": seed, "stop": stop or [],
        "tokenizer": str(tokenizer) if tokenizer else None, "chat_template": chat_template,
    }  # fmt: skip
    run_dir = str(PartialResults(output).run_dir)
    job = ModelJob("generate", model, nproc_per_node, overrides or [], run_dir, arguments)
    options = job.options()  # of the command alone: no need to wait for torch
    from megatron_xy import device

    device.start(num_threads=options.runtime.num_threads)
    from megatron_xy.answers import generate_file

    sys.exit(generate_file(job, say=_say))


@app.command()
def score(
    model: Annotated[str, typer.Argument(metavar="ckpt:DIR|hf:DIR", help="a reward model")],
    input_file: Annotated[
        Path, typer.Option("--input", metavar="F.jsonl", help="rows with prompt and response or response_tokens")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="F.jsonl", help="the rows with their scores, in order")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[parallel.key=value]...", help="the layout, as in a RUN.yaml")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="the model's own unless given")] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="NAME|FILE", help="of messages; the model's unless given")
    ] = None,
    micro_batch_tokens: Annotated[
        int, typer.Option("--micro-batch-tokens", min=1, help="of a replica at a time; longer answers widen it")
    ] = 4096,
    nproc_per_node: Annotated[int, typer.Option("--nproc-per-node", min=1, help="ranks on this machine")] = 1,
) -> None:
    """Scores answers by a reward model, under any layout; goes on where a killed run stopped."""
    from megatron_xy.model_job import ModelJob, leave_on_signals
    from megatron_xy.partial_results import PartialResults

    if nproc_per_node == 1:
        leave_on_signals("; the scores that were there are kept, and the same command goes on")
    arguments = {
        "input": str(input_file), "output": str(output), "micro_batch_tokens": micro_batch_tokens,
        "tokenizer": str(tokenizer) if tokenizer else None, "chat_template": chat_template,
    }  # fmt: skip
    job = ModelJob("score", model, nproc_per_node, overrides or [], str(PartialResults(output).run_dir), arguments)
    options = job.options()  # of the command alone: no need to wait for torch
    from megatron_xy import device

    device.start(num_threads=options.runtime.num_threads)
    from megatron_xy.scores import score_file

    sys.exit(score_file(job, say=_say))


@app.command()
def logprobs(
    model: Annotated[str, typer.Argument(metavar="ckpt:DIR|hf:DIR", help="the model")],
    input_file: Annotated[Path, typer.Option("--input", metavar="IDS.jsonl", help='rows {"tokens": [...]}')],
    output: Annotated[
        Path, typer.Option("--output", metavar="F.safetensors", help='row i as tensor "i", one number a token but one')
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[parallel.key=value]...", help="the layout, as in a RUN.yaml")
    ] = None,
    nproc_per_node: Annotated[int, typer.Option("--nproc-per-node", min=1, help="ranks on this machine")] = 1,
) -> None:
    """Log-probabilities of given token rows under any layout, to compare with other implementations."""
    from megatron_xy.model_job import ModelJob, leave_on_signals

    if nproc_per_node == 1:
        leave_on_signals("; nothing is kept, and the same command starts afresh")
    arguments = {"input": str(input_file), "output": str(output)}
    run_dir = str(output.with_name(f"{output.name}.work"))
    job = ModelJob("logprobs", model, nproc_per_node, overrides or [], run_dir, arguments)
    options = job.options()  # of the command alone: no need to wait for torch
    from megatron_xy import device

    device.start(num_threads=options.runtime.num_threads)
    from megatron_xy.logprobs import logprobs_file

    sys.exit(logprobs_file(job, say=_say))


@app.command(hidden=True)
def model_rank(job_file: Path) -> None:
    """One rank of a verb over a model, started by that verb."""
    from megatron_xy.model_job import read_job
    from megatron_xy.worker import run_model_rank

    job = read_job(job_file)

    def work(config: Any, stop: Any, watchdog: Any) -> None:
        from megatron_xy import device, environment

        device.start(
            local_rank=environment.local_rank(),
            num_threads=config.runtime.num_threads,
            deterministic=config.runtime.deterministic,
        )
        module, function = {
            "generate": ("megatron_xy.answers", "generate_in_rank"),
            "score": ("megatron_xy.scores", "score_in_rank"),
            "logprobs": ("megatron_xy.logprobs", "logprobs_in_rank"),
        }[job.verb]
        getattr(importlib.import_module(module), function)(job, config, stop, watchdog)

    run_model_rank(job, work=work)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Says what this machine has, what would be used and why, and what is patched."""
    from megatron_xy import device

    device.start()
    from megatron_xy.doctor import diagnose, told

    findings = diagnose()
    print(json.dumps(findings) if as_json else told(findings))


@app.command()
def bench(
    suite: Annotated[Literal["cpu", "gpu"], typer.Argument(metavar="cpu|gpu")],
    only: Annotated[list[str] | None, typer.Option("--only", metavar="PART", help="this part; may be repeated")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="the JSON file; ./bench-SUITE-DATE.json unless given")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="sizes that show that it runs, not how fast")] = False,
    as_json: AsJson = False,
) -> None:
    """Measures fixed models and buckets: tokens/s, MFU, memory, recomputation, attention, a resume, a plain loop."""
    from megatron_xy.bench import verb

    target = output or Path(f"bench-{suite}-{time.strftime('%Y-%m-%d')}.json")
    results = verb.run(suite, only=only or [], output=target, tiny=tiny, say=_say)
    if as_json:
        print(json.dumps(results))
    else:
        for table in verb.tables(results):
            Console(width=max(Console().width, 170)).print(table)
    if not all(part["ok"] for part in results["parts"].values()):
        sys.exit(EXIT_COMPARISON_FAILED)


@data_app.command("build")
def data_build(
    inputs: Annotated[
        list[str], typer.Option("--input", metavar="PATH...", help="files, folders or globs; repeat, or list them")
    ],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="a SentencePiece tokenizer.model")],
    output: Annotated[Path, typer.Option("--output", help="the data folder to make")],
    more_inputs: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="further inputs")] = None,
    buckets: Annotated[str, typer.Option("--buckets", help="tokens, ascending, by commas")] = "2048,4096,8192,16384",
    source_field: Annotated[
        str | None, typer.Option("--source-field", help="the row's field that names its source")
    ] = None,
    text_field: Annotated[str, typer.Option("--text-field", help="the row's field that holds the text")] = "text",
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="end every document with the end-of-document token")
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

    The same command on several machines that share the folders does the work together.
    """
    from megatron_xy.data.build import build_dataset
    from megatron_xy.data.build_folder import Share
    from megatron_xy.data.progress import showing_progress

    if (packing == "concatenate") != (seq_length is not None):
        raise typer.BadParameter("--packing concatenate and --seq-length go together", param_hint="--seq-length")
    with showing_progress() as progress:
        stats = build_dataset(
            [*inputs, *(more_inputs or [])],
            tokenizer=tokenizer,
            output=output,
            buckets=_numbers(buckets, option="--buckets") if seq_length is None else [seq_length],
            source_field=source_field,
            text_field=text_field,
            append_eod=append_eod,
            workers=workers,
            bad_lines=bad_lines,
            packing=packing,
            overflow=overflow,
            deduplicate=deduplicate,
            held_out=held_out,
            chat_template=chat_template,
            chat_overflow=chat_overflow,
            last_turn_only=last_turn_only,
            shard=Share.parse(shard) if shard is not None else None,
            executor=executor,
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
    """Documents, tokens, samples, shares and the three ratios of a data folder."""
    from megatron_xy.data.examine import dataset_stats

    if pictures is not None:
        from megatron_xy.data.pictures import draw_statistics

        for path in draw_statistics(directory, pictures):
            _say(f"wrote {path}")
    _show_stats(dataset_stats(directory), directory, as_json=as_json)


@data_app.command("show")
def data_show(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    source: Annotated[str | None, typer.Option("--source", help="of this source only")] = None,
    bucket: Annotated[int | None, typer.Option("--bucket", help="of this bucket only")] = None,
    index: Annotated[int, typer.Option("--index", min=0, help="number of the first sample")] = 0,
    count: Annotated[int, typer.Option("--count", min=1, help="samples of each source and bucket")] = 1,
    as_json: AsJson = False,
) -> None:
    """Samples as text: a colour a document, a bar between two, tokens that the loss leaves out reversed or dim."""
    from megatron_xy.data.show import shown_samples

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
    from megatron_xy.data.examine import verify_dataset

    _verified(lambda: verify_dataset(directory), directory, as_json=as_json)


@data_app.command("plan-steps")
def data_plan_steps(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    config: Annotated[Path, typer.Option("--config", metavar="RUN.yaml")],
    steps: Annotated[str, typer.Option("--steps", metavar="A:B", help="data steps, half-open, from 0")],
    data_parallel_size: Annotated[int, typer.Option("--data-parallel-size", min=1)] = 1,
    data_parallel_rank: Annotated[int, typer.Option("--data-parallel-rank", min=0)] = 0,
    overrides: Overrides = None,
) -> None:
    """Which samples a data parallel rank draws at which step: JSON lines, one a (step, source)."""
    from megatron_xy.data.plan_steps import plan_steps

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
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    config: Annotated[Path, typer.Option("--config", metavar="RUN.yaml")],
    steps: Annotated[str, typer.Option("--steps", metavar="A:B", help="data steps, half-open, from 0")],
    overrides: Overrides = None,
) -> None:
    """The documents (file, line) that were drawn at these steps: JSON lines, one a sample."""
    from megatron_xy.data.trace import trace_steps

    for row in trace_steps(directory, config_path=config, overrides=overrides or [], steps=_steps(steps)):
        print(json.dumps(row))


@checkpoint_app.command("show")
def checkpoint_show(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """What a checkpoint holds: where the run stood, its model and layout, tensors, files."""
    from megatron_xy import checkpoint_files as files

    manifest = files.read_manifest(directory)
    if as_json:
        print(json.dumps(manifest.to_json()))
        return
    for name, value in manifest.state.items():
        if name != "history":  # of the last steps, for the spikes' sake: long, and only told as JSON
            print(f"{name}: {value}")
    total = sum(facts["bytes"] for facts in manifest.files.values())
    print(f"tensors: {len(manifest.tensors)}\nfiles: {len(manifest.files)}, {total / 1e6:,.1f} MB")


@checkpoint_app.command("verify")
def checkpoint_verify(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """Compares every file with its checksum, and the pieces of every tensor with its shape."""
    from megatron_xy import checkpoint_files as files

    def verify() -> None:
        manifest = files.read_manifest(directory)
        files.verify_files(directory, manifest)
        files.verify_coverage(directory, manifest)

    _verified(verify, directory, as_json=as_json)


@checkpoint_app.command("hash")
def checkpoint_hash(directory: Annotated[Path, typer.Argument(metavar="DIR")], as_json: AsJson = False) -> None:
    """A sha256 for every global tensor: the same for every layout that holds the same values."""
    from megatron_xy import checkpoint_files as files
    from megatron_xy.tensor_reader import tensor_hashes

    manifest = files.read_manifest(directory)
    files.verify_files(directory, manifest)
    hashes = dict(tensor_hashes(directory, manifest))
    if as_json:
        print(json.dumps(hashes))
        return
    for name, facts in hashes.items():
        print(f"{facts['sha256']}  {facts['dtype']:<9} {facts['shape']!s:<16} {name}")


@vocab_app.command("extend")
def vocab_extend(
    source: Annotated[str, typer.Option("--from", metavar="hf:DIR")],
    target: Annotated[str, typer.Option("--to", metavar="hf:DIR")],
    size: Annotated[int, typer.Option("--size", min=1, help="pieces in the end")],
    characters: Annotated[
        str | None,
        typer.Option("--characters", metavar="FILE|corpus:PATH", help="a text file's, in its order; or a corpus's"),
    ] = None,
    pieces: Annotated[
        str | None,
        typer.Option("--pieces", metavar="FILE|corpus:PATH", help="of several characters, a line each; or a corpus's"),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", metavar="PATH", help="count its tokens before and after")
    ] = None,
) -> None:
    """Adds characters, then pieces, to a SentencePiece tokenizer, and a row for each to embedding and output layer.

    Old ids stay, and so does the encoding of text in which no new piece applies.
    """
    from megatron_xy.hf.extend import extend

    extend(source, target, characters=characters, pieces=pieces, size=size, corpus=corpus, say=_say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise typer.BadParameter(f"{text!r} is not A:B", param_hint="--steps")
    if int(first) >= int(last):
        raise typer.BadParameter(f"{text!r} holds no step: A must be below B", param_hint="--steps")
    return range(int(first), int(last))


def _numbers(text: str, *, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of numbers by commas", param_hint=option)
    return [int(part) for part in parts]


def _verified(verify: Any, directory: Path, *, as_json: bool) -> None:
    try:
        verify()
    except DataError as error:
        if as_json:
            print(json.dumps({"ok": False, "exit_code": error.exit_code, "problem": str(error)}))
        raise
    print(json.dumps({"ok": True, "exit_code": 0}) if as_json else f"{directory}: whole and as it was written")


def _show_stats(stats: Any, directory: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(stats))
        return
    from megatron_xy.data.progress import stats_table

    Console().print(stats_table(stats, title=str(directory)))
