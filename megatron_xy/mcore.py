"""The only importer of megatron.core: what the framework uses of it, the same under every accepted version.

Imported after `device.start`: on a CPU, megatron.core copies names of torch.cuda that the stand-in must have replaced.
megatron-core 0.16.1 to 0.19.x give these names the same signatures as far as they are used here.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from typing import Any

import torch

from megatron_xy import device

assert device.is_settled(), "device.start() comes before megatron_xy.mcore is imported"

warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", module=r"torch\.distributed.*")
warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*megatron.core")  # of files that are compiled now
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a toolkit without a GPU is no news here

from megatron.core import optimizer as _optimizer  # noqa: E402
from megatron.core import parallel_state as _parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import layers as _layers  # noqa: E402
from megatron.core.tensor_parallel import random as tensor_parallel_random  # noqa: E402
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.attention import SelfAttention  # noqa: E402
from megatron.core.transformer.enums import LayerType  # noqa: E402
from megatron.core.transformer.mlp import MLP  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402

device.adapt_megatron_random(tensor_parallel_random)

# torch's AdamW everywhere, also where TE or apex is installed: theirs keep the step elsewhere, and a checkpoint written
# with one optimizer must go on with the other.
_optimizer.USING_PYTORCH_OPTIMIZER = True


class _WeightGradients:
    """What megatron-core looks for in apex: weight gradients that are added up as they are multiplied, in fp32."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
        """total [out, in] fp32 becomes total + grad^T inputs, of [tokens, out] and [tokens, in] in fp32 or bf16."""
        if inputs.dtype == total.dtype:
            total.addmm_(grad.t(), inputs)
        elif inputs.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8 and newer, of CUDA alone
            torch.addmm(total, grad.t(), inputs, out_dtype=total.dtype, out=total)
        else:
            total.add_(grad.t() @ inputs)


_layers.fused_weight_gradient_mlp_cuda = _WeightGradients
_layers._grad_accum_fusion_available = True

VERSION = importlib.metadata.version("megatron-core")


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """The gradients that count in the norm on this rank, replicas left out; the method's name differs by version."""
    name = "get_grads_for_grad_norm"  # newer than 0.16
    gradients = getattr(optimizer, name if hasattr(optimizer, name) else "get_main_grads_for_grad_norm")
    return list(gradients())


# The one bit of global state that sequence parallel needs: a scratch buffer, keyed by name and dtype, which all roles
# share.
if getattr(_parallel_state, "_GLOBAL_MEMORY_BUFFER", None) is None:
    _parallel_state._set_global_memory_buffer()

__all__ = [
    "MLP",
    "VERSION",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "GPTModel",
    "LayerType",
    "MegatronModule",
    "ModelType",
    "OptimizerConfig",
    "P2PCommunicator",
    "PackedSeqParams",
    "PipelineParallelLayerLayout",
    "ProcessGroupCollection",
    "SelfAttention",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "clip_grad_by_total_norm_fp32",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec",
    "get_megatron_optimizer",
    "gradients_for_norm",
    "tensor_parallel_random",
]
