"""What a rank takes from its environment, and asks of it."""

from __future__ import annotations

import resource
import subprocess
import sys


def test_a_rank_may_open_as_many_files_as_it_is_allowed() -> None:
    code = (
        "import resource; _, most = resource.getrlimit(resource.RLIMIT_NOFILE);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, most));"
        "from megatron_xy.runtime import environment; environment.allow_open_files();"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [int(limit) for limit in limits] == [min(most, 65536) if most >= 0 else 65536, most]
