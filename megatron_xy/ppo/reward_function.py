"""A Python function in place of the reward model: FILE.py:FUNCTION over a batch of prompts, responses and rows."""

from __future__ import annotations

import copy
import importlib.util
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_xy import device
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.ppo.experience import Rollout
from megatron_xy.ppo.material import reward_file
from megatron_xy.ppo.prompts import PromptFile
from megatron_xy.ppo.transport import Shipment

RewardFunction = Callable[[Sequence[Any], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]


def load_reward_function(name: str) -> RewardFunction:
    """The function that FILE.py:FUNCTION names. Raises ConfigError where it is not there, or the file cannot be run."""
    path, function = reward_file(name), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location("megatron_xy_reward_function", path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file does
        raise ConfigError(f"ppo.reward_function ({name}): {path} fails: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"ppo.reward_function ({name}): {path} has no function {function}; name one that it has")
    scores: RewardFunction = found
    return scores


class FunctionScorer:
    """Scores by a function, which rank 0 calls."""

    def __init__(
        self, function: RewardFunction, *, prompts: PromptFile, tokenizer: Tokenizer, beat: Callable[[str], None]
    ) -> None:
        """beat: takes the phase."""
        self._function, self._prompts, self._tokenizer, self._beat = function, prompts, tokenizer, beat

    def score(self, rollout: Rollout) -> Shipment:
        """`scores` [answers]. Raises DataError where the function fails or gives another number of scores."""
        scores = torch.zeros(len(rollout.responses), device=device.current())
        if dist.get_rank() == 0:
            self._beat("reward.function")
            rows = copy.deepcopy([self._prompts.rows[drawn.row].value for drawn in rollout.drawn])  # the function's own
            texts = [self._tokenizer.decode_answer(response) for response in rollout.responses]
            try:
                answer: Any = self._function([row["prompt"] for row in rows], texts, rows)
                if isinstance(answer, Iterator):  # whose work is still to come
                    answer = list(answer)
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever a user's function does
                last = traceback.extract_tb(error.__traceback__)[-1]
                raise DataError(
                    f"ppo.reward_function failed on a batch of {len(texts)} answers, at {last.filename}:{last.lineno}: "
                    f"{type(error).__name__}: {error}; mend the function and run again"
                ) from error
            scores = torch.tensor(self._numbers(answer, rollout), device=device.current())
        return Shipment({"scores": scores})

    def _numbers(self, answer: Any, rollout: Rollout) -> list[float]:
        """What the function gave, as a finite number an answer. Raises DataError."""
        wanted, name = len(rollout.responses), "ppo.reward_function"
        try:
            given = [float(score) for score in answer]
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{name} gave {str(answer)[:200]} for {wanted} answers ({error}); it must give a number for each"
            ) from error
        if len(given) != wanted:
            raise DataError(f"{name} gave {len(given)} scores for {wanted} answers; it must give one for each")
        for score, drawn in zip(given, rollout.drawn, strict=True):
            if not abs(score) <= torch.finfo(torch.float32).max:  # nor where it is no number
                line = self._prompts.rows[drawn.row].line
                raise DataError(
                    f"{name} gave {score} for an answer to the prompt on line {line} of {self._prompts.path}; it must "
                    f"give finite numbers, in the range of fp32"
                )
        return given
