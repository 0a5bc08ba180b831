"""The verb `reward`: a chat model's trunk with a value head, trained on preference pairs, measured after each epoch.

What can be known to fail is found before any process group starts: rows, tokenizer, model shape, layout, run folder.
"""

from __future__ import annotations

from functools import partial

from megatron_xy.config import RunConfig
from megatron_xy.model.layer_spec import choose_layers
from megatron_xy.parallel import Groups
from megatron_xy.preflight import open_pairs
from megatron_xy.reward.batches import PairOrder
from megatron_xy.reward.evaluator import PairEvaluator
from megatron_xy.reward.loader import PairLoader
from megatron_xy.reward.objective import reward_objective
from megatron_xy.reward.pairs import PairData
from megatron_xy.runtime.session import session
from megatron_xy.runtime.signals import StopRequest
from megatron_xy.runtime.watchdog import Watchdog
from megatron_xy.training.pretrain import open_log, train, with_model


def run(config: RunConfig, *, stop: StopRequest, watchdog: Watchdog, began: float) -> None:
    """Trains as `config` says, in this rank of torchrun's world. `began`: time.monotonic() at the process's start.

    Raises ConfigError, DataError, StorageError, Stopped or PeerLost.
    """
    config = with_model(config)
    data = open_pairs(config)
    order = order_of(config, data)
    config = with_epochs(config, order)
    log = open_log(config)
    for line in told(config, data, order):
        log.say(line)
    log.say(str(choose_layers(config.model)))  # here, before a process group starts, it may still be refused
    with session(config, log=log, watchdog=watchdog, began=began):
        train(
            config,
            partial(data_of, config, data, order),
            log=log,
            watchdog=watchdog,
            stop=stop,
            objective=reward_objective(config.reward_section),
            keeps_epochs=True,
        )


def data_of(config: RunConfig, data: PairData, order: PairOrder, groups: Groups) -> tuple[PairLoader, PairEvaluator]:
    """What the ranks of `groups` learn from and are measured on."""
    loader = PairLoader(config, data=data, order=order, dp_size=groups.dp_size, dp_rank=groups.dp_rank)
    return loader, PairEvaluator(config, data=data, order=order)


def order_of(config: RunConfig, data: PairData) -> PairOrder:
    """The order in which a run takes its pairs."""
    return PairOrder(
        [pair.num_tokens for pair in data.training],
        seed=config.seed,
        global_batch_tokens=config.training.global_batch_tokens,
    )


def with_epochs(config: RunConfig, order: PairOrder) -> RunConfig:
    """The config with the train_iters that its epochs come to, if it counts in epochs."""
    if config.training.epochs is None:
        return config
    steps = order.num_steps(config.training.epochs)
    return config.model_copy(update={"training": config.training.model_copy(update={"train_iters": steps})})


def told(config: RunConfig, data: PairData, order: PairOrder) -> list[str]:
    """What is learned from, in lines."""
    last = order.step(config.training.train_iters - 1)
    return [
        f"  {len(data.training):,} pairs to learn from, {len(data.held_out):,} held out; sources: "
        f"{', '.join(data.sources)}",
        *(f"  {note}" for note in data.notes),
        f"  {config.reward_section.loss}-level loss; {config.training.train_iters} steps, {order.num_steps(1)} in the "
        f"first epoch; the last is in epoch {last.epoch + 1}",
    ]
