"""The verbs that bring a run onto a cluster, or one of Megatron-LM's here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_xy.cli.options import Overrides, RunYaml, say
from megatron_xy.errors import EXIT_BAD_CONFIG, ConfigError, UsageError
from megatron_xy.launch.job import PORT, SAVE_SECONDS


def launch(
    run_yaml: RunYaml,
    overrides: Overrides = None,
    target: Annotated[
        Literal["local", "slurm", "kubernetes"], typer.Option("--on", help="what starts the ranks")
    ] = "local",
    nodes: Annotated[int, typer.Option("--nodes", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="ranks a node")] = 8,
    submit: Annotated[bool, typer.Option("--submit", help="start it: torchrun here, sbatch, kubectl create")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print it only, which is the default")] = False,
    name: Annotated[str | None, typer.Option("--name", help="of the job; the run folder's unless given")] = None,
    workdir: Annotated[
        str | None, typer.Option("--workdir", help="relative paths start there, on every node; here unless given")
    ] = None,
    venv: Annotated[
        str | None, typer.Option("--venv", metavar="DIR", help="whose torchrun; this one's unless given")
    ] = None,
    container: Annotated[
        str | None, typer.Option("--container", metavar="IMAGE", help="slurm: by pyxis; kubernetes: the pods'")
    ] = None,
    mount: Annotated[
        list[str] | None, typer.Option("--mount", metavar="SOURCE:TARGET", help="slurm: into the container; repeatable")
    ] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="HH:MM:SS", help="the job's time limit")] = None,
    save_seconds: Annotated[
        int, typer.Option("--save-seconds", min=1, help="before the limit, for the last step and its checkpoint")
    ] = SAVE_SECONDS,
    restarts: Annotated[
        int | None,
        typer.Option(
            "--restarts",
            min=0,
            help="after a lost node or failed storage: slurm: in a row without a newer checkpoint (3 unless given), "
            "kubernetes: in all (50)",
        ),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option("--exclude", metavar="NODES", help="bad nodes, separated by commas")
    ] = None,
    spare_nodes: Annotated[
        int, typer.Option("--spare-nodes", min=0, help="slurm: more nodes, in place of those whose GPUs do not answer")
    ] = 0,
    partition: Annotated[str | None, typer.Option("--partition", help="slurm")] = None,
    account: Annotated[str | None, typer.Option("--account", help="slurm")] = None,
    qos: Annotated[str | None, typer.Option("--qos", help="slurm")] = None,
    reservation: Annotated[str | None, typer.Option("--reservation", help="slurm")] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="kubernetes")] = None,
    volume_claim: Annotated[
        str | None,
        typer.Option("--volume-claim", metavar="NAME", help="kubernetes: shared storage, mounted at --workdir"),
    ] = None,
    rdma_resource: Annotated[
        str | None, typer.Option("--rdma-resource", metavar="NAME", help="kubernetes: the fabric's device plugin")
    ] = None,
    network_interface: Annotated[
        str | None, typer.Option("--network-interface", metavar="NAME", help="where NCCL and gloo meet")
    ] = None,
    ib_hca: Annotated[
        str | None, typer.Option("--ib-hca", metavar="NAMES", help="InfiniBand adapters of the compute fabric")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1024, max=65535, help="of the rendezvous")] = PORT,
    rdzv_endpoint: Annotated[
        str | None, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="local, several nodes: where they meet")
    ] = None,
) -> None:
    """Prints, or starts, what runs RUN.yaml on a cluster: torchrun, an sbatch script or a Kubernetes JobSet."""
    asked = {key: given for key, given in locals().items() if key not in ("submit", "dry_run")}  # by `Job`'s names
    from megatron_xy.launch.scripts import script
    from megatron_xy.launch.submit import run_here
    from megatron_xy.launch.submit import submit as submitted
    from megatron_xy.launch.verb import prepare_job

    if submit and dry_run:
        raise UsageError("--submit and --dry-run exclude each other; leave one of them off")
    job = prepare_job(asked)
    if submit:
        say(f"{job.task} on {nodes} x {gpus_per_node} ranks, in {job.run_dir}")
        if target == "local":
            sys.exit(run_here(job))
        print(submitted(job))
    else:
        print(script(job), end="")


def import_args(
    script: Annotated[
        Path, typer.Argument(metavar="LAUNCH.sh", help="a script that starts Megatron-LM; it is not run")
    ],
) -> None:
    """Prints a Megatron-LM launch script as a commented RUN.yaml; ends with 78 where that lacks what a run needs."""
    from megatron_xy.import_args.convert import import_args as imported_from

    if not script.is_file():
        raise ConfigError(f"{script}: there is no such file")
    imported = imported_from(script)
    print(imported.text(), end="")
    for entry in imported.left_out:
        say(f"no counterpart: {entry}")
    for entry in imported.problems:
        say(f"still needed: {entry}")
    if imported.problems:
        sys.exit(EXIT_BAD_CONFIG)
