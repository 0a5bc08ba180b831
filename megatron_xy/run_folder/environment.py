"""On what a run ran: env.json, with the versions and the revision that decide what it computes."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_xy.packages import installed_versions
from megatron_xy.run_folder.files import now
from megatron_xy.run_folder.starts import current_attempt
from megatron_xy.storage import write_json


def write_env(run_dir: Path, *, extra: Mapping[str, Any]) -> None:
    """Writes env.json: what the run ran on, and `extra` (JSON values) beside it."""
    environment = {
        "time": now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "python": sys.version.split()[0],
        "packages": installed_versions(),
        "git_revision": _git_revision(),
        "argv": sys.argv,
        "attempt": current_attempt(),
    }
    write_json(run_dir / "env.json", {**environment, **extra})


def _git_revision() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():  # an installed package may lie inside somebody else's checkout
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
