"""The record of a training step: what metrics.jsonl keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_xy.checkpoint.files import TrainingState
from megatron_xy.data.loader import PreparedStep
from megatron_xy.training.train_step import StepResult


@dataclass(frozen=True)
class Spent:
    """What a step took, over all ranks."""

    seconds: float
    waited: float  # for data
    between_steps: Mapping[str, float]  # seconds of saving and evaluating since the record before
    padding: int  # tokens of padding in all micro-batches
    room: int  # all tokens of these
    flops: float
    recomputed_flops: float
    available_flops: float | None  # in that time, at the devices' peak; None where that is not known
    peak_memory_bytes: int  # of the device that holds most


def step_record(
    state: TrainingState,
    prepared: PreparedStep,
    result: StepResult,
    spent: Spent,
    *,
    lr: float,
    sources: Sequence[str],
    shares: Mapping[str, float],
    epochs: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """state: after the step. shares, epochs: {source: part of all tokens}, {source: {bucket: epochs}} until then."""
    available = spent.available_flops
    return {
        "iteration": state.iteration,
        "data_step": state.data_step - 1,
        "bucket": prepared.bucket,
        "loss": result.loss,
        "loss_by_source": {sources[index]: loss for index, loss in result.source_losses.items()},
        "num_loss_tokens": result.num_loss_tokens,
        "num_loss_tokens_by_source": {sources[index]: count for index, count in result.source_tokens.items()},
        "grad_norm": result.grad_norm,
        "lr": lr,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "consumed_share_by_source": dict(shares),
        "epochs_by_source": dict(epochs),
        "padding_ratio": spent.padding / spent.room,
        "step_seconds": spent.seconds,
        "data_wait_seconds": spent.waited,
        "seconds_by_phase": {
            "data": spent.waited,
            "forward_backward": result.forward_backward_seconds,
            "optimizer": spent.seconds - spent.waited - result.forward_backward_seconds,
            **spent.between_steps,
        },
        "tokens_per_second": prepared.num_tokens / spent.seconds,
        "mfu": spent.flops / available if available else None,
        "hfu": (spent.flops + spent.recomputed_flops) / available if available else None,
        "peak_memory_bytes": spent.peak_memory_bytes,
        "skipped": not result.updated,
        **result.measures,
    }
