"""(Continued) pre-training and supervised fine-tuning: one role over all ranks, next-token loss on packed documents.

The tasks differ in their data alone: of a conversation the loss asks for the answers only.

What can be known to fail is found before any process group starts: data, tokenizer, model shape, layout, run folder.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from functools import partial

from megatron_xy import device, mcore, parallel
from megatron_xy.config import RunConfig, check_shape, check_world
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.phases import describe_epochs, run_sampler, with_epochs
from megatron_xy.data.loader import StepLoader
from megatron_xy.flops import num_parameters
from megatron_xy.log import RunLog
from megatron_xy.model.layer_spec import choose_layers
from megatron_xy.model.source import check_head, resolve_model
from megatron_xy.parallel import Groups
from megatron_xy.preflight import check_boards, open_data
from megatron_xy.role import Role, build_role
from megatron_xy.run_dir import check_space, check_weights_to_load
from megatron_xy.runtime import environment
from megatron_xy.runtime.session import session
from megatron_xy.runtime.signals import StopRequest
from megatron_xy.runtime.watchdog import Watchdog, backend_timeout
from megatron_xy.training.evaluation import HeldOutEvaluator
from megatron_xy.training.train_step import Objective
from megatron_xy.training.trainer import Evaluator, Loader, Trainer, starting


def run(config: RunConfig, *, stop: StopRequest, watchdog: Watchdog, began: float) -> None:
    """Trains as `config` says, in this rank of torchrun's world. `began`: time.monotonic() at the process's start.

    Raises ConfigError, DataError, StorageError, Stopped or PeerLost.
    """
    config = with_model(config)
    dataset, held_out = open_data(config)
    config = with_epochs(config, dataset.streams, conversation_sources=dataset.conversation_sources)
    if config.data.tokenizer is None:
        data = config.data.model_copy(update={"tokenizer": dataset.tokenizer_path})
        config = config.model_copy(update={"data": data})
    log = open_log(config)
    log.say(describe_epochs(config, run_sampler(config, dataset.streams)))
    log.say(str(choose_layers(config.model)))  # here, before a process group starts, it may still be refused
    with session(config, log=log, watchdog=watchdog, began=began):
        train(config, partial(data_of, config, dataset, held_out), log=log, watchdog=watchdog, stop=stop)


def data_of(
    config: RunConfig, dataset: PackedDataset, held_out: PackedDataset | None, groups: Groups
) -> tuple[StepLoader, HeldOutEvaluator]:
    """What the ranks of `groups` learn from and are measured on."""
    loader = StepLoader(config, dataset=dataset, dp_size=groups.dp_size, dp_rank=groups.dp_rank)
    return loader, HeldOutEvaluator(config, held_out, groups)


def train(
    config: RunConfig,
    data_of: Callable[[Groups], tuple[Loader, Evaluator]],
    *,
    log: RunLog,
    watchdog: Watchdog,
    stop: StopRequest,
    objective: Objective | None = None,
    keeps_epochs: bool = False,
) -> None:
    """Builds this rank's part, restores it and trains it to the end, in a world that has begun: the job of every task
    with one role. objective, keeps_epochs: as `Trainer` has them."""
    with starting(log, watchdog, "model and optimizer"):
        role = build(config)
    with starting(log, watchdog, "data"):
        loader, evaluator = data_of(role.groups)
    trainer = Trainer(
        config,
        role=role,
        loader=loader,
        evaluator=evaluator,
        log=log,
        watchdog=watchdog,
        stop=stop,
        objective=objective,
        keeps_epochs=keeps_epochs,
    )
    with contextlib.closing(loader):
        with starting(log, watchdog, "weights"):
            trainer.restore()
        stop.can_save = True
        trainer.train()


def with_model(config: RunConfig) -> RunConfig:
    """The config with the shape of the model that it loads, fit for this world and, on rank 0, its folders for it.

    Raises ConfigError, DataError or StorageError.
    """
    config = config.model_copy(update={"model": resolve_model(config.model)})
    check_head(config.model)
    check_shape(config)
    check_world(config, world_size=environment.world_size())
    if environment.rank() == 0:  # one rank's end is that of all, and one asks the file system
        check_weights_to_load(config, config.model)
        check_space(config, [config.model])
    return config


def open_log(config: RunConfig) -> RunLog:
    """The run's log, which has said what is trained. Raises ConfigError where a board that it asks for is missing."""
    check_boards(config.runtime)
    rank, world_size = environment.rank(), environment.world_size()
    is_leader = rank == leader_rank(config, world_size=world_size)
    log = RunLog(config.run_dir, rank=rank, is_leader=is_leader, wandb_project=config.runtime.wandb_project)
    log.say(headline(config, world_size=world_size))
    return log


def build(config: RunConfig) -> Role:
    """The role of a training job on this rank, its weights still to come."""
    groups = parallel.build_groups(
        "model",
        ranks=range(environment.world_size()),
        parallel=config.parallel,
        timeout_seconds=backend_timeout(config.runtime.timeout_seconds),
    )
    assert groups is not None, "a training job's role has all ranks"
    return build_role(
        groups,
        model=config.model,
        parallel=config.parallel,
        optimizer=config.optimizer,
        seed=config.seed,
        draw=False,
    )


def leader_rank(config: RunConfig, *, world_size: int) -> int:
    """The global rank that speaks for the job: first of the last stage, where the loss is."""
    stages = config.parallel.pipeline_model_parallel_size
    return world_size - world_size // stages


def headline(config: RunConfig, *, world_size: int) -> str:
    """What is trained, on what, in a line."""
    layout, model = config.parallel, config.model
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    return (
        f"megatron_xy {config.task}: {num_parameters(model) / 1e6:,.1f} M parameters, {world_size} ranks on "
        f"{device.name()} (tp {tp} x pp {pp} x dp {world_size // (tp * pp)}"
        f"{', sequence parallel' if layout.sequence_parallel and tp > 1 else ''}), "
        f"megatron-core {mcore.VERSION}, Python {platform.python_version()}, in {config.run_dir}"
    )
