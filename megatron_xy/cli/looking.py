"""The verbs that look: at a config before a run, at a run after it, at this machine and its speed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from megatron_xy.cli.options import AsJson, Overrides, RunYaml, say
from megatron_xy.errors import EXIT_COMPARISON_FAILED, ConfigError, UsageError


def check(
    run_yaml: RunYaml,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option("--world-size", min=1, help="ranks it will run on")] = None,
    paths: Annotated[
        bool, typer.Option("--paths", help="also look at the files that it names, and at what lies in its run folder")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Checks a config without starting anything: all problems at once, with lines, rules and nearest valid values."""
    from megatron_xy.config import load_config
    from megatron_xy.described import describe

    config = load_config(run_yaml, overrides=overrides or [], world_size=world_size)
    if paths:
        from megatron_xy.preflight import check_paths  # which reads data, and so brings numpy

        check_paths(config)
    if as_json:
        print(json.dumps({"ok": True, "exit_code": 0, "problems": [], "config": config.model_dump(mode="json")}))
    else:
        print(describe(config, path=run_yaml, world_size=world_size))


def plan(
    run_yaml: RunYaml,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="of the cluster")] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1)] = 8,
    gpu: Annotated[str, typer.Option("--gpu", help="h100 | h200 | a100 | a800")] = "h100",
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="of the whole run, such as 366B; what the config says unless given")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="rank the layouts that fit")] = False,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", metavar="RUN", help="fit the efficiencies to this run first")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE.png", help="draw ranks and memory")] = None,
    as_json: AsJson = False,
) -> None:
    """Plans a run on a cluster that need not be there: memory by rank, speed, days, checkpoints, other layouts."""
    from megatron_xy.plan import verb

    if picture is not None:
        _check_picture(picture)
    verb.plan(
        run_yaml,
        overrides=overrides or [],
        num_nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        tokens=tokens,
        do_search=search,
        calibrate_by=calibrate,
        picture=picture,
        as_json=as_json,
    )


def _check_picture(path: Path) -> None:
    """Before a plan is made, which may take minutes. Raises UsageError for its kind, ConfigError for its folder."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--picture {path}: must end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: there is no folder {path.parent}; make it, or name another")


def dryrun(
    run_yaml: RunYaml,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="ranks of the job")],
    overrides: Overrides = None,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", help="build this one; may be repeated; 0 unless given")
    ] = None,
    all_stages: Annotated[
        bool, typer.Option("--all-stages", help="one rank of each pipeline stage (and role)")
    ] = False,
    bucket: Annotated[
        int | None, typer.Option("--bucket", min=1, help="tokens of every sample; micro_batch_tokens unless given")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Builds here what a rank of any job would, without its tensors' data, and runs a step: memory, collectives."""
    from megatron_xy import device
    from megatron_xy.config import load_config

    config = load_config(run_yaml, overrides=overrides or [], world_size=world_size)
    device.start_dry()
    from megatron_xy.dryrun import verb

    ranks = verb.chosen_ranks(config, ranks=rank or [], all_stages=all_stages, world_size=world_size)
    result = verb.run(config, ranks=ranks, world_size=world_size, bucket=bucket, say=say)
    if as_json:
        print(json.dumps(result))
    else:
        for table in verb.tables(result):
            Console(width=max(Console().width, 170)).print(table)


def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]) -> None:
    """Draws a run: losses, evaluations, odd steps, speed, time by phase, the mixture, as PNG and one HTML page."""
    from megatron_xy.report.verb import make_report

    print(make_report(run_dir))


def select(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="a reward run's folder")], as_json: AsJson = False
) -> None:
    """Names the epoch of a reward run that meets the criteria of its config best; ends with 1 where none does."""
    from megatron_xy.reward.select import select as selected

    selection = selected(run_dir)
    print(json.dumps(selection.to_json()) if as_json else "\n".join(selection.lines()))
    if selection.chosen is None:
        sys.exit(EXIT_COMPARISON_FAILED)


def doctor(
    as_json: AsJson = False,
    folder: Annotated[Path, typer.Option("--folder", help="where runs will be written: its disk is tried")] = Path(),
) -> None:
    """Says what this machine has and whether it will do, what would be used and why; ends with 1 where a line fails.

    Under torchrun it looks at every host, and measures the links between the ranks.
    """
    from megatron_xy import device
    from megatron_xy.runtime import environment

    device.start(local_rank=environment.local_rank())
    from megatron_xy.doctor.verb import diagnose, examine_hosts, health_told, told

    health = examine_hosts(folder)
    if environment.rank() == 0:
        findings = diagnose()
        print(json.dumps({**findings, "health": health}) if as_json else f"{told(findings)}\n{health_told(health)}")
    if any(entry["verdict"] == "fail" for entry in health):
        sys.exit(EXIT_COMPARISON_FAILED)


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
    results = verb.run(suite, only=only or [], output=target, tiny=tiny, say=say)
    if as_json:
        print(json.dumps(results))
    else:
        for table in verb.tables(results):
            Console(width=max(Console().width, 170)).print(table)
    if not all(part["ok"] for part in results["parts"].values()):
        sys.exit(EXIT_COMPARISON_FAILED)
