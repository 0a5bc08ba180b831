"""How long a step takes and what it sends: from a job and a cluster to seconds by part, bytes, MFU.

A micro-batch's time on a stage is that of its matrix products, attention, element-wise kernels and of the tensor
parallel communication that nothing hides; the slowest stage sets the pace of the pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xy.flops import (
    DTYPE_BYTES,
    FORWARD_SHARE,
    flops_per_token,
    recomputed_flops,
    shape_of,
    stage_share,
    step_flops,
)
from megatron_xy.plan.assumptions import Cluster
from megatron_xy.plan.job import Job
from megatron_xy.plan.memory import Held, held_between_steps
from megatron_xy.plan.parameters import stage_layers, telling_stages

# What a layer's element-wise kernels take for a token, forward and backward, as bytes at the rate of a copy: norms,
# residual sums and RoPE by hidden size, SwiGLU by ffn size. From a profile on an H200 and, of the kernels that have
# changed since, their operands (docs/log.md); were each of all read and written once, it would be 44 and 16.
HIDDEN_BYTES, FFN_BYTES = 72, 16
# AdamW reads gradient, weight, moments (16), writes the last three and the bf16 weight; norm, clip.
OPTIMIZER_BYTES = 34


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank of the first stage sends in a step, tensors counted whole."""

    tensor_parallel: int
    pipeline: int
    data_parallel: int


@dataclass(frozen=True)
class StepTime:
    """One step on one bucket; seconds."""

    bucket: int
    matmul: float
    attention: float
    elementwise: float
    tensor_parallel: float
    bubble: float
    pipeline: float
    data_parallel: float
    optimizer: float
    seconds: float
    tokens_per_second: float  # a GPU
    mfu: float
    hfu: float


def traffic(job: Job) -> Traffic:
    """What the schedule, the layers and the optimizer of the first stage's ranks send in a step."""
    parallel, model = job.parallel, job.model
    layers = sum(stage_layers(model, parallel, stage=0)) * job.num_micro_batches
    state = DTYPE_BYTES[model.params_dtype] * (model.hidden_size or 0) * job.micro_batch_tokens
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    held = held_between_steps(job, stage=0)
    gathers, scatters = _layer_collectives(model.recompute_granularity)
    per_layer = gathers + scatters if parallel.sequence_parallel else 2 * (scatters - 1) + 2
    # The embedding scatters, and gathers its gradient; an output layer gathers twice, and scatters once.
    at_ends = 0
    if parallel.sequence_parallel:
        at_ends = 2 + (3 if stages == 1 and model.head == "language_model" else 0)
    passes = 0 if stages == 1 else 2 * parallel.num_chunks - 1
    sent = state // (tp if parallel.sequence_parallel else 1)
    reduced = held.gradients + (held.weights if parallel.use_distributed_optimizer else held.gradients)
    return Traffic(
        tensor_parallel=0 if tp == 1 else (layers * per_layer + at_ends * job.num_micro_batches) * state,
        pipeline=passes * job.num_micro_batches * sent,
        data_parallel=0 if job.dp_size == 1 else reduced,
    )


def step_time(job: Job, cluster: Cluster, *, bucket: int, held: Held | None = None) -> StepTime:
    """A step whose samples are documents of `bucket` tokens, attention over the whole of each.

    held: what a rank of the first stage does, where it is known already.
    """
    parallel, model, gpu = job.parallel, job.model, cluster.gpu
    tp, stages, chunks = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.num_chunks
    batches = job.num_micro_batches
    if not job.is_trained:
        held = None
    elif held is None:
        held = held_between_steps(job, stage=0)
    one = _micro_batch_time(job, cluster, bucket=bucket)
    bubble = one.seconds * (stages - 1) / chunks
    pipeline = _pipeline_seconds(job, cluster)
    data_parallel = optimizer = 0.0
    if held is not None:
        data_parallel = _exposed_data_parallel(job, cluster, held, one=one.seconds)
        owned = held.parameters / (job.dp_size if parallel.use_distributed_optimizer else 1)
        optimizer = owned * OPTIMIZER_BYTES / (gpu.memory_bandwidth * cluster.rates.memory)
    seconds = batches * one.seconds + bubble + pipeline + data_parallel + optimizer
    num_gpus = tp * stages * job.dp_size
    per_second = job.micro_batch_tokens * batches * job.dp_size / seconds / num_gpus
    useful = flops_per_token(model, attention_length=bucket)
    return StepTime(
        bucket=bucket,
        matmul=batches * one.matmul,
        attention=batches * one.attention,
        elementwise=batches * one.elementwise,
        tensor_parallel=batches * one.tensor_parallel,
        bubble=bubble,
        pipeline=pipeline,
        data_parallel=data_parallel,
        optimizer=optimizer,
        seconds=seconds,
        tokens_per_second=per_second,
        mfu=per_second * useful / gpu.peak_flops,
        hfu=per_second * (useful + one.recomputed_flops / job.micro_batch_tokens) / gpu.peak_flops,
    )


