"""What is to be started and where, with every text of it checked against a list of allowed characters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_xy.config import InvalidConfig, Problem

Target = Literal["local", "slurm", "kubernetes"]
SAVE_SECONDS, PORT = 300, 29500  # unless given
# Unless given. A batch job counts since its newest checkpoint; a JobSet over its life, which may be of many losses.
RESTARTS: dict[Target, int] = {"slurm": 3, "kubernetes": 50}

_NAME = (r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "letters, digits, '.', '_', '-'; 63 at most, the first a letter or digit")
_LIST = (r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]*", "names by commas; letters, digits, '.', '_', '-', and node[01-03]")
_PATH = (r"[A-Za-z0-9._/+@=-][A-Za-z0-9._/+@=,-]*", "a path of letters, digits and ._/+@=,- without blanks")
_DNS_LABEL = (r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", "small letters, digits and '-', 32 at most")
_JOBSET_NAME = (r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?", "small letters, digits and '-', 32 at most, a letter first")
# What a target has no use for would be passed over: option -> (targets that have one, its value if it is not given).
_USED_BY: dict[str, tuple[tuple[Target, ...], Any]] = {
    **dict.fromkeys(("--partition", "--account", "--qos", "--reservation"), (("slurm",), None)),
    "--mount": (("slurm",), ()),
    "--spare-nodes": (("slurm",), 0),
    **dict.fromkeys(("--time", "--exclude"), (("slurm", "kubernetes"), None)),
    "--save-seconds": (("slurm", "kubernetes"), SAVE_SECONDS),
    "--restarts": (("slurm", "kubernetes"), None),
    "--port": (("slurm", "kubernetes"), PORT),
    **dict.fromkeys(("--namespace", "--volume-claim", "--rdma-resource"), (("kubernetes",), None)),
    "--rdzv-endpoint": (("local",), None),
}
_RULES = {
    "--name": _NAME,
    "--partition": _LIST,
    "--account": _NAME,
    "--qos": _NAME,
    "--reservation": _NAME,
    "--time": (r"(\d+-)?\d{1,3}(:\d\d){0,2}", "Slurm's form, such as 24:00:00 or 2-12:00:00"),
    "--exclude": _LIST,
    "--workdir": _PATH,
    "--venv": _PATH,
    "--container": (r"[A-Za-z0-9./][A-Za-z0-9._:/@#+-]*", "an image such as registry/name:tag, or a file of one"),
    "--mount": (r"[A-Za-z0-9._/+@=-]+(:[A-Za-z0-9._/+@=-]+){1,2}", "SOURCE:TARGET or SOURCE:TARGET:ro"),
    "--network-interface": (r"[\^=]{0,2}[A-Za-z0-9._,-]+", "interfaces by commas, such as eth0 or =eth0"),
    "--ib-hca": (r"[\^=]{0,2}[A-Za-z0-9._,:-]+", "adapters by commas, such as mlx5_0,mlx5_1 or ^mlx5_bond_0"),
    "--rdzv-endpoint": (r"[A-Za-z0-9.-]+:\d{1,5}", "HOST:PORT"),
    "--namespace": _DNS_LABEL,
    "--volume-claim": _DNS_LABEL,
    "--rdma-resource": (r"[a-z0-9.-]+/[A-Za-z0-9._-]+", "a resource such as rdma/hca_shared_devices"),
    "RUN.yaml": _PATH,
    "run_dir": _PATH,
    "an override": (r".+", "printable characters only"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run on `nodes` x `gpus_per_node` ranks. What is None or empty is not asked for."""

    target: Target
    run_yaml: str
    overrides: tuple[str, ...]
    task: str
    run_dir: Path
    num_threads: int  # of a rank
    timeout_seconds: int  # of a collective: how long ranks outlive a lost peer
    resume: str  # checkpoint.resume
    nodes: int
    gpus_per_node: int
    name: str
    workdir: str
    port: int  # of the rendezvous, on the first node
    rdzv_endpoint: str | None
    venv: str | None
    container: str | None
    mount: tuple[str, ...]
    time: str | None
    save_seconds: int  # between the request to save and the time limit
    restarts: int | None  # after a lost node or failed storage; None where nothing restarts
    exclude: str | None
    spare_nodes: int
    partition: str | None
    account: str | None
    qos: str | None
    reservation: str | None
    network_interface: str | None
    ib_hca: str | None
    namespace: str | None
    volume_claim: str | None
    rdma_resource: str | None

    @property
    def log_dir(self) -> Path:
        """Where each rank's output goes."""
        return self.run_dir / "logs"

    @property
    def log_dir_from_anywhere(self) -> Path:
        """The same, not from `workdir` but from wherever the job is handed in."""
        return Path(self.workdir) / self.log_dir

    @property
    def pyxis_image(self) -> str | None:
        """The container as pyxis takes it: registry#name:tag, where others write registry/name:tag; a file as it is."""
        if self.container is None or "#" in self.container or self.container.startswith(("/", ".")):
            return self.container
        registry, slash, image = self.container.partition("/")
        has_registry = bool(slash) and (registry == "localhost" or "." in registry or ":" in registry)
        return f"{registry}#{image}" if has_registry else self.container

    @property
    def time_seconds(self) -> int | None:
        """The time limit; a bare number is minutes, as for Slurm."""
        if self.time is None:
            return None
        days, _, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        hours_first = bool(days) or len(parts) == 3
        units = (3600, 60, 1) if hours_first else (60, 1)
        return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def check_job(job: Job) -> None:
    """Raises InvalidConfig with all that cannot be used as it stands."""
    problems = [problem for option, value in _texts(job) if (problem := _problem(option, value)) is not None]
    if not problems:
        problems = list(_contradictions(job))
    if problems:
        raise InvalidConfig(problems)


