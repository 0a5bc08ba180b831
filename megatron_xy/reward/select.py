"""`megatron-xy select RUN`: which epoch of a reward run is fit for use, by its config's criteria, and why not the rest.

    RUN/run.yaml, eval.jsonl, checkpoints/ -> every epoch with what speaks against it -> the best of those without

Nothing of the run is changed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xy.checkpoint.folders import iteration_folder
from megatron_xy.config import RewardConfig, load_config
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.record_files import read_records


@dataclass(frozen=True)
class Epoch:
    """One epoch's numbers, and what speaks against it: nothing where it may be taken."""

    epoch: int
    iteration: int
    checkpoint: str
    accuracy: float
    training_accuracy: float
    margin: float | None  # None, as the two below, where scores are not finite
    score_mean: float | None
    score_std: float | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """All epochs, and the one that is taken, if any is fit."""

    epochs: list[Epoch]
    chosen: Epoch | None

    def to_json(self) -> dict[str, Any]:
        """The chosen epoch's numbers at the top (null where there is none), and those of all."""
        chosen = self.chosen
        return {
            "epoch": chosen and chosen.epoch,
            "iteration": chosen and chosen.iteration,
            "checkpoint": chosen and chosen.checkpoint,
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [f"{'epoch':>5} {'step':>8} {'accuracy':>9} {'training':>9} {'margin':>8} {'mean':>8} {'std':>8}"]
        for epoch in self.epochs:
            mark = "  <- selected" if epoch is self.chosen else "".join(f"\n      {text}" for text in epoch.problems)
            lines.append(
                f"{epoch.epoch:>5} {epoch.iteration:>8} {epoch.accuracy:>9.2%} {epoch.training_accuracy:>9.2%} "
                f"{written(epoch.margin):>8} {written(epoch.score_mean):>8} {written(epoch.score_std):>8}{mark}"
            )
        if self.chosen is None:
            lines.append("no epoch meets the criteria of the run's section reward")
        else:
            lines.append(f"ckpt:{self.chosen.checkpoint}")
        return lines


def written(value: float | None) -> str:
    """A number with three places, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def select(run_dir: Path) -> Selection:
    """The epochs of a reward run; of those that meet its criteria, that of the highest held-out accuracy, then margin.

    Raises ConfigError (no such run, or another task's) or DataError (nothing was measured on held-out pairs).
    """
    path = run_dir / "run.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is no run's folder: it holds no run.yaml; name the run_dir of a reward run")
    config = load_config(path)
    if config.task != "reward":
        raise ConfigError(f"{run_dir} is a run of task {config.task}; only a reward run has epochs to select from")
    records = [record for record in read_records(run_dir / "eval.jsonl") if record.get("ends_epoch")]
    if not records:
        raise DataError(f"{run_dir / 'eval.jsonl'} has no epoch yet; let the run end one")
    if any(record["held_out"] is None for record in records):
        raise DataError(
            f"{run_dir} measured nothing on held-out pairs; train with reward.test_fraction above 0, or data.eval_path"
        )
    epochs = [_epoch(record, run_dir, config.reward_section) for record in records]
    fit = [epoch for epoch in epochs if not epoch.problems]
    chosen = max(fit, key=lambda epoch: (epoch.accuracy, epoch.margin or 0.0, -epoch.iteration), default=None)
    return Selection(epochs, chosen)


def _epoch(record: dict[str, Any], run_dir: Path, reward: RewardConfig) -> Epoch:
    held_out, training = record["held_out"], record["training"]
    folder = iteration_folder(run_dir / "checkpoints", record["iteration"])
    return Epoch(
        epoch=record["epoch"],
        iteration=record["iteration"],
        checkpoint=str(folder),
        accuracy=held_out["accuracy"],
        training_accuracy=training["accuracy"],
        margin=held_out["margin"],
        score_mean=held_out["score_mean"],
        score_std=held_out["score_std"],
        problems=tuple(_problems(held_out, training, folder, reward)),
    )


def _problems(held_out: dict[str, Any], training: dict[str, Any], folder: Path, reward: RewardConfig) -> list[str]:
    """What a record falls short of, each with the value and the rule."""
    problems = []
    if not (folder / "manifest.json").is_file():
        problems.append(f"its checkpoint {folder.name} is gone")
    if any(held_out[name] is None for name in ("loss", "margin", "score_mean", "score_std")):
        return [*problems, "its scores are not finite"]
    if not held_out["accuracy"] > reward.min_accuracy:
        problems.append(f"accuracy {held_out['accuracy']:.2%} must exceed min_accuracy ({reward.min_accuracy:.2%})")
    if not held_out["margin"] > reward.min_margin:
        problems.append(f"margin {held_out['margin']:.3f} must exceed min_margin ({reward.min_margin:g})")
    low, high = reward.score_band
    bottom, top = (held_out["score_mean"] + sign * held_out["score_std"] for sign in (-1, 1))
    if not low <= bottom <= top <= high:
        problems.append(f"scores from {bottom:.3f} to {top:.3f} (mean +- std) leave score_band [{low:g}, {high:g}]")
    gap = training["accuracy"] - held_out["accuracy"]
    if gap > reward.max_accuracy_gap:
        problems.append(
            f"overfitted: {gap:.2%} more accurate on training pairs, at most max_accuracy_gap "
            f"({reward.max_accuracy_gap:.2%})"
        )
    return problems
