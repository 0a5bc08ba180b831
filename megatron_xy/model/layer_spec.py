"""Which layers a model is built of: megatron-core's own linear layers or Transformer Engine's, chosen once a process.

`auto` takes Transformer Engine for bf16 where it is installed and works on a GPU, and torch everywhere else. In both,
attention, RoPE and SwiGLU are ours, and parameters carry the same global names, so that a checkpoint is free of the
choice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from megatron_xy import device, mcore
from megatron_xy.compiling import compiler
from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError
from megatron_xy.model.attention import PackedAttention, SelfAttention
from megatron_xy.model.attention_backends import Choice, choose_backend
from megatron_xy.model.kernels import swiglu
from megatron_xy.model.norm import RMSNorm
from megatron_xy.model.rotary import RotaryAngles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Transformer Engine keeps a norm's weight in the linear layer that follows it.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
COLUMN_PARALLEL = ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")
ROW_PARALLEL = ("linear_proj", "linear_fc2")


@dataclass(frozen=True)
class LayerChoice:
    """What a model's layers are made of here, and why."""

    layer_spec: str  # torch | transformer_engine
    reason: str
    attention: Choice

    def __str__(self) -> str:
        ours = "RMSNorm, SwiGLU, RoPE and loss"
        fused = f"compiled {ours}" if compiler().works else f"{ours} as torch has them"
        return f"layers: {self.layer_spec} ({self.reason}); attention: {self.attention.name}; {fused}"


def choose_layers(model: ModelConfig) -> LayerChoice:
    """The layers for this model on this device. Raises ConfigError where Transformer Engine is asked for in vain."""
    obstacle = _obstacle_of_transformer_engine() if model.layer_spec != "torch" else None
    if model.layer_spec == "transformer_engine" and obstacle is not None:
        raise ConfigError(
            f"model.layer_spec (transformer_engine): {obstacle}; install transformer-engine[pytorch] on a machine with "
            f"a GPU, or set layer_spec to auto or torch"
        )
    if model.layer_spec == "torch":
        name, reason = "torch", "as configured"
    elif obstacle is not None:
        name, reason = "torch", obstacle
    elif model.layer_spec == "auto" and model.params_dtype == "fp32":  # its cuBLAS calls, read in its source
        name, reason = "torch", "transformer_engine multiplies fp32 in TF32, with 10 bits of mantissa"
    else:
        name, reason = "transformer_engine", "installed, and works on this GPU"
    attention = choose_backend(
        DTYPES[model.params_dtype],
        model.head_dim,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return LayerChoice(name, reason, attention)


def layer_submodules(choice: LayerChoice) -> Any:
    """megatron-core's ModuleSpec of one transformer layer."""
    if choice.layer_spec == "transformer_engine":
        layer = mcore.get_gpt_layer_with_transformer_engine_spec()
    else:
        layer = mcore.get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.module = SelfAttention
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    return layer


def connect_layers(gpt: torch.nn.Module, *, model: ModelConfig, choice: LayerChoice) -> None:
    """Gives a built model's layers what is ours: attention its angles and backend, the MLP its activation.

    The MLP calls its activation with what fc1 gave because the config says `use_te_activation_func`.
    """
    angles = RotaryAngles(model)
    for module in gpt.modules():
        if isinstance(module, PackedAttention):
            module.connect(angles=angles, attend=choice.attention.attend)
        elif isinstance(module, mcore.MLP):
            module.activation_func = swiglu


def spec_free_name(name: str) -> str:
    """A parameter's name under either spec -> its name in checkpoints, which is the torch spec's."""
    for fused, plain in FUSED_NORMS.items():
        if name == fused or name.endswith(f".{fused}"):
            return name.removesuffix(fused) + plain
    return name


def split_dimension(module_name: str) -> int | None:
    """The dimension along which tensor parallelism splits the weight of a linear layer or embedding of this name."""
    last = module_name.rpartition(".")[2]
    if last in COLUMN_PARALLEL:
        return 0
    return 1 if last in ROW_PARALLEL else None


@functools.cache
def _obstacle_of_transformer_engine() -> str | None:
    """What keeps Transformer Engine from being used; None if a layer of it works on this GPU."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    if device.is_cpu():
        return "transformer_engine needs a GPU, and there is none"
    try:
        engine: Any = importlib.import_module("transformer_engine.pytorch")
        layer = engine.LayerNormLinear(
            128, 128, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16, device=device.current()
        )
        values = torch.ones(16, 128, dtype=torch.bfloat16, device=device.current(), requires_grad=True)
        layer(values).sum().backward()
        device.synchronize()
    except Exception as error:  # a wheel for another CUDA, a missing library: said, and torch is taken
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"transformer_engine does not work here: {lines[0]}"
    return None
