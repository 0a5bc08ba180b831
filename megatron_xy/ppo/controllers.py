"""What PPO adjusts as it goes, and a checkpoint keeps: the KL coefficient and the scores' moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_KL_ERROR = 0.2


def adapted_kl_coef(coefficient: float, *, kl: float, target: float, num_answers: int, horizon: int) -> float:
    """The coefficient after a batch, so that the KL divergence per answer stays near `target` nats (Ziegler et al.
    2019). kl: the sum over an answer's tokens, mean over the batch; horizon: answers."""
    error = min(max(kl / target - 1, -MOST_KL_ERROR), MOST_KL_ERROR)
    return coefficient * (1 + error * num_answers / horizon)


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of all scores so far, by the merging of moments (Chan et al. 1979), in double precision."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    @property
    def deviation(self) -> float:
        """Standard deviation (Bessel); 1 while there is nothing to tell."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return math.sqrt(variance) if variance > 0 else 1.0

    def merged(self, values: Sequence[float]) -> RunningMoments:
        """With the values of one more batch."""
        if not values:
            return self
        count = len(values)
        mean = math.fsum(values) / count
        squares = math.fsum((value - mean) ** 2 for value in values)
        total = self.count + count
        shift = mean - self.mean
        return RunningMoments(
            total,
            self.mean + shift * count / total,
            self.squares + squares + shift * shift * self.count * count / total,
        )
