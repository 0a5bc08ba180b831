"""Every key of a run's config, section by section: its type, its default, its unit, and the range of its value.

What keys must hold together is said in `rules`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_serializer, field_validator

from megatron_xy.config.fields import FilePath, Section, Weight, possible_path


def _folder_of_weights(value: str) -> str:
    if not re.fullmatch(r"(ckpt|hf):[^\0]+", value):
        raise ValueError("must be ckpt:DIR or hf:DIR")
    possible_path(value.partition(":")[2])
    return value


TemplateOrFile = Annotated[str, Field(min_length=1), AfterValidator(possible_path)]
MIN_TEMPERATURE = 1e-4  # below, logits over it leave the range of fp32
LARGEST_CLIP = 1e6  # bounds nothing; above fp32's range torch takes none
MOST_THREADS = 1024  # of a rank; OpenMP ends the process where it gets no more

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
Head = Literal["language_model", "value"]
RoleName = Literal["actor", "critic", "reference", "reward"]


class ModelConfig(Section):
    """Shape and numerics of one Llama-shaped model. Shape keys may be left out where `load: hf:DIR` gives them."""

    load: Annotated[str, AfterValidator(_folder_of_weights)] | None = Field(
        None, description="ckpt:DIR | hf:DIR the weights come from, and nothing else; null: fresh weights"
    )
    num_layers: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=1)
    ffn_hidden_size: int | None = Field(None, ge=1, description="width of SwiGLU, between its two projections")
    num_attention_heads: int | None = Field(None, ge=1)
    num_query_groups: int | None = Field(None, ge=1, description="key/value heads; as many as heads if left out")
    vocab_size: int | None = Field(None, ge=1, description="the true size; padding is internal")
    max_position_embeddings: int = Field(
        2048, ge=1, description="tokens; no sample, and no answer with its prompt, may be longer"
    )
    rotary_base: float = Field(10000, gt=0, description="of RoPE; HF's rope_theta")
    rope_scaling: dict[str, Any] | None = Field(
        None,
        description="HF's dict; kinds: linear, llama3; null: none, also where the weights that are loaded have one",
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="of RMSNorm")
    untie_embeddings_and_output_weights: bool = Field(True, description="false: the embedding is the output layer, too")
    add_qkv_bias: bool = Field(False, description="queries, keys and values with a bias, as Qwen2 has")
    head: Head = Field("language_model", description="the task's: value (one number a token) for reward")
    init_method_std: float = Field(0.02, gt=0, description="standard deviation of fresh weights")
    params_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of weights and activations; under bf16 the optimizer keeps fp32 main weights"
    )
    layer_spec: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="auto: transformer_engine where it is installed and works on a GPU, else torch"
    )
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        "none", description="computed again in the backward pass, to save memory: nothing, each layer's MLP, all layers"
    )

    @property
    def has_tied_output_layer(self) -> bool:
        """Whether the embedding is the output layer, too."""
        return self.head == "language_model" and not self.untie_embeddings_and_output_weights

    @property
    def missing_shape(self) -> list[str]:
        """The keys without which nothing can be built or counted, and which are not given: `load` is to give them."""
        return [key for key in SHAPE if getattr(self, key) is None]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        assert self.hidden_size and self.num_attention_heads, "the shape is complete once a run starts"
        return self.hidden_size // self.num_attention_heads


class ParallelConfig(Section):
    """How one role's ranks are split; data parallel size = ranks / (tp * pp * cp)."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="ranks that each layer is split over")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="stages that the layers are split into")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=1, description="chunks of layers a stage, interleaved; null: one"
    )
    context_parallel_size: int = Field(1, ge=1, description="only 1 is supported")
    sequence_parallel: bool = Field(
        False,
        description="norms and residuals are split over the tensor parallel ranks, too; no effect where there is one",
    )
    use_distributed_optimizer: bool = Field(
        False, description="each data parallel rank keeps a part of the optimizer's state in place of all of it"
    )
    overlap_grad_reduce: bool = Field(False, description="gradients are reduced while the backward pass goes on")
    overlap_param_gather: bool = Field(
        False, description="weights are gathered while the forward pass goes on; needs the two switches above"
    )

    @property
    def num_chunks(self) -> int:
        """Chunks of layers a pipeline stage: 1, or the virtual pipeline's size."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def micro_batches_a_round(self) -> int:
        """What their number is a multiple of: an interleaved schedule takes as many at a time as there are stages."""
        return self.pipeline_model_parallel_size if self.num_chunks > 1 else 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class DataConfig(Section):
    """What `data build` wrote, and how it is drawn from."""

    path: FilePath | list[FilePath] | None = Field(
        None,
        description="folders that `data build` wrote; task sft: jsonl files of conversations beside or instead; task "
        "reward: jsonl files of pairs",
    )
    weights: dict[str, Weight] | None = Field(
        None, description="{source: weight} of every source, 0 leaves one out; null: as many tokens as each holds"
    )
    tokenizer: FilePath | None = Field(
        None, description="tokenizer.model or tokenizer.json; for jsonl files and task ppo; a data folder has its own"
    )
    split_documents: bool = Field(True, description="attention and positions stop at document borders")
    eval_path: FilePath | None = Field(None, description="held-out data, such as DIR/held_out of `data build`")
    chat_template: TemplateOrFile | None = Field(
        None,
        description="of jsonl files: xuanyuan | xuanyuan-70b | llama-2 | chatml | FILE; null: the tokenizer's own",
    )
    chat_overflow: Literal["refuse", "truncate_left", "split"] = Field(
        "refuse", description="of jsonl files: what becomes of conversations longer than the largest bucket"
    )
    last_turn_only: bool = Field(False, description="of jsonl files: only a conversation's last answer is learned")
    max_epochs: float | None = Field(
        None, gt=0, description="refuse a run that would draw a (source, bucket) more often; null: any number of times"
    )

    @property
    def paths(self) -> list[Path]:
        """`path` as a list."""
        if self.path is None:
            return []
        return self.path if isinstance(self.path, list) else [self.path]


class Phase(Section):
    """From data step `from_iter` on, other weights or batch size: what is left out stays as it was. `train_only` holds
    for its own phase, and is null in the next one unless that names it again.
    """

    from_iter: int = Field(ge=0, description="data step, from 0")
    weights: dict[str, Weight] | None = Field(None, description="as data.weights")
    global_batch_tokens: int | None = Field(None, ge=1, description="as training.global_batch_tokens")
    train_only: Annotated[list[Literal["embedding", "output_layer"]], Field(min_length=1)] | None = Field(
        None, description="the rest of the model stays as it is; null: everything trains"
    )


class TrainingConfig(Section):
    """How long, and with how many tokens a step."""

    train_iters: int = Field(100, ge=1, description="steps; of task ppo, rounds of answers and their updates")
    global_batch_tokens: int = Field(16384, ge=1, description="tokens a step: this / b samples on bucket b")
    micro_batch_tokens: int = Field(
        2048, ge=1, description="tokens a rank computes at once: a common multiple of all buckets"
    )
    phases: list[Phase] = Field([], description="changes on the way, below")
    epochs: int | None = Field(
        None,
        ge=1,
        description="sft, reward: passes over the conversations or pairs, in place of train_iters; a checkpoint after "
        "each",
    )
    eval_interval: int = Field(
        0, ge=0, description="iterations between evaluations on data.eval_path; after the last one, too; 0: none"
    )
    spike_policy: Literal["log", "skip"] = Field(
        "log", description="what becomes of a step that stands out from the last 128: a message, or no update"
    )
    spike_sigmas: float = Field(6.0, gt=0, description="how far above them a step's loss or norm stands out")
    max_skipped_in_a_row: int = Field(50, ge=1, description="updates not made, before the run ends with 65")

    def train_only_at(self, data_step: int) -> list[Literal["embedding", "output_layer"]] | None:
        """What alone trains at a data step; None: everything."""
        begun = [phase for phase in self.phases if phase.from_iter <= data_step]
        return begun[-1].train_only if begun else None


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(3e-4, ge=0, description="the highest rate")
    min_lr: float = Field(
        default_factory=lambda before: min(3e-5, before["lr"]),
        ge=0,
        description="left out: 3e-5, or lr where that is lower",
    )
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = Field(
        "cosine", description="WSD: warm-up, then lr, then a decay at the end"
    )
    lr_warmup_iters: int = Field(10, ge=0, description="of a linear rise to lr; may exceed train_iters")
    lr_warmup_tokens: int | None = Field(None, ge=0, description="in place of lr_warmup_iters: a schedule by tokens")
    lr_warmup_init: float = Field(0.0, ge=0, description="the rate that the warm-up starts above")
    lr_decay_iters: int | None = Field(None, ge=1, description="where min_lr is reached; null: train_iters")
    lr_decay_tokens: int | None = Field(None, ge=1, description="likewise, in a schedule by tokens")
    lr_wsd_decay_iters: int | None = Field(None, ge=1, description="WSD: how long before its end the decay begins")
    lr_wsd_decay_tokens: int | None = Field(None, ge=1, description="likewise, in a schedule by tokens")
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = Field(
        "exponential", description="WSD: the shape of that decay"
    )
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    weight_decay: float = Field(0.1, ge=0, description="not applied to norms and biases")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)

    @property
    def is_by_tokens(self) -> bool:
        """Whether the schedule counts consumed tokens, padding included, instead of iterations."""
        return self.lr_warmup_tokens is not None or self.lr_decay_tokens is not None


class CheckpointConfig(Section):
    """When checkpoints are written, and from which one a run goes on."""

    save_interval: int = Field(50, ge=1, description="iterations")
    keep_latest: int = Field(2, ge=1, description="checkpoints that stay; those at ends of reward epochs stay, too")
    async_save: bool = Field(True, description="write while training goes on")
    hf_interval: int = Field(
        0, ge=0, description="iterations between HF folders, RUN/hf/iter_N (of PPO's actor); 0: none"
    )
    resume: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="auto: from the newest whole checkpoint; never: from the start; ITERATION: from that checkpoint",
    )
    allow_changes: bool = Field(False, description="resume though seed, data, weights or batch size differ")


class RuntimeConfig(Section):
    """The processes themselves."""

    timeout_seconds: float = Field(
        120, gt=0, le=7 * 24 * 3600, description="without progress on any rank, after which the run ends with 76"
    )
    num_threads: int = Field(1, ge=1, le=MOST_THREADS, description="CPU threads a rank")
    deterministic: bool = Field(False, description="the same bits again on a GPU, with slower kernels")
    profile: str | None = Field(None, description="A:B, iterations from A to B - 1, by torch's profiler")
    profile_ranks: list[Annotated[int, Field(ge=0)]] = Field([0], description="ranks that write RUN/profile")
    wandb_project: str | None = Field(
        None, min_length=1, description="Weights & Biases draws the scalars too, in this project; WANDB_MODE counts"
    )

    @field_validator("profile")
    @classmethod
    def _is_a_window(cls, value: str | None) -> str | None:
        if value is not None:
            match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", value)
            if match is None or not 0 < int(match[1]) < int(match[2]):
                raise ValueError("must be A:B, iterations from A (1 is the first) to B - 1, such as 10:13")
        return value

    @property
    def profiled_iterations(self) -> range:
        """`profile` as a range of iterations; empty without it."""
        return range(*map(int, self.profile.split(":"))) if self.profile else range(0)


class RoleConfig(Section):
    """One PPO role: its ranks, and what differs from the run's own sections of the same names."""

    ranks: int | str | None = Field(None, description='0, "0-1" or "0,2-3"; in whatever order')
    share: float | None = Field(None, gt=0, le=1, description="of the world, in place of ranks; placed in order")
    model: ModelConfig = Field(ModelConfig(), description="keys of model that differ for this role")
    parallel: ParallelConfig = Field(ParallelConfig(), description="likewise; what is left out is the run's")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="likewise; of actor and critic")
    micro_batch_tokens: int | None = Field(None, ge=1, description="null: training.micro_batch_tokens")
    chat_template: TemplateOrFile | None = Field(
        None, description="renders prompts that are messages; null: data.chat_template"
    )

    @field_serializer("model", "parallel", "optimizer")
    def _what_differs(self, section: Section) -> dict[str, Any]:
        return section.model_dump(mode="json", exclude_unset=True)


