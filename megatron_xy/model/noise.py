"""Noise for sampling that is a pure function of (seed, epoch, prompt's row, answer's index, position, token id).

Whoever holds a part of the vocabulary computes that part's noise, and every layout, batch and order draws the same.
The keys are made on the host in 64 bits, the noise of each token id from them on the device, in 32-bit arithmetic that
wraps around.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
# Wellons' lowbias32, with the second key between its rounds.
_FIRST_FACTOR, _SECOND_FACTOR = 0x7FEB352D, 0x846CA68B - 2**32


def sequence_key(*parts: int) -> int:
    """A 64-bit key of whole numbers, in their order."""
    key = 0
    for part in parts:
        key = _mixed_integer((key ^ (part & _MASK)) + _GOLDEN & _MASK)
    return key


def position_keys(keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """For each answer (its `sequence_key`) and position, two 32-bit keys: [answers, 2]."""
    mixed = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    pairs: NDArray[np.int32] = (mixed ^ (mixed >> np.uint64(31))).view(np.int32).reshape(-1, 2)
    return pairs


def hashed_ids(first: int, last: int, *, device: torch.device) -> torch.Tensor:
    """What `exponential_noise` wants of the token ids first..last-1: int32 [ids]."""
    ids = torch.arange(first + 1, last + 1, dtype=torch.int32, device=device)
    ids ^= (ids >> 16) & 0xFFFF
    ids *= _FIRST_FACTOR
    ids ^= (ids >> 15) & 0x1FFFF
    ids *= _SECOND_FACTOR
    return ids ^ ((ids >> 16) & 0xFFFF)


def exponential_noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Independent draws from the exponential distribution of mean 1, above 0: fp32 [answers, ids].

    keys int32 [answers, 2], ids from `hashed_ids`. The token with the largest probability / noise is a sample.
    """
    bits = ids ^ keys[:, :1]
    bits *= _FIRST_FACTOR
    bits ^= (bits >> 15) & 0x1FFFF
    bits += keys[:, 1:]
    bits *= _SECOND_FACTOR
    bits ^= (bits >> 16) & 0xFFFF
    bits &= 0x7FFFFFFF
    # In (0, 1), with all digits where it is small: there lie the tokens that win against their probability.
    uniform = bits.float().mul_(-(2.0**-31)).sub_(2.0**-33).clamp_(min=-1 + 2.0**-24)
    return uniform.log1p_().neg_()


def _mixed_integer(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