def _texts(job: Job) -> Iterator[tuple[str, str]]:
    yield "RUN.yaml", job.run_yaml
    yield "run_dir", str(job.run_dir)
    for override in job.overrides:
        yield "an override", override
    for option in _RULES:
        if option.startswith("--") and (value := _given(job, option)) is not None:
            yield from ((option, text) for text in (value if isinstance(value, tuple) else (value,)))


def _given(job: Job, option: str) -> Any:
    return getattr(job, option.removeprefix("--").replace("-", "_"))


def _problem(option: str, value: str) -> Problem | None:
    pattern, words = _RULES[option]
    if re.fullmatch(pattern, value) and value.isprintable():  # YAML takes U+2028 and others for ends of lines
        return None
    return Problem(
        option, f"{option} ({value!r}) may have {words}" if option != "--time" else f"{option} ({value!r}): {words}"
    )


def _contradictions(job: Job) -> Iterator[Problem]:
    for option, (targets, default) in _USED_BY.items():
        if job.target not in targets and _given(job, option) != default:
            yield Problem(option, f"{option} is for {' and '.join(targets)}, not for {job.target}; leave it off")
    if job.target == "slurm" and job.mount and job.container is None:
        yield Problem("--mount", "--mount puts a folder into a container; name one with --container, or leave it off")
    if job.venv is not None and job.container is not None:
        yield Problem("--venv", "--venv and --container exclude each other; an image has its own packages")
    if job.target == "local" and job.nodes > 1 and job.rdzv_endpoint is None:
        yield Problem(
            "--rdzv-endpoint",
            f"--nodes ({job.nodes}) on local needs --rdzv-endpoint HOST:PORT, one of the nodes; "
            "the same command then goes on every node",
        )
    if job.rdzv_endpoint is not None and int(job.rdzv_endpoint.rpartition(":")[2]) > 65535:
        yield Problem("--rdzv-endpoint", f"--rdzv-endpoint ({job.rdzv_endpoint}): a port is 65535 at most")
    if job.target == "local" and job.container is not None:
        yield Problem("--container", "--container is for slurm and kubernetes; on local start the container yourself")
    if job.target == "local" and Path(job.workdir).resolve() != Path.cwd().resolve():
        yield Problem(
            "--workdir",
            f"--workdir ({job.workdir}) is for slurm and kubernetes; on local change into that folder first",
        )
    if job.target == "kubernetes":
        yield from _kubernetes_problems(job)
    if job.time_seconds is not None and job.time_seconds <= job.save_seconds:
        yield Problem(
            "--time",
            f"--time ({job.time}) must be longer than --save-seconds ({job.save_seconds}), "
            "which are kept for the last checkpoint",
        )


def _kubernetes_problems(job: Job) -> Iterator[Problem]:
    pattern, words = _JOBSET_NAME
    if not re.fullmatch(pattern, job.name):
        yield Problem("--name", f"--name ({job.name!r}) on kubernetes: {words}")
    if job.exclude is not None and "[" in job.exclude:
        yield Problem("--exclude", f"--exclude ({job.exclude}) on kubernetes: names in full, by commas, without ranges")
    if job.container is None:
        yield Problem("--container", "--container IMAGE is missing: what the pods run")
    if job.volume_claim is None:
        yield Problem(
            "--volume-claim",
            "--volume-claim NAME is missing: the claim, mounted at --workdir, that holds RUN.yaml, "
            "data and the run folder, readable and writable from all nodes",
        )
    if job.resume != "auto":
        yield Problem(
            "checkpoint.resume",
            f"checkpoint.resume ({job.resume}) would hold at every restart on kubernetes, too, which then began there "
            "again; make such a start elsewhere, or take a run_dir of its own, and launch with auto",
        )
    if not job.workdir.startswith("/"):
        yield Problem(
            "--workdir", f"--workdir ({job.workdir}) must be absolute on kubernetes: the volume is mounted there"
        )
