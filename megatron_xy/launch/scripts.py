"""From a checked `Job` to what starts it: an argv, a batch script, a manifest. Every word of a user's is quoted."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from megatron_xy.launch.job import Job

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Variable:
    """One environment variable of every rank, and why it is set."""

    name: str
    value: str
    why: str


def script(job: Job) -> str:
    """The job as text to read, keep and start: shell lines, a batch script or a manifest."""
    if job.target == "local":
        lines = [f'# {each.why}\nexport {each.name}="${{{each.name}:-{each.value}}}"' for each in variables(job)]
        return "\n".join([*lines, shlex.join(torchrun(job))]) + "\n"
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # ${#name} is bash's
    )
    templates.filters["quoted"] = lambda value: shlex.quote(str(value))
    launcher = "torchrun" if job.container else shlex.quote(_torchrun_program(job))
    worker = shlex.join(_worker(job))
    values = {"job": job, "variables": variables(job), "launcher": launcher}
    if job.target == "slurm":
        return templates.get_template("slurm.sh").render(values, worker=worker)
    # Kubernetes fills in $(NAME) and makes $$ a $, also between quotes.
    values |= {"worker": worker.replace("$", "$$"), "node_name": f'"$HOSTNAME.{job.name}"'}
    node_script = templates.get_template("node.sh").render(values)
    return templates.get_template("jobset.yaml").render(values, node_script=node_script)


def torchrun(job: Job) -> list[str]:
    """The argv that starts this machine's ranks; the same on every node."""
    where = (
        ["--standalone"]
        if job.rdzv_endpoint is None
        else [
            f"--nnodes={job.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={job.name}",
            f"--rdzv-endpoint={job.rdzv_endpoint}",
        ]
    )
    logs = [f"--log-dir={job.log_dir / 'torchrun'}", "--tee=3"]
    return [_torchrun_program(job), *where, f"--nproc-per-node={job.gpus_per_node}", *logs, *_worker(job)]


def variables(job: Job) -> list[Variable]:
    """The environment of every rank, in the order in which it is told."""
    entries = yaml.safe_load((_TEMPLATES / "variables.yaml").read_text(encoding="utf-8"))
    found = [Variable(**entry) for entry in entries]
    found.append(Variable("OMP_NUM_THREADS", str(job.num_threads), "CPU threads a rank: runtime.num_threads"))
    if job.network_interface is not None:
        why = "where NCCL meets before it uses InfiniBand (--network-interface)"
        found.append(Variable("NCCL_SOCKET_IFNAME", job.network_interface, why))
        names = job.network_interface.lstrip("=")
        if not names.startswith("^"):  # gloo takes names only, and could not leave one out
            found.append(Variable("GLOO_SOCKET_IFNAME", names, "where gloo meets (--network-interface)"))
    if job.ib_hca is not None:
        found.append(Variable("NCCL_IB_HCA", job.ib_hca, "the adapters of the compute fabric alone (--ib-hca)"))
    return found


def _torchrun_program(job: Job) -> str:
    return str((Path(job.venv) / "bin" if job.venv else Path(sys.executable).parent) / "torchrun")


def _worker(job: Job) -> list[str]:
    return ["-m", "megatron_xy", job.task, job.run_yaml, *job.overrides]
