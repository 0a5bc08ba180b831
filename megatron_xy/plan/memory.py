"""What one rank of a job holds, in bytes: weights, gradients, optimizer, and activations at the peak of a step.

From a checked config with complete shapes to `RoleMemory`, without torch. It follows what the code allocates tensor by
tensor (model/, losses.py, megatron-core's layers and schedules) as a GPU's fused kernels do; what an allocator, CUDA
and NCCL take besides is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_xy.flops import DTYPE_BYTES, shape_of
from megatron_xy.plan.job import Answers, Job
from megatron_xy.plan.parameters import chunk_buffers, chunk_parameters, stage_layers
from megatron_xy.stages import padded_vocab_size

FP32 = DTYPE_BYTES["fp32"]
# Of a micro-batch on the device: tokens, labels, positions, sources as 64-bit integers, the loss mask in fp32.
BATCH_BYTES_A_TOKEN = 4 * 8 + 4
LOGPROBS_CHUNK_TOKENS = 1024  # of PPO's log-probabilities, which work on so many tokens' logits at a time
# fp32 tensors of a chunk's logits that live at once in their forward and backward pass, beside those of the one before.
LOGPROBS_FORWARD, LOGPROBS_BACKWARD = 3, 5
EXPERIENCE_TENSORS = 9  # fp32 numbers for each response token of a PPO step, on every rank
RECOMPUTATIONS = ("none", "selective", "full")
MAX_SEQUENCES = 64  # of a replica that generate at a time


class Held(NamedTuple):
    """What a rank holds between two steps; sizes in bytes."""

    parameters: int  # elements
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class RoleMemory:
    """One role on one rank; sizes in bytes."""

    role: str
    stage: int
    num_layers: int
    parameters: int  # elements
    weights: int
    gradients: int
    optimizer: int  # main weights in fp32 and both moments
    in_flight: float  # micro-batches whose activations a layer holds at the peak, on average over the stage's layers
    kept: int  # activations that wait for their backward passes, at the peak
    working: int  # besides, of the forward or backward pass of one layer or of the head
    buffers: int  # gathered hidden states, the step's batches and numbers
    cache: int  # keys and values of a PPO step's generation, at their most; nothing else of a step is there then

    @property
    def static(self) -> int:
        """What a rank holds between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def activations(self) -> int:
        """At the peak of a step, all that is not static."""
        return max(self.kept + self.working, self.cache) + self.buffers

    @property
    def total(self) -> int:
        """At the peak of a step."""
        return self.static + self.activations


def stage_memory(job: Job, *, stage: int, replica: int = 0, held: Held | None = None) -> RoleMemory:
    """What a rank of this stage and replica holds; tensor parallel ranks hold the same.

    A micro-batch has `micro_batch_tokens` tokens whatever its bucket: the figures are the same for all buckets.
    held: what `held_between_steps` counts, where it is known already: recomputation does not change it.
    """
    parallel = job.parallel
    held = held or held_between_steps(job, stage=stage, replica=replica)
    layers = stage_layers(job.model, parallel, stage=stage)
    sizes = _Sizes(job)
    passes = _passes_in_flight(job, stage=stage)
    layers_in_flight = sum(layers[chunk] for chunk in passes)
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    kept = layers_in_flight * sizes.kept_by_layer + len(passes) * sizes.kept_by_pass
    numbers = 0
    if job.answers is not None:
        ppo = job.answers.ppo
        numbers = EXPERIENCE_TENSORS * FP32 * ppo.rollout_batch_size * ppo.max_response_length
    return RoleMemory(
        role=job.role,
        stage=stage,
        num_layers=sum(layers),
        **held._asdict(),
        in_flight=layers_in_flight / sum(layers),
        kept=kept,
        working=sizes.working(is_last=is_last),
        buffers=sizes.gathered + BATCH_BYTES_A_TOKEN * job.micro_batch_tokens * job.num_micro_batches + numbers,
        cache=_cache_bytes(job, answers=job.answers, num_layers=sum(layers)) if job.answers else 0,
    )


def held_between_steps(job: Job, *, stage: int, replica: int = 0) -> Held:
    """Buffers and optimizer of a rank of this stage and replica."""
    parallel = job.parallel
    weights = gradients = optimizer = elements = 0
    for chunk in range(parallel.num_chunks):
        parameters = chunk_parameters(job.model, parallel, stage=stage, chunk=chunk)
        elements += sum(parameter.num_elements for parameter in parameters)
        weights += sum(parameter.num_elements * parameter.num_bytes for parameter in parameters)
        if not job.is_trained:
            continue
        buffers = chunk_buffers(parameters, parallel=parallel, stage=stage, chunk=chunk, dp_size=job.dp_size)
        if parallel.use_distributed_optimizer:
            weights += sum(buffer.num_elements * buffer.num_bytes for buffer in buffers)
            weights -= sum(parameter.num_elements * parameter.num_bytes for parameter in parameters)
        gradients += sum(buffer.num_elements * FP32 for buffer in buffers)
        for buffer in buffers:
            optimizer += _main_and_moments(buffer.num_bytes) * buffer.owned_by_replica[replica]
    return Held(elements, weights, gradients, optimizer)


