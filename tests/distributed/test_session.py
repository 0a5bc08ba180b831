"""What a start asks of the run folder: that all ranks share it, and, one rank for all, that it has room."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch.distributed as dist

from megatron_xy import run_folder
from megatron_xy.config import load_config
from megatron_xy.errors import ConfigError, StorageError
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


def test_one_rank_asks_for_room(tmp_path: Path) -> None:
    """All would look at every file that a killed save left."""
    huge = {"num_layers": 1000, "hidden_size": 32768, "ffn_hidden_size": 131072, "num_attention_heads": 8}
    sections = {
        "model": {**huge, "vocab_size": 300},
        "data": {"path": "data"},
        "training": {"global_batch_tokens": 256, "micro_batch_tokens": 64},
    }
    (tmp_path / "run.yaml").write_text(json.dumps({"run_dir": str(tmp_path / "run"), **sections}))
    first, second = run_ranks(ask_for_room, tmp_path / "run.yaml", world_size=2)
    assert "MB free, and" in first and second == "not asked"


def ask_for_room(path: Path) -> str:
    from megatron_xy.training.pretrain import with_model

    try:
        with_model(load_config(path))
    except StorageError as error:
        return str(error)
    return "not asked"
