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
    padding: int  # tokens of padding in all micro-batches
    room: int  # all tokens of these
    flops: float
    recomputed_flops: float
    peak_rate: float | None  # FLOP/s of all ranks' devices at most; None where that is not known
    peak_memory_bytes: int  # of the device that holds most


def common_record(state: TrainingState, spent: Spent, *, num_tokens: int) -> dict[str, Any]:
    """What the records of all tasks have. state: after the step; num_tokens: of the step."""
    available = spent.seconds * spent.peak_rate if spent.peak_rate else None
    return {
        "iteration": state.iteration,
        "data_step": state.data_step - 1,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "padding_ratio": spent.padding / spent.room,
        "step_seconds": spent.seconds,
        "data_wait_seconds": spent.waited,
        "tokens_per_second": num_tokens / spent.seconds,
        "mfu": spent.flops / available if available else None,
        "hfu": (spent.flops + spent.recomputed_flops) / available if available else None,
        "peak_memory_bytes": spent.peak_memory_bytes,
    }


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
    between_steps: Mapping[str, float],
    is_spike: bool,
) -> dict[str, Any]:
    """state: after the step. shares, epochs: {source: part of all tokens}, {source: {bucket: epochs}} until then.

    between_steps: seconds of saving and evaluating since the record before.
    """
    return {
        **common_record(state, spent, num_tokens=prepared.num_tokens),
        "bucket": prepared.bucket,
        "loss": result.loss,
        "loss_by_source": {sources[index]: loss for index, loss in result.source_losses.items()},
        "num_loss_tokens": result.num_loss_tokens,
        "num_loss_tokens_by_source": {sources[index]: count for index, count in result.source_tokens.items()},
        "grad_norm": result.grad_norm,
        "lr": lr,
        "consumed_share_by_source": dict(shares),
        "epochs_by_source": dict(epochs),
        "seconds_by_phase": {
            "data": spent.waited,
            "forward_backward": result.forward_backward_seconds,
            "optimizer": spent.seconds - spent.waited - result.forward_backward_seconds,
            **between_steps,
        },
        "skipped": not result.updated,
        "spike": is_spike,
        **result.measures,
    }
