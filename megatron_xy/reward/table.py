"""Scores of pairs -> the table of an epoch: how often the better answer wins, by how much, on what scale."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_xy.reward.pairs import Pair

Scores = NDArray[np.float64]


def table_of(pairs: Sequence[Pair], chosen: Scores, rejected: Scores) -> dict[str, Any] | None:
    """The numbers of pairs whose answers have these scores; None where there are no pairs.

    A tie counts as lost. loss: mean of -log sigmoid(chosen - rejected). Scale and spread are those of the scores of
    both answers; length_correlation: Pearson's, of score and number of answer tokens; null where either does not vary.
    """
    if not pairs:
        return None
    scores = np.concatenate([chosen, rejected])
    lengths = np.array([len(pair.chosen) for pair in pairs] + [len(pair.rejected) for pair in pairs], dtype=float)
    wins = chosen > rejected
    losses = np.logaddexp(0.0, rejected - chosen)
    sources = [pair.source for pair in pairs]
    return {
        "num_pairs": len(pairs),
        "accuracy": float(wins.mean()),
        "loss": float(losses.mean()),
        "chosen_mean": float(chosen.mean()),
        "rejected_mean": float(rejected.mean()),
        "margin": float((chosen - rejected).mean()),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "score_min": float(scores.min()),
        "score_max": float(scores.max()),
        "length_correlation": _correlation(scores, lengths),
        "accuracy_by_source": _by_group(sources, wins),
        "accuracy_by_model": _by_group([_models(pair) for pair in pairs], wins),
        "loss_by_source": _by_group(sources, losses),
        "num_pairs_by_source": dict(sorted(Counter(sources).items())),
    }


def stored_scores(pairs: Sequence[Pair], chosen: Scores, rejected: Scores, *, model: str | None) -> dict[str, Any]:
    """Mean and deviation of the scores of one model's answers, or of all: what PPO normalises by.

    {} where there are none, or none that are numbers.
    """
    mine = [score for pair, score in zip(pairs, chosen, strict=True) if model in (None, pair.models[0])]
    mine += [score for pair, score in zip(pairs, rejected, strict=True) if model in (None, pair.models[1])]
    if not mine or not np.isfinite(mine).all():
        return {}
    return {"mean": float(np.mean(mine)), "std": float(np.std(mine)), "num_answers": len(mine), "model": model}


def lines_of(record: dict[str, Any], *, seconds: float) -> list[str]:
    """The table of eval.jsonl's record in lines."""
    place = f"epoch {record['epoch']}, step {record['iteration']}"
    lines = [
        f"evaluation after {place} | {seconds:.2f} s",
        f"  {'pairs':<10} {'number':>8} {'accuracy':>9} {'loss':>8} {'chosen':>8} {'rejected':>9} {'margin':>8} "
        f"{'std':>8} {'range':>17} {'length':>7}",
    ]
    for name in ("held_out", "training"):
        numbers = record[name]
        if numbers is not None:
            length = numbers["length_correlation"]
            band = f"{numbers['score_min']:.3f} to {numbers['score_max']:.3f}"
            lines.append(
                f"  {name.replace('_', ' '):<10} {numbers['num_pairs']:>8,} {numbers['accuracy']:>9.2%} "
                f"{numbers['loss']:>8.4f} {numbers['chosen_mean']:>8.3f} {numbers['rejected_mean']:>9.3f} "
                f"{numbers['margin']:>8.3f} {numbers['score_std']:>8.3f} {band:>17} "
                f"{'-' if length is None else f'{length:+.2f}':>7}"
            )
    shown = record["held_out"] or record["training"]
    for field, name in (("accuracy_by_source", "source"), ("accuracy_by_model", "model")):
        if len(shown[field]) > 1:
            lines.append(f"  by {name}: " + ", ".join(f"{key} {value:.2%}" for key, value in shown[field].items()))
    return lines


def _models(pair: Pair) -> str:
    """Which models generated a pair: one name, or two in order."""
    return " + ".join(sorted(set(pair.models)))


def _by_group(groups: Sequence[str], values: NDArray[Any]) -> dict[str, float]:
    """The mean of each group."""
    names = np.array(groups)
    return {str(name): float(values[names == name].mean()) for name in sorted(set(groups))}


def _correlation(scores: Scores, lengths: Scores) -> float | None:
    if scores.std() == 0 or lengths.std() == 0:
        return None
    value = float(np.corrcoef(scores, lengths)[0, 1])
    return value if math.isfinite(value) else None
