"""The verbs that train: one rank of each task, and `run`, which starts and supervises such ranks."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_xy.cli.options import NprocPerNode, Overrides, RunYaml, start_rank_device
from megatron_xy.errors import MegatronXYError


def pretrain(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """(Continued) pre-training in one rank of a torchrun world; `megatron-xy run` starts such a world."""
    _train("pretrain", "megatron_xy.training.pretrain", run_yaml, overrides)


def sft(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """Supervised fine-tuning on conversations, in one rank of a torchrun world, as pretrain."""
    _train("sft", "megatron_xy.training.pretrain", run_yaml, overrides)


def reward(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """A reward model from preference pairs, in one rank of a torchrun world, as pretrain."""
    _train("reward", "megatron_xy.reward.run", run_yaml, overrides)


def ppo(run_yaml: RunYaml, overrides: Overrides = None) -> None:
    """PPO over four roles in one rank of a torchrun world; `megatron-xy run` starts such a world."""
    _train("ppo", "megatron_xy.ppo.run", run_yaml, overrides)


def run(
    run_yaml: RunYaml,
    overrides: Overrides = None,
    nproc_per_node: NprocPerNode = 1,
    restarts: Annotated[int, typer.Option("--restarts", min=0, help="restarts after a lost or failed rank")] = 0,
) -> None:
    """Starts and supervises torchrun on this machine: exit codes, restarts from the newest checkpoint, no orphans."""
    from megatron_xy import run_folder
    from megatron_xy.config import load_config, run_dir_of
    from megatron_xy.preflight import BUILT_DATA, check_paths
    from megatron_xy.runtime.supervise import supervise

    options = overrides or []
    try:
        config = load_config(run_yaml, overrides=options, world_size=nproc_per_node)
        run_folder.prepare(config.run_dir)
        check_paths(config, build_into=config.run_dir / BUILT_DATA)
    except MegatronXYError as error:
        run_dir = run_dir_of(run_yaml, overrides=options)
        if run_dir is not None:
            with contextlib.suppress(MegatronXYError):  # a folder that takes no record does not hide the reason
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


def _train(task: str, module: str, run_yaml: Path, overrides: list[str] | None) -> None:
    """A task's work in this process, which ends with it; its module is imported once the device is settled."""
    began = time.monotonic()
    from megatron_xy.runtime.worker import run_worker

    def work(config: Any, stop: Any, watchdog: Any) -> None:
        start_rank_device(config)
        importlib.import_module(module).run(config, stop=stop, watchdog=watchdog, began=began)

    run_worker(task, config_path=run_yaml, overrides=overrides or [], work=work)
