"""What a machine has, looked at without torch: versions, advisories, limits, disk; each ok, warn or fail."""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from megatron_xy.errors import ConfigError, StorageError
from megatron_xy.packages import PACKAGES, version_of
from megatron_xy.run_folder.files import probe
from megatron_xy.storage import storage_errors, temporary_name

OPEN_FILES = 4096  # shards, sockets to peers and libraries of a rank
SHM_BYTES = 2**30  # a container's default of 64 MB is too little for NCCL
FREE_BYTES = 10 * 2**30
DISK_BYTES = 256 * 2**20  # written to measure
SLOW_DISK = 200e6  # bytes/s; a checkpoint is written beside training, and must not outlast the save interval

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at and found, and what to do where it is not ok."""

    verdict: Verdict
    subject: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<4} {self.subject}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def machine_findings(folder: Path, *, has_gpu: bool) -> list[Finding]:
    """All of this machine; `folder` is where the disk is tried, 256 MB that are removed again."""
    return [*_versions(), *_advisories(), *_limits(has_gpu=has_gpu), *_disk(folder)]


def is_below(version: str, limit: str) -> bool:
    """Whether `version` is older than `limit`, by their numbers; suffixes such as +cu128 do not count."""
    return _numbers(version) < _numbers(limit)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    return tuple(numbers + [0] * (4 - len(numbers)))


def _versions() -> Iterator[Finding]:
    for name, accepted in PACKAGES.items():
        if accepted.lowest is None:
            continue
        found = version_of(name)
        remedy = f"pip install '{name}{accepted.specifier}'"
        is_old = found is not None and is_below(found, accepted.lowest)
        is_new = found is not None and accepted.limit is not None and not is_below(found, accepted.limit)
        if found is None:
            if accepted.is_needed:
                yield Finding("fail", name, "not installed", remedy)
        elif is_old or is_new:
            verdict: Verdict = "fail" if accepted.is_needed else "warn"
            yield Finding(verdict, name, f"{found}, accepted {accepted.specifier}", remedy)
        else:
            yield Finding("ok", name, f"{found}, accepted {accepted.specifier}")


def _advisories() -> Iterator[Finding]:
    entries = yaml.safe_load(Path(__file__).with_name("advisories.yaml").read_text(encoding="utf-8"))
    for entry in entries:
        found = version_of(entry["package"])
        if found is None or (entry["fixed"] is not None and not is_below(found, entry["fixed"])):
            continue
        what = f"{entry['package']} {found}: {entry['what']}; not reached: {entry['test']}"
        if entry["fixed"] is None:
            yield Finding("ok", entry["id"], f"{what}; no version is without it yet")
        else:
            yield Finding("warn", entry["id"], what, f"{entry['package']}>={entry['fixed']} is without it")
    yield Finding("ok", "advisories", f"{len(entries)} known ones compared with the installed versions")


def _limits(*, has_gpu: bool) -> Iterator[Finding]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)  # as far as a rank raises its own
    files = OPEN_FILES if files == resource.RLIM_INFINITY else files
    remedy = "" if files >= OPEN_FILES else f"ulimit -n {OPEN_FILES}, or LimitNOFILE of the scheduler's service"
    yield Finding("ok" if not remedy else "warn" if files >= 1024 else "fail", "open files", str(files), remedy)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_unlimited = locked == resource.RLIM_INFINITY
    if has_gpu:
        remedy = "" if is_unlimited else "ulimit -l unlimited: InfiniBand registers memory that must stay locked"
        yield Finding(
            "warn" if remedy else "ok", "locked memory", "unlimited" if is_unlimited else f"{locked} bytes", remedy
        )
    else:
        yield Finding("ok", "locked memory", "no GPU, none needed")
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    remedy = (
        "" if size >= SHM_BYTES else "mount it larger (docker --shm-size=16g, kubernetes: emptyDir of medium Memory)"
    )
    yield Finding("warn" if remedy else "ok", "/dev/shm", f"{size / 2**30:.1f} GiB", remedy)


def _disk(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding("fail", "disk writes", f"{folder} is no folder", "make it, or name another with --folder")
        return
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= FREE_BYTES else "make room: a checkpoint has 14 bytes a parameter (bf16 weights, fp32 AdamW)"
    yield Finding("warn" if remedy else "ok", "free space", f"{free / 2**30:.1f} GiB in {folder.resolve()}", remedy)
    if free < 2 * DISK_BYTES:
        yield Finding("fail", "disk writes", "no room to try", "make room")
        return
    path = folder / temporary_name("doctor")
    block = os.urandom(2**20)
    try:
        with storage_errors(path):
            began = time.monotonic()
            with path.open("wb") as stream:
                for _ in range(DISK_BYTES // len(block)):
                    stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
            rate = DISK_BYTES / (time.monotonic() - began)
    except StorageError as error:
        yield Finding("fail", "disk writes", str(error), "make room for runs, and let their user write there")
        return
    finally:
        path.unlink(missing_ok=True)
    remedy = "" if rate >= SLOW_DISK else "put run_dir on a faster file system, or save less often"
    yield Finding("warn" if remedy else "ok", "disk writes", f"{rate / 1e6:,.0f} MB/s with fsync", remedy)
    try:
        probe(folder)
    except ConfigError as error:
        yield Finding("fail", "file locks", *str(error).split("; ", 1))
    else:
        yield Finding("ok", "file locks", f"{folder.resolve()} has them")
