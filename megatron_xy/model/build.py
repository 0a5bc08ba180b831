"""ModelConfig and groups -> GPTModel in megatron-core's data-parallel wrapper, its parameters under global names.

The vocabulary is padded to what tensor parallelism divides; padding rows are zero, take no part in the loss and leave
no trace in checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_xy import device, mcore
from megatron_xy.config import ModelConfig, ParallelConfig
from megatron_xy.model.heads import ValueHead
from megatron_xy.model.layer_spec import (
    DTYPES,
    choose_layers,
    connect_layers,
    layer_submodules,
    spec_free_name,
    split_dimension,
)
from megatron_xy.model.norm import RMSNorm
from megatron_xy.parallel import Groups
from megatron_xy.stages import layers_per_chunk, padded_vocab_size
from megatron_xy.tensors.names import EMBEDDING, OUTPUT_LAYER, VALUE_HEAD
from megatron_xy.tensors.shards import ParameterShard, split_shard, whole


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of this rank and the place that it takes in the global tensor of that name."""

    name: str
    parameter: torch.nn.Parameter
    shard: ParameterShard


def build_model(
    model: ModelConfig, *, parallel: ParallelConfig, groups: Groups, is_frozen: bool = False
) -> list[torch.nn.Module]:
    """This rank's chunks of the model, each in megatron-core's DistributedDataParallel; all weights are still 0.

    One chunk, or `virtual_pipeline_model_parallel_size` of them. is_frozen: no gradients are wanted, and none are held.
    """
    config = transformer_config(model, parallel=parallel, groups=groups)
    ddp_config = mcore.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        # It would end one rank alone; non-finite gradients are met in the optimizer step, on all ranks alike.
        check_for_nan_in_grad=False,
    )
    chunks: list[torch.nn.Module] = []
    for chunk in range(parallel.num_chunks):
        gpt = _gpt_model(config, model=model, groups=groups, chunk=chunk, num_chunks=parallel.num_chunks)
        mark_tensor_parallel(gpt)
        if is_frozen:  # else their buffers take 4 bytes a parameter
            gpt.requires_grad_(False)
        wrapped = mcore.DistributedDataParallel(
            config,
            ddp_config,
            gpt,
            # The later chunks' gradients are reduced while the first one still computes: no need for small buckets.
            disable_bucketing=chunk > 0,
            pg_collection=groups.collection,
        )
        for parameter in wrapped.parameters():  # what fills them leaves the padding as it is
            parameter.data.zero_()
        chunks.append(wrapped)
    if parallel.overlap_grad_reduce:  # micro-batches before the last one only add up
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return chunks


def transformer_config(model: ModelConfig, *, parallel: ParallelConfig, groups: Groups) -> mcore.TransformerConfig:
    """megatron-core's description of a Llama-shaped transformer under this role's layout."""
    dtype = DTYPES[model.params_dtype]
    num_chunks = parallel.num_chunks
    recompute: dict[str, Any] = {}
    if model.recompute_granularity == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute_granularity == "selective":
        # The MLP keeps over half of what a layer keeps. Core attention, megatron-core's default here, would free next
        # to nothing: flash kernels keep no scores.
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return mcore.TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the MLP calls the activation that it is given: ours
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        pipeline_model_parallel_layout=_StageLayout(model, groups, num_chunks) if groups.pp_size > 1 else None,
        # Both directions to the same peer at once change places silently over gloo, which matches in order.
        overlap_p2p_comm=num_chunks > 1,
        batch_p2p_comm=num_chunks == 1,
        sequence_parallel=parallel.sequence_parallel and groups.tp_size > 1,
        calculate_per_token_loss=True,
        # Weights are drawn, or come from a checkpoint.
        perform_initialization=False,
        use_cpu_initialization=device.is_cpu(),
        # A GPU adds up the embedding's gradient in any order, else; a CPU has one order.
        deterministic_mode=torch.are_deterministic_algorithms_enabled() and not device.is_cpu(),
        gradient_accumulation_fusion=True,  # by torch itself: see mcore.py
        # The fused kernels want CUDA extensions that are not required here.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        # An interleaved schedule frees an output while it is being sent: a stream's order makes that safe on a GPU;
        # gloo would send what the memory holds by then.
        deallocate_pipeline_outputs=num_chunks == 1 or not device.is_cpu(),
        **recompute,
    )


