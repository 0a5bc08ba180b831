"""Every section of a run as typed models: defaults, units, checks; from a YAML file and overrides to a `RunConfig`.

Nothing here imports torch: `check`, `plan` and `--help` answer in under a second. All problems of a file come in one
report, each with its line, value, rule and remedy.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from megatron_xy.errors import ConfigError
from megatron_xy.yaml_file import Lines, apply_overrides, read_yaml

LARGEST_INTEGER = 2**63 - 1
UNKNOWN_KEY = "unknown key"
FILES_OF_ROWS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
RULES_BY_KIND = {  # by the beginning of pydantic's name for what is wrong
    "int_": "must be a whole number",
    "float_": "must be a number",
    "bool_": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "list_type": "must be a list",
    "dict_type": "must be a section: `key: value` lines below it",
    "model_type": "must be a section: `key: value` lines below it",
}


def _plain_number(value: Any) -> Any:
    """Refuses what pydantic would read as a number and nobody means as one."""
    if isinstance(value, bool):
        raise ValueError("must not be true or false")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError("must fit in 64 bits")
    return value


def _plain_flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _path_text(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("must be a path; put it in quotes if it is one")
    if not str(value) or "\0" in str(value):
        raise ValueError("must be a path; it is empty or holds a NUL character")
    return value


def _folder_of_weights(value: str) -> str:
    if not re.fullmatch(r"(ckpt|hf):[^\0]+", value):
        raise ValueError("must be ckpt:DIR or hf:DIR")
    return value


FilePath = Annotated[Path, BeforeValidator(_path_text)]
Weight = Annotated[float, BeforeValidator(_plain_number)]


Head = Literal["language_model", "value"]
RoleName = Literal["actor", "critic", "reference", "reward"]
ROLE_NAMES: tuple[RoleName, ...] = get_args(RoleName)
TRAINED_ROLES: tuple[RoleName, ...] = ("actor", "critic")
HEAD_OF_ROLE: dict[RoleName, Head] = {
    "actor": "language_model", "critic": "value", "reference": "language_model", "reward": "value",
}  # fmt: skip


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None, "a field's validator knows its field"
        is_flag = cls.model_fields[info.field_name].annotation is bool
        return _plain_flag(value) if is_flag else _plain_number(value)


SectionType = TypeVar("SectionType", bound=Section)


class ModelConfig(Section):
    """Shape and numerics of one Llama-shaped model. Shape keys may be left out where `load: hf:DIR` gives them."""

    load: Annotated[str, AfterValidator(_folder_of_weights)] | None = Field(
        None, description="ckpt:DIR | hf:DIR; weights only"
    )
    num_layers: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=1)
    ffn_hidden_size: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    num_query_groups: int | None = Field(None, ge=1, description="key/value heads; as many as heads if left out")
    vocab_size: int | None = Field(None, ge=1, description="the true size; padding is internal")
    max_position_embeddings: int = Field(2048, ge=1, description="tokens")
    rotary_base: float = Field(10000, gt=0)
    rope_scaling: dict[str, Any] | None = Field(None, description="HF's dict; kinds: linear, llama3")
    norm_epsilon: float = Field(1e-5, gt=0)
    untie_embeddings_and_output_weights: bool = True
    add_qkv_bias: bool = Field(False, description="queries, keys and values with a bias, as Qwen2 has")
    head: Head = Field("language_model", description="the task's: value (one number a token) for reward")
    init_method_std: float = Field(0.02, gt=0, description="standard deviation of fresh weights")
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    layer_spec: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="auto: transformer_engine where it is installed and works on a GPU, else torch"
    )
    recompute_granularity: Literal["none", "selective", "full"] = "none"

    @property
    def has_tied_output_layer(self) -> bool:
        """Whether the embedding is the output layer, too."""
        return self.head == "language_model" and not self.untie_embeddings_and_output_weights

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        assert self.hidden_size and self.num_attention_heads, "the shape is complete once a run starts"
        return self.hidden_size // self.num_attention_heads


class ParallelConfig(Section):
    """How one role's ranks are split; data parallel size = ranks / (tp * pp * cp)."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    sequence_parallel: bool = Field(False, description="no effect where tensor_model_parallel_size is 1")
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def num_chunks(self) -> int:
        """Chunks of layers a pipeline stage: 1, or the virtual pipeline's size."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class DataConfig(Section):
    """What `data build` wrote, and how it is drawn from."""

    path: FilePath | list[FilePath] | None = Field(
        None, description="folders that `data build` wrote; task sft: jsonl files of conversations beside or instead"
    )
    weights: dict[str, Weight] | None = Field(None, description="{source: weight}; null: as many tokens as each holds")
    tokenizer: FilePath | None = None
    split_documents: bool = Field(True, description="attention and positions stop at document borders")
    eval_path: FilePath | None = Field(None, description="held-out data, such as DIR/held_out of `data build`")
    chat_template: str | None = Field(
        None,
        min_length=1,
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

    from_iter: int = Field(ge=0)
    weights: dict[str, Weight] | None = None
    global_batch_tokens: int | None = Field(None, ge=1)
    train_only: Annotated[list[Literal["embedding", "output_layer"]], Field(min_length=1)] | None = Field(
        None, description="the rest of the model stays as it is; null: everything trains"
    )


class TrainingConfig(Section):
    """How long, and with how many tokens a step."""

    train_iters: int = Field(100, ge=1)
    global_batch_tokens: int = Field(16384, ge=1, description="a step on bucket b takes this / b sequences")
    micro_batch_tokens: int = Field(2048, ge=1, description="a common multiple of all buckets")
    phases: list[Phase] = []
    epochs: int | None = Field(
        None, ge=1, description="sft: passes over the conversations, in place of train_iters; a checkpoint after each"
    )
    eval_interval: int = Field(0, ge=0, description="iterations; after the last one, too; 0: no evaluation")
    spike_policy: Literal["log", "skip"] = Field("log", description="of a step that stands out from the last 128")
    spike_sigmas: float = Field(6.0, gt=0, description="how far above them a step's loss or norm stands out")
    max_skipped_in_a_row: int = Field(50, ge=1, description="updates not made, before the run ends with 65")

    def train_only_at(self, data_step: int) -> list[Literal["embedding", "output_layer"]] | None:
        """What alone trains at a data step; None: everything."""
        begun = [phase for phase in self.phases if phase.from_iter <= data_step]
        return begun[-1].train_only if begun else None


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(3e-4, ge=0)
    min_lr: float = Field(3e-5, ge=0)
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    lr_warmup_iters: int = Field(10, ge=0, description="may exceed train_iters")
    lr_warmup_tokens: int | None = Field(None, ge=0, description="in place of lr_warmup_iters: a schedule by tokens")
    lr_warmup_init: float = Field(0.0, ge=0, description="the rate that the warm-up starts above")
    lr_decay_iters: int | None = Field(None, ge=1, description="where min_lr is reached; null: train_iters")
    lr_decay_tokens: int | None = Field(None, ge=1, description="likewise, in a schedule by tokens")
    lr_wsd_decay_iters: int | None = Field(None, ge=1, description="WSD: how long before its end the decay begins")
    lr_wsd_decay_tokens: int | None = Field(None, ge=1, description="likewise, in a schedule by tokens")
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    weight_decay: float = Field(0.1, ge=0, description="not applied to norms")
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
    keep_latest: int = Field(2, ge=1)
    async_save: bool = Field(True, description="write while training goes on")
    hf_interval: int = Field(0, ge=0, description="iterations between HF folders, RUN/hf/iter_N; 0: none")
    resume: Literal["auto", "never"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="auto | never | ITERATION"
    )
    allow_changes: bool = Field(False, description="resume though seed, data, weights or batch size differ")


class RuntimeConfig(Section):
    """The processes themselves."""

    timeout_seconds: float = Field(120, gt=0, le=7 * 24 * 3600, description="of every collective")
    num_threads: int = Field(1, ge=1, description="CPU threads a rank")
    deterministic: bool = False
    profile: str | None = Field(None, description="A:B, iterations from A to B - 1, by torch's profiler")
    profile_ranks: list[Annotated[int, Field(ge=0)]] = [0]
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

    ranks: int | str | None = Field(None, description='0, "0-1" or "0,2-3"; in their order')
    share: float | None = Field(None, gt=0, le=1, description="of the world, in place of ranks; placed in order")
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    micro_batch_tokens: int | None = Field(None, ge=1, description="null: training.micro_batch_tokens")
    chat_template: str | None = Field(None, description="renders prompts that are messages; null: data.chat_template")

    @field_serializer("model", "parallel", "optimizer")
    def _what_differs(self, section: Section) -> dict[str, Any]:
        return section.model_dump(mode="json", exclude_unset=True)


class PPOConfig(Section):
    """The algorithm's own numbers. Lengths in tokens, coefficients of losses in nats."""

    prompts: FilePath | None = Field(None, description="jsonl rows with a prompt")
    rollout_batch_size: int = Field(64, ge=1, description="answers a step, one a prompt")
    mini_batch_size: int = Field(32, ge=1, description="answers an update")
    ppo_epochs: int = Field(1, ge=1)
    max_response_length: int = Field(512, ge=1)
    temperature: float = Field(1.0, gt=0, description="log-probabilities are those of the tempered distribution")
    top_p: float = Field(1.0, gt=0, le=1, description="below 1 the sampled distribution is not quite the scored one")
    top_k: int = Field(0, ge=0, description="0: all; else as for top_p")
    kl_coef: float = Field(0.05, ge=0, description="of the penalty in the rewards (k1)")
    kl_target: float | None = Field(None, gt=0, description="nats an answer: kl_coef adapts to it; null: fixed")
    kl_horizon: int = Field(10_000, ge=1, description="answers; how slowly an adaptive kl_coef moves")
    kl_loss_coef: float = Field(0.0, ge=0, description="of a divergence loss (k2) in place of the penalty")
    entropy_coef: float = Field(0.0, ge=0)
    gamma: float = Field(1.0, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = Field(True, description="over the global batch")
    clip_ratio: float = Field(0.2, gt=0)
    clip_ratio_high: float | None = Field(None, gt=0, description="null: clip_ratio")
    dual_clip: float | None = Field(None, gt=1, description="bounds the loss of negative advantages; null: unbounded")
    value_clip: float | None = Field(0.2, gt=0, description="null: no clip")
    loss_aggregation: Literal["token_mean", "sequence_sum_mean", "sequence_token_mean"] = "token_mean"
    critic_warmup_iters: int = Field(0, ge=0, description="steps in which the critic alone is updated")
    reward_normalization: Literal["none", "running", "stored"] = Field(
        "none", description="running: by all scores so far; stored: by what the reward model's checkpoint keeps"
    )
    reward_clip: float | None = Field(None, gt=0, description="of the normalised score; null: no clip")
    missing_end: Literal["penalty", "mask", "bootstrap"] = Field(
        "penalty", description="of answers that were cut: taken off the score; not learned from; valued by the critic"
    )
    missing_end_penalty: float = Field(0.0, ge=0)
    reward_function: str | None = Field(None, description="FILE:FUNCTION in place of the role reward")
    snapshot_interval: int = Field(0, ge=0, description="steps; the actor's checkpoints of these are kept; 0: none")
    responses: FilePath | None = Field(None, description="given answers, in the order in which prompts are drawn")
    dump_rollouts: bool = False


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

    task: Literal["pretrain", "sft", "reward", "ppo"] = "pretrain"
    seed: int = Field(1234, ge=0)
    run_dir: FilePath = Path("runs/default")
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
    def reward_section(self) -> RewardConfig:
        """`reward`, or its defaults."""
        return self.reward or RewardConfig()

    @field_validator("model", "parallel", "data", "training", "optimizer", "checkpoint", "runtime", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """`model:` with nothing below it is a section without keys, not null."""
        return {} if value is None else value


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

# What stays outside this project, and a tool that has it.
OUT_OF_SCOPE = {
    r"num_experts|moe_.*|expert_model_parallel_size": (
        "mixture of experts is not part of megatron_xy; Megatron-LM has it"
    ),
    r"multi_latent_attention|q_lora_rank|kv_lora_rank": (
        "latent attention is not part of megatron_xy; Megatron-LM has it"
    ),
    r"lora.*|peft.*|adapter.*": (
        "adapters are not part of megatron_xy, all weights train; PEFT and LLaMA-Factory have them"
    ),
}

# Megatron's and HF's spellings of what is called otherwise here.
OTHER_SPELLINGS = {
    "seq_length": "training.micro_batch_tokens (a sample's length comes from the data's buckets)",
    "micro_batch_size": "training.micro_batch_tokens (tokens, not sequences)",
    "global_batch_size": "training.global_batch_tokens (tokens, not sequences)",
    "data_path": "data.path",
    "tokenizer_model": "data.tokenizer",
    "save": "run_dir",
    "tensorboard_dir": "run_dir (TensorBoard files lie in it)",
    "hidden_dim": "model.hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_query_groups",
    "group_query_attention": "model.num_query_groups",
    "rope_theta": "model.rotary_base",
    "rms_norm_eps": "model.norm_epsilon",
    "tie_word_embeddings": "model.untie_embeddings_and_output_weights",
    "bf16": "model.params_dtype: bf16",
    "warmup_iters": "optimizer.lr_warmup_iters",
    "learning_rate": "optimizer.lr",
    "distributed_timeout_minutes": "runtime.timeout_seconds",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: where it stands and what to do about it."""

    where: str
    text: str

    def __str__(self) -> str:
        return self.text if self.text.startswith(self.where) else f"{self.where}: {self.text}"


class InvalidConfig(ConfigError):
    """A config with one or more problems; prints all of them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  {problem}" for problem in self.problems))


def is_file_of_rows(path: Path) -> bool:
    """Whether a path of a run's data names a file of conversations, not a folder."""
    return path.name.endswith(FILES_OF_ROWS)


def load_config(path: Path, *, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Reads `path`, applies `section.key=value` overrides in order and returns the checked config.

    Raises InvalidConfig with every problem at once, ConfigError where `path` is no YAML file at all. With `world_size`
    the rules that need the number of ranks are among them; without, `check_world` checks these.
    """
    values, lines = read_yaml(path)
    problems = [Problem(where, text) for where, text in apply_overrides(values, lines, overrides)]
    _let_ranks_replace_shares(values, overrides)
    config, refused = _validate(values)
    problems += [Problem(lines.where(name, path), text) for name, text in refused.items()]
    for name, text in _rules(config, world_size=world_size):
        if not any(_depends_on(name, text, key) for key in refused):
            problems.append(Problem(lines.where(name, path), text))
    if problems:
        raise InvalidConfig(problems)
    return config.model_copy(update={"model": config.model.model_copy(update={"head": _head_of(config)})})


def _let_ranks_replace_shares(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """An override that names a role's ranks means them in place of the share that the file gives."""
    for override in overrides:
        match = re.match(r"roles\.(\w+)\.ranks=", override)
        role = match and isinstance(values.get("roles"), dict) and values["roles"].get(match[1])
        if isinstance(role, dict):
            role.pop("share", None)


def load_model_options(origin: str, *, overrides: Sequence[str], world_size: int) -> RunConfig:
    """For a verb over the model in `origin` (ckpt:DIR or hf:DIR): a config of its `model.load`, `parallel`, `runtime`.

    overrides: of the sections parallel and runtime, whose keys are as in a RUN.yaml; the rest is defaults. Raises
    InvalidConfig with every problem at once.
    """
    values: dict[str, Any] = {"model": {"load": origin}}
    lines = Lines()
    problems = [Problem(where, text) for where, text in apply_overrides(values, lines, overrides)]
    for name in sorted(values.keys() - {"model", "parallel", "runtime"}) + (
        ["model"] if len(values["model"]) > 1 else []
    ):
        problems.append(Problem(lines.where(name, Path(name)), f"{name}: this verb takes keys of parallel and runtime"))
    config, refused = _validate({name: values[name] for name in ("model", "parallel", "runtime") if name in values})
    problems += [Problem(lines.where(name, Path(name)), text) for name, text in refused.items()]
    if not refused:
        for name, text in _model_verb_rules(config.parallel, world_size=world_size):
            problems.append(Problem(lines.where(name, Path(name)), text))
    if problems:
        raise InvalidConfig(problems)
    return config


def run_dir_of(path: Path, *, overrides: Sequence[str] = ()) -> Path | None:
    """The run folder that a config names, even where the rest of it is wrong; None if it names none."""
    try:
        values, lines = read_yaml(path)
    except ConfigError:
        return None
    apply_overrides(values, lines, overrides)
    value = values.get("run_dir", RunConfig.model_fields["run_dir"].default)
    return Path(value) if isinstance(value, str | Path) and str(value) and "\0" not in str(value) else None


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML, defaults included: what RUN/run.yaml holds."""
    return yaml.safe_dump(json.loads(config.model_dump_json(exclude_none=False)), sort_keys=False)


def data_parallel_size(parallel: ParallelConfig, *, world_size: int) -> int:
    """Replicas of the model over `world_size` ranks; raises InvalidConfig where that does not divide."""
    if world_size % parallel.model_parallel_size:
        raise InvalidConfig([Problem("parallel", _world_rule(parallel, world_size))])
    return world_size // parallel.model_parallel_size


def check_world(config: RunConfig, *, world_size: int) -> None:
    """The rules between keys, those that need the number of ranks included; raises InvalidConfig."""
    problems = [Problem(name, text) for name, text in _rules(config, world_size=world_size)]
    if problems:
        raise InvalidConfig(problems)


def check_shape(config: RunConfig) -> None:
    """The rules of the model's shape once it is complete: `model.load` has filled it in. Raises InvalidConfig."""
    problems = [Problem(name, text) for name, text in shape_problems(config.model, config.parallel)]
    if problems:
        raise InvalidConfig(problems)


def shape_problems(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[str, str]]:
    """(key, sentence) of what does not fit in a complete model's shape."""
    return list(_shape_rules(model, parallel))


def check_buckets(training: TrainingConfig, *, buckets: Sequence[int]) -> None:
    """A micro-batch holds a whole number of samples of every bucket; raises InvalidConfig."""
    bad = [bucket for bucket in buckets if training.micro_batch_tokens % bucket]
    if bad:
        largest = max(buckets)
        rule = (
            f"training.micro_batch_tokens ({training.micro_batch_tokens}) must be a common multiple of the data's "
            f"buckets ({', '.join(map(str, buckets))}); it is none of {', '.join(map(str, bad))}; "
            f"nearest to try: {_nearest_multiples(training.micro_batch_tokens, largest)}"
        )
        raise InvalidConfig([Problem("training.micro_batch_tokens", rule)])


def _rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every rule between keys that does not hold, and of what is not built yet."""
    yield from _not_built(config)
    if config.task == "ppo":
        yield from _ppo_rules(config, world_size=world_size)
        return
    if "head" in config.model.model_fields_set and config.model.head != _head_of(config):
        yield "model.head", f"model.head ({config.model.head}): task {config.task} has {_head_of(config)}; leave it out"
    yield from _shape_rules(config.model, config.parallel)
    yield from _batch_rules(config, world_size=world_size)
    training, data, parallel = config.training, config.data, config.parallel
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and training.micro_batch_tokens % tp:
        yield (
            "training.micro_batch_tokens",
            f"training.micro_batch_tokens ({training.micro_batch_tokens}) must be a multiple of "
            f"tensor_model_parallel_size ({tp}) under sequence_parallel; nearest: "
            f"{_nearest_multiples(training.micro_batch_tokens, tp)}",
        )
    yield from _layout_rules(parallel)
    saved, exported = config.checkpoint.save_interval, config.checkpoint.hf_interval
    if exported % saved:
        yield (
            "checkpoint.hf_interval",
            f"checkpoint.hf_interval ({exported}) must be a multiple of save_interval ({saved}): an HF folder is made "
            f"of a checkpoint; nearest: {_nearest_multiples(exported, saved)}",
        )
    yield from _schedule_rules(config.optimizer)
    if training.eval_interval and data.eval_path is None and config.task != "reward":
        yield (
            "data.eval_path",
            f"data.eval_path is missing; training.eval_interval ({training.eval_interval}) needs held-out data, such "
            f"as the held_out folder of `megatron-xy data build --held-out`",
        )
    yield from _weight_rules(data.weights, key="data.weights")
    yield from _phase_rules(training.phases)
    if not data.paths:
        yield "data.path", "data.path is missing; name a folder that `megatron-xy data build` wrote"
    yield from _reward_rules(config) if config.task == "reward" else _conversation_rules(config)
    if config.model.load is None:
        for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
            if getattr(config.model, key) is None:
                yield f"model.{key}", f"model.{key} is missing; give it, or model.load: hf:DIR that has it"


def _layout_rules(parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
    """Switches that need others."""
    if parallel.num_chunks > 1 and parallel.pipeline_model_parallel_size == 1:
        yield (
            "parallel.virtual_pipeline_model_parallel_size",
            f"virtual_pipeline_model_parallel_size ({parallel.num_chunks}) needs pipeline_model_parallel_size above 1; "
            f"leave it out",
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather",
            "overlap_param_gather (true) needs use_distributed_optimizer and overlap_grad_reduce; set both to true",
        )


def _reward_rules(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Pairs are read from files of rows, whole and as they are: what other tasks do with their data is refused."""
    data, training, defaults = config.data, config.training, DataConfig()
    named = [("data.path", path) for path in data.paths]
    named += [("data.eval_path", data.eval_path)] if data.eval_path is not None else []
    for key, path in named:
        if not is_file_of_rows(path):
            yield key, f"{key} ({path}): task reward takes jsonl files of rows with prompt, chosen and rejected"
    if data.tokenizer is None:
        yield "data.tokenizer", "data.tokenizer is missing; pairs are text, and answers end with its end token"
    for key in ("weights", "max_epochs", "chat_overflow", "last_turn_only", "split_documents"):
        if (value := getattr(data, key)) != getattr(defaults, key):
            yield f"data.{key}", f"data.{key} ({_shown(value)}): task reward draws every pair whole; leave it out"
    if training.phases:
        yield "training.phases", "training.phases: task reward has one phase; leave it out"
    reward = config.reward_section
    if not reward.score_band[0] < reward.score_band[1]:
        yield "reward.score_band", f"reward.score_band ({list(reward.score_band)}) must rise, such as [-1, 1]"


def _conversation_rules(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What only tasks that learn conversations have."""
    data, training = config.data, config.training
    named = [("data.path", path) for path in data.paths]
    named += [("data.eval_path", data.eval_path)] if data.eval_path is not None else []
    files = [(key, path) for key, path in named if is_file_of_rows(path)]
    if config.task == "pretrain":
        for key, path in files:
            yield (
                key,
                f"{key} ({path}): task pretrain takes folders that `megatron-xy data build` wrote; build one of it",
            )
        if training.epochs is not None:
            yield (
                "training.epochs",
                f"training.epochs ({training.epochs}): task pretrain counts in train_iters; use them",
            )
    elif files and data.tokenizer is None:
        yield "data.tokenizer", f"data.tokenizer is missing; {files[0][1]} is to be tokenised: name a tokenizer.model"
    if training.epochs is not None and any(phase.from_iter for phase in training.phases):
        yield (
            "training.epochs",
            f"training.epochs ({training.epochs}): training.phases count in iterations; give train_iters, not epochs",
        )


def _model_verb_rules(parallel: ParallelConfig, *, world_size: int) -> Iterator[tuple[str, str]]:
    """The rules of a layout by itself, for verbs that do not train."""
    yield from _layout_rules(parallel)
    if parallel.context_parallel_size != 1:
        value = parallel.context_parallel_size
        yield "parallel.context_parallel_size", f"context_parallel_size ({value}): only 1 is supported"
    elif world_size % parallel.model_parallel_size:
        yield "parallel", f"--nproc-per-node: {_world_rule(parallel, world_size)}"


def _batch_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """The world divides into replicas, and a step's tokens into their micro-batches; pairs are packed as they come."""
    training, parallel = config.training, config.parallel
    factors = {"micro_batch_tokens": training.micro_batch_tokens}
    if parallel.num_chunks > 1:  # the interleaved schedule takes them in rounds of as many as there are stages
        factors["pipeline_model_parallel_size"] = parallel.pipeline_model_parallel_size
    if world_size is not None and world_size % parallel.model_parallel_size:
        yield "parallel", _world_rule(parallel, world_size)
    elif world_size is not None:
        factors["data parallel size"] = world_size // parallel.model_parallel_size
    if config.task == "reward":
        return
    unit = math.prod(factors.values())
    unit_name = f"{' x '.join(factors)} ({' x '.join(map(str, factors.values()))}"
    unit_name += f" = {unit})" if len(factors) > 1 else ")"
    sizes = [("training", training.global_batch_tokens)]
    for number, phase in enumerate(training.phases):
        if phase.global_batch_tokens is not None:
            sizes.append((f"training.phases[{number}]", phase.global_batch_tokens))
    for key, tokens in sizes:
        if tokens % unit:
            name = f"{key}.global_batch_tokens"
            rule = f"{name} ({tokens}) must be a multiple of {unit_name}; nearest: {_nearest_multiples(tokens, unit)}"
            yield name.split("[")[0], rule


def _weight_rules(weights: dict[str, float] | None, *, key: str) -> Iterator[tuple[str, str]]:
    """Weights of sources are 0 or more, and one is above."""
    if weights is None:
        return
    where = key.split("[")[0]
    for source, weight in weights.items():
        if weight < 0:
            yield where, f"{key}.{source} ({weight:g}) must not be negative; 0 leaves it out"
    if not any(weight > 0 for weight in weights.values()):
        yield where, f"{key}: at least one source needs a weight above 0"


def _phase_rules(phases: Sequence[Phase]) -> Iterator[tuple[str, str]]:
    """Phases stand in the order in which they begin, each changes something, and their weights are such."""
    for number, phase in enumerate(phases):
        key = f"training.phases[{number}]"
        if number and phase.from_iter <= phases[number - 1].from_iter:
            yield (
                "training.phases",
                f"{key}.from_iter ({phase.from_iter}) must be above that of the phase before it "
                f"({phases[number - 1].from_iter}); sort the phases, and name each step once",
            )
        unfreezes = bool(number) and phases[number - 1].train_only is not None
        if phase.weights is None and phase.global_batch_tokens is None and phase.train_only is None and not unfreezes:
            yield "training.phases", f"{key} changes nothing; give it weights, global_batch_tokens or train_only"
        yield from _weight_rules(phase.weights, key=f"{key}.weights")


def _schedule_rules(optimizer: OptimizerConfig) -> Iterator[tuple[str, str]]:
    """A schedule counts in iterations or in tokens, has an end if it decays, and never rises but by its warm-up."""
    style, is_decaying = optimizer.lr_decay_style, optimizer.lr_decay_style != "constant"
    if optimizer.min_lr > optimizer.lr and is_decaying:
        yield (
            "optimizer.min_lr",
            f"optimizer.min_lr ({optimizer.min_lr:g}) must not exceed lr ({optimizer.lr:g}); lower it",
        )
    if optimizer.lr_warmup_init > optimizer.lr:
        yield (
            "optimizer.lr_warmup_init",
            f"optimizer.lr_warmup_init ({optimizer.lr_warmup_init:g}) must not exceed lr ({optimizer.lr:g}); lower it",
        )
    needed = {"lr_warmup_tokens", "lr_decay_tokens"} if optimizer.is_by_tokens else set()
    unit, other_unit = ("tokens", "iters") if optimizer.is_by_tokens else ("iters", "tokens")
    if not is_decaying:
        needed.discard("lr_decay_tokens")
    if style == "WSD":
        needed.add(f"lr_wsd_decay_{unit}")
    for name in sorted(needed):
        if getattr(optimizer, name) is None:
            yield (
                f"optimizer.{name}",
                f"optimizer.{name} is missing; a schedule of style {style} that counts {unit} needs it"
                f"{' (0: no warm-up)' if name == 'lr_warmup_tokens' else ''}",
            )
    for name in (f"lr_decay_{other_unit}", f"lr_wsd_decay_{other_unit}"):
        if getattr(optimizer, name) is not None:
            yield (
                f"optimizer.{name}",
                f"optimizer.{name} ({getattr(optimizer, name)}): this schedule counts {unit}; give "
                f"{name.replace(other_unit, unit)} in its place, or every length of the schedule in {other_unit}",
            )
    for name in ("lr_wsd_decay_iters", "lr_wsd_decay_tokens"):
        if style != "WSD" and getattr(optimizer, name) is not None:
            yield f"optimizer.{name}", f"optimizer.{name}: only lr_decay_style WSD has it; leave it out"


def _shape_rules(model: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, str]]:
    """Sizes of the model that must divide, with the nearest values that do."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size

    def divides(name: str, value: int | None, unit_name: str, unit: int | None) -> Iterator[tuple[str, str]]:
        if value is not None and unit is not None and value % unit:
            yield (
                f"model.{name}",
                f"model.{name} ({value}) must be a multiple of {unit_name} ({unit}); "
                f"nearest: {_nearest_multiples(value, unit)}",
            )

    groups = model.num_query_groups or model.num_attention_heads
    yield from divides("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads)
    yield from divides("num_attention_heads", model.num_attention_heads, "num_query_groups", model.num_query_groups)
    yield from divides("num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size", tp)
    if model.num_attention_heads is not None and model.num_attention_heads % tp == 0:
        yield from divides("num_query_groups", groups, "tensor_model_parallel_size", tp)
    yield from divides("ffn_hidden_size", model.ffn_hidden_size, "tensor_model_parallel_size", tp)
    num_chunks = pp * parallel.num_chunks
    if model.num_layers is not None and model.num_layers < num_chunks:
        yield (
            "model.num_layers",
            f"model.num_layers ({model.num_layers}) must be at least pipeline x virtual pipeline size "
            f"({pp} x {parallel.num_chunks} = {num_chunks}), a layer a chunk; split it less",
        )
    if (
        model.hidden_size
        and model.num_attention_heads
        and model.hidden_size % model.num_attention_heads == 0
        and model.head_dim % 2
    ):
        yield (
            "model.hidden_size",
            f"model.hidden_size / num_attention_heads ({model.head_dim}) must be even for RoPE",
        )
    if model.rope_scaling is not None:
        kind = model.rope_scaling.get("rope_type", model.rope_scaling.get("type"))
        needed = {
            "linear": {"factor"},
            "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        }
        if kind not in needed:
            yield "model.rope_scaling", f"model.rope_scaling: kind {kind!r} is not supported; linear and llama3 are"
            return
        if missing := sorted(needed[kind] - set(model.rope_scaling)):
            yield "model.rope_scaling", f"model.rope_scaling of kind {kind} lacks {', '.join(missing)}"
        for key in sorted(needed[kind] & set(model.rope_scaling)):
            value = model.rope_scaling[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                yield (
                    "model.rope_scaling",
                    f"model.rope_scaling.{key} ({_shown(value)}) must be a number above 0, such as 8.0",
                )
                return
        low, high = (model.rope_scaling.get(f"{edge}_freq_factor", 0) for edge in ("low", "high"))
        if kind == "llama3" and not missing and high <= low:
            yield (
                "model.rope_scaling",
                f"model.rope_scaling.high_freq_factor ({high}) must be above low_freq_factor ({low})",
            )


def _head_of(config: RunConfig) -> Head:
    """The task's: what `model.load` names may have another one, which is then left out or made anew."""
    return "value" if config.task == "reward" else "language_model"


def _not_built(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What the config format has a place for and the code does not do yet: refused, never ignored."""
    parallel, training, checkpoint = config.parallel, config.training, config.checkpoint
    if parallel.context_parallel_size != 1:
        value = parallel.context_parallel_size
        yield "parallel.context_parallel_size", f"context_parallel_size ({value}): only 1 is supported"
    for number, phase in enumerate(training.phases):
        if phase.train_only is not None and config.task == "ppo":
            names = ", ".join(phase.train_only)
            yield (
                "training.phases",
                f"training.phases[{number}].train_only ({names}): only null is supported in task ppo",
            )
    if checkpoint.hf_interval and config.task == "ppo":
        yield "checkpoint.hf_interval", f"hf_interval ({checkpoint.hf_interval}): task ppo supports 0 only"
    if config.task != "ppo":
        if config.roles is not None:
            yield "roles", f"roles: only task ppo has roles, and task is {config.task}; leave them out"
        if config.ppo is not None:
            yield "ppo", f"ppo: only task ppo has this section, and task is {config.task}; leave it out"
    if config.task != "reward" and config.reward is not None:
        yield "reward", f"reward: only task reward has this section, and task is {config.task}; leave it out"


@dataclass(frozen=True)
class PlacedRole:
    """One PPO role, settled: its sections with what they leave out filled in, and its ranks in their order."""

    name: RoleName
    ranks: tuple[int, ...]
    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig | None  # None where the weights stay as they are
    micro_batch_tokens: int
    chat_template: str | None = None


def role_names(config: RunConfig) -> tuple[RoleName, ...]:
    """The roles that a PPO run has; a function may stand in for the reward model."""
    has_function = config.ppo is not None and config.ppo.reward_function is not None
    return ROLE_NAMES[:-1] if has_function else ROLE_NAMES


def placed_roles(config: RunConfig, *, world_size: int) -> dict[RoleName, PlacedRole]:
    """The roles of a checked config over a world of `world_size` ranks."""
    assert config.roles is not None, "the config's rules ask for roles"
    ranks = _ranks_of_roles(config.roles, role_names(config), world_size=world_size)
    return {
        name: PlacedRole(
            name,
            tuple(ranks[name]),
            *role_sections(config, name),
            optimizer=_merged(config.optimizer, config.roles[name].optimizer) if name in TRAINED_ROLES else None,
            micro_batch_tokens=config.roles[name].micro_batch_tokens or config.training.micro_batch_tokens,
            chat_template=config.roles[name].chat_template or config.data.chat_template,
        )
        for name in role_names(config)
    }


def role_sections(config: RunConfig, name: RoleName) -> tuple[ModelConfig, ParallelConfig]:
    """A role's model and layout: its own keys, the run's sections for the rest."""
    role = (config.roles or {}).get(name, RoleConfig())
    model = _merged(config.model, role.model).model_copy(update={"head": HEAD_OF_ROLE[name]})
    return model, _merged(config.parallel, role.parallel)


def _merged(section: SectionType, changes: SectionType) -> SectionType:
    return section.model_copy(update={name: getattr(changes, name) for name in changes.model_fields_set})


def _ranks_of_roles(
    roles: dict[RoleName, RoleConfig], names: Sequence[RoleName], *, world_size: int
) -> dict[RoleName, list[int]]:
    """Global ranks of each role; shares follow one another. Raises ValueError whose text begins with the key."""
    ranks: dict[RoleName, list[int]] = {}
    taken = 0.0
    for name in names:
        role = roles[name]
        if role.ranks is not None:
            ranks[name] = parsed_ranks(role.ranks, key=f"roles.{name}.ranks")
            continue
        assert role.share is not None, "a role has ranks or a share"
        first, taken = taken * world_size, taken + role.share
        last = taken * world_size
        if abs(first - round(first)) > 1e-6 * world_size or abs(last - round(last)) > 1e-6 * world_size:
            raise ValueError(
                f"roles.{name}.share ({role.share:g}) of {world_size} ranks is no whole number of ranks from "
                f"{first:g} to {last:g}; give shares that are, or ranks"
            )
        ranks[name] = list(range(round(first), round(last)))
    return ranks


def parsed_ranks(value: int | str, *, key: str) -> list[int]:
    """[0, 2, 3] of 0, "0-1" or "0,2-3". Raises ValueError whose text begins with the key."""
    ranks: list[int] = []
    for part in str(value).replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f'{key} ({_shown(value)}) must be a rank or ranges of ranks, such as 0, "0-1" or "0,2-3"')
        ranks += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"{key} ({_shown(value)}) names a rank twice")
    return ranks


def _ppo_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """What a PPO run needs, role by role."""
    ppo, roles = config.ppo or PPOConfig(), config.roles or {}
    if ppo.prompts is None:
        yield "ppo.prompts", "ppo.prompts is missing; name a jsonl file of rows with a prompt"
    if config.data.tokenizer is None:
        yield "data.tokenizer", "data.tokenizer is missing; prompts are text, and answers end with its end token"
    if ppo.rollout_batch_size % ppo.mini_batch_size:
        yield (
            "ppo.mini_batch_size",
            f"ppo.mini_batch_size ({ppo.mini_batch_size}) must divide rollout_batch_size ({ppo.rollout_batch_size}); "
            f"nearest: {_nearest_divisors(ppo.mini_batch_size, ppo.rollout_batch_size)}",
        )
    if ppo.kl_loss_coef and ppo.kl_coef:
        yield (
            "ppo.kl_loss_coef",
            f"ppo.kl_loss_coef ({ppo.kl_loss_coef}) and ppo.kl_coef ({ppo.kl_coef}) would count the divergence twice; "
            f"set one of them to 0",
        )
    if ppo.kl_target is not None and not ppo.kl_coef:
        yield "ppo.kl_target", f"ppo.kl_target ({ppo.kl_target:g}) adapts kl_coef, which is 0; give it a start above 0"
    if ppo.reward_function is not None and not re.fullmatch(r"[^\0:]+\.py:[A-Za-z_]\w*", ppo.reward_function):
        yield "ppo.reward_function", f"ppo.reward_function ({ppo.reward_function}) must be FILE.py:FUNCTION"
    if ppo.reward_function is not None and ppo.reward_normalization == "stored":
        yield (
            "ppo.reward_normalization",
            "ppo.reward_normalization (stored): a function has no stored statistics; take running or none",
        )
    training, runtime = config.training, config.runtime
    for key, value, why in (  # refused, as nothing would come of them
        ("training.eval_interval", training.eval_interval, "task ppo evaluates nothing by itself"),
        ("training.epochs", training.epochs, "task ppo counts in train_iters"),
        ("training.phases", training.phases, "task ppo has one phase"),
        ("runtime.profile", runtime.profile, "task ppo is not profiled yet"),
    ):
        if value:
            yield key, f"{key}: {why}; leave it out"
    names = role_names(config)
    for name in ROLE_NAMES:
        if name not in names and name in roles:
            yield f"roles.{name}", "roles.reward: ppo.reward_function stands in for it; leave one of them out"
        elif name in names and name not in roles:
            yield f"roles.{name}", f"roles.{name} is missing; task ppo has the roles {', '.join(names)}"
    for name in (name for name in names if name in roles):
        yield from _role_rules(config, name)
    if all(name in roles and (roles[name].ranks is None) != (roles[name].share is None) for name in names):
        yield from _placement_rules(config, world_size=world_size)


def _role_rules(config: RunConfig, name: RoleName) -> Iterator[tuple[str, str]]:
    assert config.roles is not None, "it has this role"
    role = config.roles[name]
    if (role.ranks is None) == (role.share is None):
        yield f"roles.{name}", f"roles.{name} needs either ranks or a share of the world"
    model, parallel = role_sections(config, name)
    if role.model.load is None and config.model.load is None and model.num_layers is None:
        yield f"roles.{name}.model.load", f"roles.{name}.model.load is missing; name the weights that it starts from"
    rules = [*_shape_rules(model, parallel), *_layout_rules(parallel)]
    if name in TRAINED_ROLES:
        rules += _schedule_rules(_merged(config.optimizer, role.optimizer))
    for key, text in rules:
        yield f"roles.{name}.{key}", f"roles.{name}: {text}"
    if parallel.context_parallel_size != 1:
        yield (
            f"roles.{name}.parallel.context_parallel_size",
            f"roles.{name}: context_parallel_size ({parallel.context_parallel_size}): only 1 is supported",
        )
    if parallel.num_chunks > 1:
        yield (
            f"roles.{name}.parallel.virtual_pipeline_model_parallel_size",
            f"roles.{name}: virtual_pipeline_model_parallel_size ({parallel.num_chunks}): only null is supported",
        )


def _placement_rules(config: RunConfig, *, world_size: int | None) -> Iterator[tuple[str, str]]:
    """Ranks are there, used, and as many as the layouts need. Without a world size: as far as ranks are named."""
    assert config.roles is not None, "it has roles"
    names = role_names(config)
    shares = [config.roles[name].share for name in names]
    if sum(filter(None, shares)) > 1 + 1e-9:
        yield "roles", f"roles: shares sum to {sum(filter(None, shares)):g}, at most 1; name ranks that roles share"
        return
    if world_size is None and any(share is not None for share in shares):
        return
    try:
        ranks = _ranks_of_roles(config.roles, names, world_size=world_size or 0)
    except ValueError as error:
        yield str(error).split(" ", 1)[0], str(error)
        return
    for name in names:
        unit = role_sections(config, name)[1].model_parallel_size
        if len(ranks[name]) % unit:
            yield (
                f"roles.{name}",
                f"roles.{name} has {len(ranks[name])} ranks, which must be a multiple of its tensor x pipeline "
                f"parallel size ({unit}); nearest: {_nearest_multiples(len(ranks[name]), unit)}",
            )
        if world_size is not None and (beyond := [rank for rank in ranks[name] if rank >= world_size]):
            yield (
                f"roles.{name}.ranks",
                f"roles.{name}.ranks ({config.roles[name].ranks}) names rank {beyond[0]}, and the world has "
                f"{world_size}, from 0 to {world_size - 1}",
            )
    used = {rank for of_role in ranks.values() for rank in of_role}
    idle = sorted(set(range(world_size if world_size is not None else max(used) + 1)) - used)
    if idle:
        yield "roles", f"roles: no role has rank {', '.join(map(str, idle[:8]))}; every rank of the world needs one"


def _world_rule(parallel: ParallelConfig, world_size: int) -> str:
    unit = parallel.model_parallel_size
    return (
        f"world size ({world_size}) must be a multiple of tensor x pipeline x context parallel size "
        f"({parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size} x "
        f"{parallel.context_parallel_size} = {unit}); nearest: {_nearest_multiples(world_size, unit)}"
    )


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below}, {below + unit}" if below else f"{below + unit}"


def _nearest_divisors(value: int, whole: int) -> str:
    divisors = [number for number in range(1, whole + 1) if whole % number == 0]
    below, above = [n for n in divisors if n < value][-1:], [n for n in divisors if n > value][:1]
    return ", ".join(map(str, below + above))


def _validate(values: dict[str, Any]) -> tuple[RunConfig, dict[str, str]]:
    """The config of `values`, and a sentence for every key that is refused: those have their defaults in the config."""
    try:
        return RunConfig.model_validate(values), {}
    except ValidationError as error:
        details = error.errors()
    refused: dict[str, str] = {}
    kept = copy.deepcopy(values)
    for detail in details:
        location, value = _given_part(detail["loc"], values)
        name = ".".join(map(str, location))
        message = _message(detail, location)
        if name not in refused:
            shown = "" if message.startswith(UNKNOWN_KEY) else f" ({_shown(value)})"
            refused[name] = f"{name}{shown}: {message}"
        elif message not in refused[name]:  # a key of several types has one record for each
            refused[name] += f", or {message}"
        section = kept.get(location[0])
        if len(location) > 1 and isinstance(section, dict):
            section.pop(location[1], None)
        else:
            kept.pop(location[0], None)
    return RunConfig.model_validate(kept), refused


def _given_part(location: tuple[Any, ...], values: Any) -> tuple[tuple[Any, ...], Any]:
    """The leading part of pydantic's location that stands in the file, and its value; types it tried come after."""
    for depth, part in enumerate(location):
        is_item = isinstance(values, list) and isinstance(part, int)
        if not is_item and not (isinstance(values, dict) and part in values):
            return location[:depth], values
        values = values[part]
    return location, values


def _message(detail: Any, location: tuple[Any, ...]) -> str:
    """The rule that pydantic's record tells of, in this file's words."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key([str(part) for part in location])
    if kind == "missing":
        return f"{detail['loc'][-1]} is missing"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    for start, rule in RULES_BY_KIND.items():
        if kind.startswith(start):
            return rule
    message = str(detail["msg"]).replace("Input should", "must", 1)
    return message[0].lower() + message[1:]


def _depends_on(name: str, text: str, refused: str) -> bool:
    """Whether a rule speaks of a key that was refused, and so of a default that stands in its place."""
    key = ".".join(refused.split(".")[:2])
    return name.startswith(f"{key}.") or re.search(rf"\b{re.escape(key.split('.')[-1])}\b", text) is not None


def _shown(value: Any) -> str:
    """A value as the file would have it, short."""
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value) if value is None or value == "" or isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown_key(location: list[str]) -> str:
    """Names the nearest key, the section that has this one, or the tool that has what we leave out."""
    *sections, key = location
    key = key.replace("-", "_").removeprefix("__")
    for pattern, text in OUT_OF_SCOPE.items():
        if re.fullmatch(pattern, key):
            return text
    if key in OTHER_SPELLINGS:
        return f"unknown key; here it is {OTHER_SPELLINGS[key]}"
    section = _section_of(sections)
    elsewhere = [name for name, model in SECTIONS.items() if key in model.model_fields and [name] != sections]
    if key in RunConfig.model_fields and sections:
        return f"unknown key here; {key} stands at the top level"
    if elsewhere:
        return f"unknown key here; {key} belongs to section {' or '.join(elsewhere)}"
    known = list(section.model_fields) if section else []
    if section and key in known:
        return f"unknown key; it is spelled {key}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    everywhere = {field: name for name, model in SECTIONS.items() for field in model.model_fields}
    near = difflib.get_close_matches(key, list(everywhere), n=1, cutoff=0.75)
    if near:
        return f"unknown key; did you mean {everywhere[near[0]]}.{near[0]}?"
    return f"unknown key; known here: {', '.join(known)}" if known else "unknown key"


def _section_of(sections: list[str]) -> type[Section] | None:
    """The model of the section that lies at this path."""
    if not sections:
        return RunConfig
    if sections[:2] == ["training", "phases"]:
        return Phase
    return RoleConfig if sections[0] == "roles" and len(sections) == 2 else SECTIONS.get(sections[-1])