@dataclass(frozen=True)
class _MicroBatchTime:
    """Of one micro-batch on the slowest stage, forward and backward; seconds."""

    matmul: float
    attention: float
    elementwise: float
    tensor_parallel: float
    recomputed_flops: float  # of all stages

    @property
    def seconds(self) -> float:
        return self.matmul + self.attention + self.elementwise + self.tensor_parallel


def _micro_batch_time(job: Job, cluster: Cluster, *, bucket: int) -> _MicroBatchTime:
    model, gpu, rates = job.model, cluster.gpu, cluster.rates
    shape = shape_of(model)
    tp, tokens = job.parallel.tensor_model_parallel_size, job.micro_batch_tokens
    share, layers = _slowest_stage(job)
    layer_share = layers / shape.num_layers
    dense = step_flops(model, num_tokens=tokens, sum_squared_lengths=0)
    whole = step_flops(model, num_tokens=tokens, sum_squared_lengths=tokens * bucket)
    again_dense = recomputed_flops(model, num_tokens=tokens, sum_squared_lengths=0)
    again = recomputed_flops(model, num_tokens=tokens, sum_squared_lengths=tokens * bucket)
    gathers, scatters = _layer_collectives(model.recompute_granularity)
    state = DTYPE_BYTES[model.params_dtype] * shape.hidden_size * tokens
    sent = layers * (gathers + scatters) * state * (tp - 1) / tp
    return _MicroBatchTime(
        matmul=(dense * share + again_dense * layer_share) / tp / (gpu.peak_flops * rates.matmul),
        attention=(whole - dense + again - again_dense) * layer_share / tp / (gpu.peak_flops * rates.attention),
        elementwise=_moved_bytes(job, layers=layers) / (gpu.memory_bandwidth * rates.memory),
        tensor_parallel=sent / cluster.link(num_ranks=tp) * rates.exposed_tensor_parallel,
        recomputed_flops=again,
    )


def _slowest_stage(job: Job) -> tuple[float, int]:
    """(its share of the model's dense FLOPs, its layers); the first one of several."""
    last = job.parallel.pipeline_model_parallel_size - 1
    found = []
    for stage in telling_stages(job.model, job.parallel):
        layers = sum(stage_layers(job.model, job.parallel, stage=stage))
        found.append((stage_share(job.model, num_layers=layers, has_head=stage == last), layers))
    return max(found, key=lambda share_and_layers: share_and_layers[0])


def _pipeline_seconds(job: Job, cluster: Cluster) -> float:
    """1F1B waits for what it sends and receives; the interleaved schedule sends while it computes."""
    parallel, model = job.parallel, job.model
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if stages == 1:
        return 0.0
    hidden = shape_of(model).hidden_size / (tp if parallel.sequence_parallel else 1)
    waits = 2 * job.num_micro_batches if parallel.num_chunks == 1 else 2 * (stages - 1)
    link = cluster.link(num_ranks=stages * tp * job.dp_size)
    return waits * DTYPE_BYTES[model.params_dtype] * hidden * job.micro_batch_tokens / link


def _moved_bytes(job: Job, *, layers: int) -> float:
    """By a micro-batch's element-wise kernels in so many layers."""
    shape, tp = shape_of(job.model), job.parallel.tensor_model_parallel_size
    hidden = shape.hidden_size / (tp if job.parallel.sequence_parallel else 1)
    a_token = HIDDEN_BYTES * hidden + FFN_BYTES * shape.ffn_hidden_size / tp
    return layers * job.micro_batch_tokens * a_token


def _layer_collectives(granularity: str) -> tuple[int, int]:
    """All-gathers and reduce-scatters of hidden states in a layer, forward and backward, under sequence parallelism.

    Each of two blocks gathers its input and scatters its output; backward the other way round, and the inputs are
    gathered once more for the weights' gradients.
    """
    again = {"none": (0, 0), "selective": (1, 1), "full": (2, 2)}[granularity]
    return 6 + again[0], 4 + again[1]


def _exposed_data_parallel(job: Job, cluster: Cluster, held: Held, *, one: float) -> float:
    """What is left of reducing gradients and gathering weights beside the last backward and the first forward pass."""
    if job.dp_size == 1:
        return 0.0
    parallel = job.parallel
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    link = cluster.link(num_ranks=tp * stages * job.dp_size)
    ring = (job.dp_size - 1) / job.dp_size
    reduce = held.gradients * ring / link
    if not parallel.use_distributed_optimizer:
        reduce, gather = 2 * reduce, 0.0
    else:
        gather = held.weights * ring / link
    if parallel.overlap_grad_reduce:
        reduce = max(
            reduce - one * (1 - FORWARD_SHARE), reduce / max(1, sum(stage_layers(job.model, parallel, stage=0)))
        )
    if parallel.overlap_param_gather:
        gather = max(0.0, gather - one * FORWARD_SHARE)
    return reduce + gather