class _StageLayout(mcore.PipelineParallelLayerLayout):  # type: ignore[misc]
    """Which layers a chunk of this rank's stage holds. megatron-core's own would ask a global for the stage."""

    def __init__(self, model: ModelConfig, groups: Groups, num_chunks: int) -> None:
        assert model.num_layers, "the shape is complete once a run starts"
        layers = layers_per_chunk(model.num_layers, num_chunks=groups.pp_size * num_chunks)
        rows = [[mcore.LayerType.decoder] * number for number in layers]
        rows[0].insert(0, mcore.LayerType.embedding)
        rows[-1].append(mcore.LayerType.loss)
        super().__init__(rows, groups.pp_size)
        self.layers, self.pp_size, self.pp_rank = layers, groups.pp_size, groups.pp_rank

    def get_num_layers_to_build(
        self, layer_type: Any = None, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Layers of chunk `vp_stage`."""
        return self.layers[(vp_stage or 0) * self.pp_size + self.pp_rank]

    def get_layer_offset(self, layer_type: Any = None, vp_stage: int | None = None, pp_rank: int | None = None) -> int:
        """Layers before chunk `vp_stage`."""
        return sum(self.layers[: (vp_stage or 0) * self.pp_size + self.pp_rank])


def _gpt_model(
    config: mcore.TransformerConfig, *, model: ModelConfig, groups: Groups, chunk: int, num_chunks: int
) -> mcore.GPTModel:
    choice = choose_layers(model)
    layer = layer_submodules(choice)
    assert model.num_layers and model.vocab_size, "the shape is complete once a run starts"
    layers = layers_per_chunk(model.num_layers, num_chunks=groups.pp_size * num_chunks)
    num_layers = layers[chunk * groups.pp_size + groups.pp_rank]
    block = mcore.TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
    gpt = mcore.GPTModel(
        config,
        block,
        vocab_size=padded_vocab_size(model.vocab_size, tensor_model_parallel_size=groups.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=groups.is_first_stage and chunk == 0,
        post_process=groups.is_last_stage and chunk == num_chunks - 1,
        share_embeddings_and_output_weights=model.has_tied_output_layer,
        position_embedding_type="none",  # the attention rotates
        pg_collection=groups.collection,
        vp_stage=chunk if num_chunks > 1 else None,
    )
    if gpt.post_process and model.head == "value":
        gpt.output_layer = ValueHead(config, tp_group=groups.collection.tp)
    gpt.model_type = mcore.ModelType.encoder_or_decoder
    connect_layers(gpt, model=model, choice=choice)
    return gpt


def mark_tensor_parallel(gpt: torch.nn.Module) -> None:
    """Sets the attributes by which megatron-core tells split weights from replicas, for instance in the gradient norm.

    Its own initialisation does it, which `perform_initialization=False` skips in some versions.
    """
    for name, module in gpt.named_modules():
        if isinstance(module, ValueHead):
            continue
        dimension, weight = split_dimension(name), getattr(module, "weight", None)
        bias = getattr(module, "bias", None)
        if dimension == 0 and isinstance(bias, torch.nn.Parameter):
            bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1  # type: ignore[attr-defined]
        if dimension is not None and isinstance(weight, torch.nn.Parameter):  # a tied output layer has none of its own
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = dimension  # type: ignore[attr-defined]
            # Gate and up projection stand one after the other in every shard of fc1.
            weight.partition_stride = 2 if name.endswith("linear_fc1") else 1  # type: ignore[attr-defined]


def named_parameters(module: torch.nn.Module, *, model: ModelConfig, groups: Groups) -> Iterator[NamedParameter]:
    """Every parameter of this rank under its global name, with the boxes that it covers there.

    A tied output layer on the last stage is the embedding under its name; where one stage has both, it stands once.
    """
    gpt = _unwrap(module)
    for local_name, parameter in gpt.named_parameters():
        name = _global_name(local_name, gpt)
        if name == OUTPUT_LAYER:
            name = VALUE_HEAD if model.head == "value" else EMBEDDING if model.has_tied_output_layer else name
        yield NamedParameter(name, parameter, _shard_of(name, parameter, model=model, groups=groups))


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module


def _global_name(local_name: str, gpt: torch.nn.Module) -> str:
    """The name under the torch spec, with the layer's number in the whole model instead of that in the stage."""
    local_name = spec_free_name(local_name)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", local_name)
    if not match:
        return local_name
    decoder: Any = gpt.decoder
    return f"decoder.layers.{decoder.layers[int(match[1])].layer_number - 1}.{match[2]}"


def _shard_of(name: str, parameter: torch.nn.Parameter, *, model: ModelConfig, groups: Groups) -> ParameterShard:
    """Which boxes of the global tensor `name` this rank's parameter holds, one after the other along dimension 0."""
    shape = list(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole(tuple(shape))
    dimension: int = parameter.partition_dim  # type: ignore[attr-defined]
    num_parts: int = parameter.partition_stride  # type: ignore[attr-defined]
    size = shape[dimension] // num_parts
    shape[dimension] *= groups.tp_size
    if name in (EMBEDDING, OUTPUT_LAYER):  # the padding belongs to no global tensor
        assert model.vocab_size, "the shape is complete once a run starts"
        shape[0] = model.vocab_size
    return split_shard(
        tuple(shape), dimension, size=size, place=groups.tp_rank, num_places=groups.tp_size, num_parts=num_parts
    )
