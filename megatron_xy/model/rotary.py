"""Rotary position embedding by explicit position ids, so that positions may restart at document borders.

The position ids of a micro-batch travel in `PackedDocuments` to every layer's attention, which rotates queries and keys
by the angles from here. Angles, cos and sin are fp32 under every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_xy import device, mcore
from megatron_xy.config import ModelConfig


@dataclass
class PackedDocuments(mcore.PackedSeqParams):  # type: ignore[misc]
    """One micro-batch as the layers see it: a row of tokens and where attention is cut.

    position_ids [tokens] int64; cu_seqlens_q and cu_seqlens_kv [segments + 1] int32 (the borders); segment_lengths: the
    same as plain ints. qkv_format is sbhd: queries stay [tokens, 1, heads, head_dim], the cut is the attention's own.
    """

    position_ids: torch.Tensor | None = None
    segment_lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: Sequence[int], *, position_ids: torch.Tensor | None = None) -> PackedDocuments:
        """Segments of these lengths, one after another, on this process's device."""
        borders = device.moved_here(np.cumsum([0, *lengths], dtype=np.int32))
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            position_ids=position_ids,
            segment_lengths=tuple(lengths),
        )


class RotaryAngles:
    """cos and sin of a micro-batch's positions, with HF's scalings `linear` and `llama3`; one for all layers.

    Those of the micro-batch asked for last are kept: its layers share them, and no more than one micro-batch's are held
    beside what the backward passes still need.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.inverse_frequencies = inverse_frequencies(model).to(device.current())
        self._positions: torch.Tensor | None = None
        self._cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, packed: PackedDocuments) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [tokens, 1, 1, head_dim / 2] fp32."""
        assert packed.position_ids is not None, "every forward step gives position ids"
        if self._cos_sin is None or self._positions is not packed.position_ids:
            angles = torch.outer(packed.position_ids.float(), self.inverse_frequencies)[:, None, None, :]
            self._positions, self._cos_sin = packed.position_ids, (angles.cos(), angles.sin())
        return self._cos_sin


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """1 / theta^(2i/d), scaled as `rope_scaling` says; [head_dim / 2] fp32."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.int64).float() / model.head_dim
    frequencies = 1.0 / (model.rotary_base**exponents)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        factor: float = scaling["factor"]
        return frequencies / factor
    assert kind == "llama3", "the config refuses every other kind"
    return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths divided by the factor, short ones kept, a smooth ramp between."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    ramp = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    smoothed = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(between, smoothed, scaled)
