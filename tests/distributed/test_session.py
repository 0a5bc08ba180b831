"""A run folder that each node has for itself is refused on all ranks before anything is built."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch.distributed as dist

from megatron_xy import run_folder
from megatron_xy.errors import ConfigError
from megatron_xy.runtime.session import check_is_shared
from tests.distributed.spawn import run_ranks


def test_a_folder_that_not_all_ranks_share_is_refused_by_all_with_the_rank_that_is_apart(tmp_path: Path) -> None:
    shared, apart = tmp_path / "shared", tmp_path / "apart"
    for folder in (shared, apart):
        folder.mkdir()
    (apart / ".lock").write_text('{"pid": 1, "host": "another", "time": "then"}')
    told = run_ranks(look_at, [shared, shared, apart], world_size=3)
    assert len(set(told)) == 1
    assert told[0].startswith("run_dir (DIR) must be one folder") and "rank 2 does not see what rank 0 wrote" in told[0]
    assert run_ranks(look_at, [shared] * 3, world_size=3) == ["seen"] * 3


def look_at(folders: list[Path]) -> str:
    folder = folders[dist.get_rank()]
    with run_folder.lock(folder) if dist.get_rank() == 0 else contextlib.nullcontext():
        try:
            check_is_shared(folder, patience_seconds=0.3)
        except ConfigError as error:
            return str(error).replace(str(folder), "DIR")
    return "seen"