class PPOConfig(Section):
    """The algorithm's own numbers. Lengths in tokens, coefficients of losses in nats."""

    prompts: FilePath | None = Field(None, description="jsonl rows with a prompt")
    rollout_batch_size: int = Field(64, ge=1, description="answers a step, one a prompt")
    mini_batch_size: int = Field(32, ge=1, description="answers an update")
    ppo_epochs: int = Field(1, ge=1, description="passes over a step's answers")
    max_response_length: int = Field(512, ge=1, description="tokens")
    temperature: float = Field(
        1.0, ge=MIN_TEMPERATURE, description="log-probabilities are those of the tempered distribution"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="below 1 the sampled distribution is not quite the scored one")
    top_k: int = Field(0, ge=0, description="0: all; else as for top_p")
    kl_coef: float = Field(0.05, ge=0, description="of the penalty in the rewards (k1)")
    kl_target: float | None = Field(None, gt=0, description="nats an answer: kl_coef adapts to it; null: fixed")
    kl_horizon: int = Field(10_000, ge=1, description="answers; how slowly an adaptive kl_coef moves")
    kl_loss_coef: float = Field(0.0, ge=0, description="of a divergence loss (k2) in place of the penalty")
    entropy_coef: float = Field(0.0, ge=0, description="of a bonus for entropy in the actor's loss")
    gamma: float = Field(1.0, ge=0, le=1, description="discount of rewards, a token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of generalised advantage estimation")
    whiten_advantages: bool = Field(True, description="over the global batch")
    clip_ratio: float = Field(
        0.2, gt=0, le=LARGEST_CLIP, description="how far below and above 1 the ratio to the old policy counts"
    )
    clip_ratio_high: float | None = Field(
        None, gt=0, le=LARGEST_CLIP, description="the bound above 1; null: clip_ratio"
    )
    dual_clip: float | None = Field(
        None, gt=1, le=LARGEST_CLIP, description="bounds the loss of negative advantages; null: unbounded"
    )
    value_clip: float | None = Field(
        0.2,
        gt=0,
        le=LARGEST_CLIP,
        description="how far a value may move from the old one in the critic's loss; null: any",
    )
    loss_aggregation: Literal["token_mean", "sequence_sum_mean", "sequence_token_mean"] = Field(
        "token_mean", description="mean over all tokens; over answers, of sums over tokens; over answers, of means"
    )
    critic_warmup_iters: int = Field(0, ge=0, description="steps in which the critic alone is updated")
    reward_normalization: Literal["none", "running", "stored"] = Field(
        "none", description="running: by all scores so far; stored: by what the reward model's checkpoint keeps"
    )
    reward_clip: float | None = Field(None, gt=0, le=LARGEST_CLIP, description="of the normalised score; null: no clip")
    missing_end: Literal["penalty", "mask", "bootstrap"] = Field(
        "penalty", description="of answers that were cut: taken off the score; not learned from; valued by the critic"
    )
    missing_end_penalty: float = Field(
        0.0, ge=0, description="missing_end penalty: taken off the normalised and clipped score of a cut answer"
    )
    reward_function: Annotated[str, AfterValidator(possible_path)] | None = Field(
        None, description="FILE.py:FUNCTION in place of the role reward"
    )
    snapshot_interval: int = Field(0, ge=0, description="steps; the actor's checkpoints of these are kept; 0: none")
    responses: FilePath | None = Field(None, description="given answers, in the order in which prompts are drawn")
    dump_rollouts: bool = Field(False, description="each step's tensors into RUN/rollouts")


