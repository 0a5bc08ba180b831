"""The learning rate of every update: warm-up, then the decay, counted in iterations or in tokens.

From the optimizer section and the run's place to a plain number. Nothing is carried along: a resumed run, and one that
continues another run's weights from its own first step, find their rate from where they stand.
"""

from __future__ import annotations

import math
from typing import Literal

from megatron_xy.config import OptimizerConfig

DecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]


def learning_rate(config: OptimizerConfig, *, iteration: int, consumed_tokens: int, train_iters: int) -> float:
    """The rate of the update that is number `iteration` (1 = the first) and with which `consumed_tokens` are consumed.

    Linear warm-up from `lr_warmup_init`, then the decay to `min_lr`, which holds from its end on.
    """
    if config.is_by_tokens:
        position, warmup, end = consumed_tokens, config.lr_warmup_tokens or 0, config.lr_decay_tokens
        annealing = config.lr_wsd_decay_tokens
    else:
        position, warmup, end = iteration, config.lr_warmup_iters, config.lr_decay_iters or train_iters
        annealing = config.lr_wsd_decay_iters
    if position <= warmup:
        return config.lr_warmup_init + (config.lr - config.lr_warmup_init) * position / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    assert end is not None, "the config's rules ask for the decay's end"
    begin = warmup
    style: DecayStyle = "cosine"
    if config.lr_decay_style == "WSD":
        assert annealing is not None, "the config's rules ask for it"
        begin, style = max(warmup, end - annealing), config.lr_wsd_decay_style
    elif config.lr_decay_style == "linear":
        style = "linear"
    if position <= begin:
        return config.lr
    progress = min(1.0, (position - begin) / (end - begin)) if end > begin else 1.0  # an end within the warm-up
    return config.min_lr + (config.lr - config.min_lr) * _remaining(style, progress)


def _remaining(style: DecayStyle, progress: float) -> float:
    """Of the way from lr to min_lr the part that is left, 1 to 0; the forms are those of Megatron-LM's scheduler."""
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if style == "exponential":
        return 2.0 * math.pow(0.5, progress) - 1.0
    return 1.0 - math.sqrt(progress)