def copied_bytes(job: Job, *, stage: int) -> list[int]:
    """What a rank of this stage writes of a checkpoint, and keeps a copy of in its host's memory; by replica.

    At most: tensor parallel ranks but the first leave out what is not split, the last stage a tied embedding, and all
    of them the vocabulary's padding.
    """
    copied = [0] * job.dp_size
    if not job.is_trained:
        return copied
    parallel = job.parallel
    for chunk in range(parallel.num_chunks):
        parameters = chunk_parameters(job.model, parallel, stage=stage, chunk=chunk)
        if not parallel.use_distributed_optimizer:  # each to the replica that has least so far: checkpoint/state.py
            for parameter in parameters:
                size = parameter.num_elements * (parameter.num_bytes + _main_and_moments(parameter.num_bytes))
                copied[copied.index(min(copied))] += size
            continue
        for buffer in chunk_buffers(parameters, parallel=parallel, stage=stage, chunk=chunk, dp_size=job.dp_size):
            for replica, num_elements in enumerate(buffer.owned_by_replica):
                copied[replica] += num_elements * (buffer.num_bytes + _main_and_moments(buffer.num_bytes))
    return copied


def _main_and_moments(width: int) -> int:
    """Bytes of an element's, whose weight has `width`; fp32 weights are their own main weights."""
    return (3 if width < FP32 else 2) * FP32