class RewardConfig(Section):
    """What the pairs of a reward model ask for, and which epoch of it is fit for use. Scores are the model's own."""

    loss: Literal["token", "sentence"] = Field(
        "token", description="token: from the first token that differs on; sentence: at the last token alone"
    )
    margin_scale: float = Field(0.0, ge=0, description="times the grade's strength (1 to 3): how far chosen must win")
    centering_coef: float = Field(0.0, ge=0, description="of the square of the sum of a pair's scores")
    test_fraction: float = Field(0.1, ge=0, lt=1, description="of the pairs, by prompt; data.eval_path goes before it")
    stored_scores_of: str | None = Field(None, description="the model whose answers give mean and std; null: all")
    min_accuracy: float = Field(0.5, ge=0, le=1, description="select: on held-out pairs, must exceed it")
    min_margin: float = Field(0.0, ge=0, description="select: mean chosen less mean rejected, must exceed it")
    score_band: tuple[Weight, Weight] = Field((-1.0, 1.0), description="select: holds mean - std and mean + std")
    max_accuracy_gap: float = Field(0.2, ge=0, le=1, description="select: of training over held-out pairs: overfitted")


class RunConfig(Section):
    """A whole run.yaml."""

    task: Literal["pretrain", "sft", "reward", "ppo"] = Field("pretrain", description="the verb must agree")
    seed: int = Field(1234, ge=0, description="of fresh weights, the order of the data, and sampling")
    run_dir: FilePath = Field(Path("runs/default"), description="everything of the run lies here: run_folder.md")
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    roles: dict[RoleName, RoleConfig] | None = None
    ppo: PPOConfig | None = None
    reward: RewardConfig | None = None

    @property
    def has_pairs(self) -> bool:
        """Whether the task learns from pairs of answers, in place of packed documents."""
        return self.task == "reward"

    @property
    def reward_section(self) -> RewardConfig:
        """`reward`, or its defaults."""
        return self.reward or RewardConfig()

    @property
    def ppo_section(self) -> PPOConfig:
        """`ppo`, or its defaults."""
        return self.ppo or PPOConfig()


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "runtime": RuntimeConfig,
    "ppo": PPOConfig,
    "reward": RewardConfig,
}
