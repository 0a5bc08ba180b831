"""Which steps stand out from the last 128: by loss and by gradient norm, each bucket around its own median.

Plain numbers in and out. What is remembered goes into every checkpoint, so that a resumed run judges as the unbroken.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

WINDOW = 128  # steps
FEWEST_STEPS = 20  # in the window, before any step is judged
FEWEST_OF_BUCKET = 4  # in the window, for a level of the bucket's own; else all steps' level counts
MAD_TO_SIGMA = 1.4826  # of a normal distribution
# (of a known bucket, of a rare one, whose level may differ): a deviation within the smallest sigma is no news, however
# still the window has been. Of the loss: a part of its median; of the norm's logarithm: itself.
SMALLEST_SIGMA_OF_LOSS = (0.005, 0.1)
SMALLEST_SIGMA_OF_LOG_NORM = (0.05, 0.3)


class _Step(NamedTuple):
    bucket: int
    loss: float
    log_norm: float


class StepHistory:
    """The last steps' losses and gradient norms, and how many updates in a row were not made."""

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self._steps: deque[_Step] = deque(maxlen=WINDOW)

    def reasons(self, *, bucket: int, loss: float, grad_norm: float, sigmas: float) -> list[str]:
        """In what a step lies more than `sigmas` above the steps of its bucket; empty where it does not stand out.

        A sigma is the median absolute deviation of all steps from their buckets' medians, scaled as for a normal
        distribution: neither earlier spikes nor the buckets' different levels widen it. Norms are compared by their
        logarithm.
        """
        if len(self._steps) < FEWEST_STEPS or not _is_usable(loss, grad_norm):
            return []
        is_rare = sum(step.bucket == bucket for step in self._steps) < FEWEST_OF_BUCKET
        by_bucket: dict[int, list[_Step]] = {}
        for step in self._steps:
            by_bucket.setdefault(bucket if is_rare else step.bucket, []).append(step)
        found = []
        losses = {key: [step.loss for step in steps] for key, steps in by_bucket.items()}
        usual = statistics.median(losses[bucket])
        height = (loss - usual) / _sigma(losses, smallest=SMALLEST_SIGMA_OF_LOSS[is_rare] * usual)
        if height > sigmas:
            found.append(f"loss {loss:.4f} is {height:.1f} sigma above {usual:.4f}")
        norms = {key: [step.log_norm for step in steps] for key, steps in by_bucket.items()}
        usual = statistics.median(norms[bucket])
        height = (math.log(grad_norm) - usual) / _sigma(norms, smallest=SMALLEST_SIGMA_OF_LOG_NORM[is_rare])
        if height > sigmas:
            found.append(f"grad norm {grad_norm:.4g} is {height:.1f} sigma above {math.exp(usual):.4g}")
        return found

    def add(self, *, bucket: int, loss: float, grad_norm: float, updated: bool) -> None:
        """Remembers a step; one without a finite loss and norm only counts as skipped."""
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        if _is_usable(loss, grad_norm):
            self._steps.append(_Step(bucket, loss, math.log(grad_norm)))

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's manifest: JSON keeps floats to the last bit."""
        return {"skipped_in_a_row": self.skipped_in_a_row, "steps": [list(step) for step in self._steps]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StepHistory:
        """What `to_json` gave."""
        history = cls()
        history.skipped_in_a_row = value["skipped_in_a_row"]
        history._steps.extend(_Step(*step) for step in value["steps"])
        return history


def _is_usable(loss: float, grad_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm) and grad_norm > 0


def _sigma(by_bucket: dict[int, list[float]], *, smallest: float) -> float:
    """The spread of values around their bucket's median; buckets with few steps take no part."""
    deviations: list[float] = []
    for values in by_bucket.values():
        if len(values) >= FEWEST_OF_BUCKET:
            median = statistics.median(values)
            deviations += [abs(value - median) for value in values]
    return max(MAD_TO_SIGMA * statistics.median(deviations), smallest, 1e-9)  # where all losses are 0, too