def _cache_bytes(job: Job, *, answers: Answers, num_layers: int) -> int:
    """Generation has a group of sequences a stage and a cache a chunk; one that grows stands beside what it was."""
    if not answers.are_generated_here:
        return 0
    model, stages = job.model, job.parallel.pipeline_model_parallel_size
    sequences = min(MAX_SEQUENCES, -(-answers.ppo.rollout_batch_size // job.dp_size))
    rows = -(-sequences // stages)
    groups = (model.num_query_groups or model.num_attention_heads or 0) // job.parallel.tensor_model_parallel_size
    a_token = 2 * DTYPE_BYTES[model.params_dtype] * groups * model.head_dim * num_layers
    now, before = answers.cache_lengths
    return rows * a_token * (stages * now + before // job.parallel.num_chunks)


def _passes_in_flight(job: Job, *, stage: int) -> list[int]:
    """The chunk of each forward pass whose backward pass is still to come, when most are; 1F1B or interleaved."""
    stages, chunks = job.parallel.pipeline_model_parallel_size, job.parallel.num_chunks
    if not job.is_trained:
        return []
    total = job.num_micro_batches * chunks
    warm_up = stages - stage - 1
    if chunks > 1:  # megatron-core's schedules.py: rounds of as many micro-batches as there are stages
        warm_up = 2 * warm_up + (chunks - 1) * stages
    return [number // stages % chunks if chunks > 1 else 0 for number in range(min(warm_up + 1, total))]


class _Sizes:
    """Bytes of one micro-batch on one rank. Hidden states are split over tensor parallel ranks by sequence parallelism,
    everything inside a block always."""

    def __init__(self, job: Job) -> None:
        model, parallel = job.model, job.parallel
        self.job, self.model, self.shape = job, model, shape_of(model)
        self.tp = parallel.tensor_model_parallel_size
        self.is_sequence_parallel = parallel.sequence_parallel and self.tp > 1
        self.tokens = job.micro_batch_tokens
        self.rows = self.tokens // self.tp if self.is_sequence_parallel else self.tokens
        self.width = DTYPE_BYTES[model.params_dtype]
        self.hidden_size, self.ffn_size = self.shape.hidden_size, self.shape.ffn_hidden_size
        self.hidden = self.width * self.hidden_size * self.rows  # one hidden state
        self.whole_hidden = self.width * self.hidden_size * self.tokens  # gathered
        self.ffn = self.width * self.ffn_size * self.tokens // self.tp

    @cached_property
    def attention(self) -> int:
        """Kept inside an attention block: rotated queries and keys, values, the output, and the logarithm of each row's
        sum."""
        heads = self.shape.num_attention_heads
        return self.projected + (self.width * self.shape.head_dim + FP32) * heads * self.tokens // self.tp

    @cached_property
    def projected(self) -> int:
        """Queries, keys and values."""
        heads = self.shape.num_attention_heads + 2 * self.shape.num_query_groups
        return self.width * heads * self.shape.head_dim * self.tokens // self.tp

    @cached_property
    def mlp(self) -> int:
        """Kept inside an MLP: gate and up projection, and their product."""
        return 3 * self.ffn

    @cached_property
    def whole_layer(self) -> int:
        """What a layer's forward pass makes that its backward pass needs: beside the blocks, input, output and scale
        of both norms."""
        return 2 * (2 * self.hidden + FP32 * self.rows) + self.attention + self.mlp

    @cached_property
    def recomputed(self) -> int:
        """What of it the backward pass makes anew."""
        granularity = self.model.recompute_granularity
        return {"none": 0, "selective": self.mlp, "full": self.whole_layer - self.hidden}[granularity]

    @property
    def kept_by_layer(self) -> int:
        """Until its backward pass."""
        return self.whole_layer - self.recomputed

    @property
    def kept_by_pass(self) -> int:
        """By a chunk's forward pass: cos and sin of all positions in fp32, which its layers share."""
        return 0 if self.model.recompute_granularity == "full" else self._positions

    @property
    def _positions(self) -> int:
        return FP32 * self.shape.head_dim * self.tokens

    @property
    def kept_by_head(self) -> int:
        """The final norm's input, output and scale; a value head's copy of the output in fp32."""
        value_head = FP32 * self.hidden_size * self.rows if self.model.head == "value" else 0
        return 2 * self.hidden + FP32 * self.rows + value_head

    @property
    def gathered(self) -> int:
        """megatron-core's one buffer for the hidden states of all tensor parallel ranks; frozen weights have none."""
        return self.whole_hidden if self.is_sequence_parallel and self.job.is_trained else 0

    def working(self, *, is_last: bool) -> int:
        """The most that a layer's backward pass, or the head's passes, hold beside what is kept."""
        passing = 2 * self.hidden  # received and sent
        if not self.job.is_trained:
            gathered = self.whole_hidden if self.is_sequence_parallel else 0
            # What was projected and what came of it; the last two: fc1's input and output, and fc2's.
            attending = self.projected + self.attention
            widest = max(attending, self.mlp, gathered + 2 * self.ffn, self.ffn + self.whole_hidden)
            # Its input, residual sum and norm besides, what was received, and what goes on to the next stage.
            layer = (4 if is_last else 5) * self.hidden + self._positions + widest
            received = self.hidden if self.job.parallel.pipeline_model_parallel_size > 1 else 0
            return max(layer, received + self._head_forward if is_last else 0)
        weights = self.width * self.hidden_size * self.ffn_size // self.tp
        down = self.whole_hidden + self.ffn + weights  # gradients of fc2's output, input and weight
        product = 2 * self.ffn  # of gate and up beside that of their product, which is gone itself
        up = -self.ffn + self.whole_hidden + 2 * weights  # of fc1's input and weight; gate and up are gone
        layer = self.recomputed + self.hidden + max(down, product, up)
        return passing + max(layer, self.kept_by_head + self._head if is_last else 0)

    @cached_property
    def _scored(self) -> int:
        """Tokens of a micro-batch that have log-probabilities: those of responses."""
        answers = self.job.answers
        return self.tokens * answers.ppo.max_response_length // answers.length if answers else self.tokens

    @property
    def _logprobs_forward(self) -> int:
        """From logits: those of responses anew, and what a chunk makes of them, beside what the one before has left."""
        left = self._scored > LOGPROBS_CHUNK_TOKENS and self.width < FP32  # else there is no copy in fp32
        return self._scored_logits + (LOGPROBS_FORWARD + left) * self._chunk

    @property
    def _logprobs_backward(self) -> int:
        """To the gradients of the responses' logits."""
        left = self._scored > LOGPROBS_CHUNK_TOKENS
        return 2 * self._scored_logits + (LOGPROBS_BACKWARD + left) * self._chunk

    @property
    def _scored_logits(self) -> int:
        return self.width * self._vocabulary * self._scored

    @property
    def _chunk(self) -> int:
        return FP32 * self._vocabulary * min(self._scored, LOGPROBS_CHUNK_TOKENS)

    @property
    def _vocabulary(self) -> int:
        return padded_vocab_size(self.shape.vocab_size, tensor_model_parallel_size=self.tp) // self.tp

    @property
    def _head_forward(self) -> int:
        if self.model.head == "value":
            return FP32 * self.hidden_size * self.rows
        return self.width * self._vocabulary * self.tokens + self._logprobs_forward

    @property
    def _head(self) -> int:
        """Logits and what the loss makes of them; a value head's gradients."""
        if self.model.head == "value":
            return FP32 * self.hidden_size * self.rows + self.hidden
        logits = self.width * self._vocabulary * self.tokens
        output_layer = logits + self.whole_hidden + self.width * self._vocabulary * self.hidden_size
        if self.job.has_logprobs:
            # At last the gradient of all logits, twice: of the whole tensor and of its one sample.
            return max(self._head_forward, self._logprobs_backward, 2 * logits, output_layer)
        return max(2 * logits, output_layer)  # with their gradient; the loss's kernels keep nothing else
