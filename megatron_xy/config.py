"""Every section of a run as typed models: defaults, units, checks; from a YAML file and overrides to a `RunConfig`.

Nothing here imports torch: `check`, `plan` and `--help` answer in under a second. All problems of a file come in one
report, each with its line, value, rule and remedy.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_xy.errors import ConfigError


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """Shape and numerics of one Llama-shaped model. Shape keys may be left out where `load: hf:DIR` gives them."""

    load: str | None = Field(None, pattern=r"^(ckpt|hf):.+", description="ckpt:DIR | hf:DIR; weights only")
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
    init_method_std: float = Field(0.02, gt=0, description="standard deviation of fresh weights")
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    layer_spec: Literal["auto", "torch", "transformer_engine"] = "auto"
    recompute_granularity: Literal["none", "selective", "full"] = "none"

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
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class DataConfig(Section):
    """What `data build` wrote, and how it is drawn from."""

    path: Path | list[Path] | None = None
    weights: dict[str, float] | None = Field(None, description="{source: weight}; null: as many tokens as each holds")
    tokenizer: Path | None = None
    split_documents: bool = Field(True, description="attention and positions stop at document borders")
    eval_path: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """`path` as a list."""
        if self.path is None:
            return []
        return self.path if isinstance(self.path, list) else [self.path]


class Phase(Section):
    """From data step `from_iter` on, other weights, batch size or trained part."""

    from_iter: int = Field(ge=0)
    weights: dict[str, float] | None = None
    global_batch_tokens: int | None = Field(None, ge=1)
    train_only: list[Literal["embedding", "output_layer"]] | None = None


class TrainingConfig(Section):
    """How long, and with how many tokens a step."""

    train_iters: int = Field(100, ge=1)
    global_batch_tokens: int = Field(16384, ge=1, description="a step on bucket b takes this / b sequences")
    micro_batch_tokens: int = Field(2048, ge=1, description="a common multiple of all buckets")
    phases: list[Phase] = []
    epochs: int | None = Field(None, ge=1)
    eval_interval: int = Field(0, ge=0, description="iterations; 0: no evaluation")


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(3e-4, ge=0)
    min_lr: float = Field(3e-5, ge=0)
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_iters: int = Field(10, ge=0, description="may exceed train_iters")
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    weight_decay: float = Field(0.1, ge=0, description="not applied to norms")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)


class CheckpointConfig(Section):
    """When checkpoints are written, and from which one a run goes on."""

    save_interval: int = Field(50, ge=1, description="iterations")
    keep_latest: int = Field(2, ge=1)
    async_save: bool = Field(True, description="write while training goes on")
    hf_interval: int = Field(0, ge=0)
    resume: Literal["auto", "never"] | int = Field("auto", description="auto | never | ITERATION")


class RuntimeConfig(Section):
    """The processes themselves."""

    timeout_seconds: float = Field(120, gt=0, description="of every collective")
    num_threads: int = Field(1, ge=1, description="CPU threads a rank")
    deterministic: bool = False


class RoleConfig(Section):
    """One PPO role: its ranks and what differs from the run's own sections."""

    ranks: int | str | None = None
    share: float | None = Field(None, gt=0, le=1)
    model: dict[str, Any] = {}
    parallel: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    micro_batch_tokens: int | None = Field(None, ge=1)


class PPOConfig(Section):
    """The algorithm's own numbers."""

    prompts: Path | None = None
    rollout_batch_size: int = Field(64, ge=1)
    mini_batch_size: int = Field(32, ge=1)
    ppo_epochs: int = Field(1, ge=1)
    max_response_length: int = Field(512, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    kl_coef: float = Field(0.05, ge=0)
    gamma: float = Field(1.0, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip_ratio: float = Field(0.2, gt=0)
    value_clip: float = Field(0.2, gt=0)
    responses: Path | None = None
    dump_rollouts: bool = False


class RunConfig(Section):
    """A whole run.yaml."""

    task: Literal["pretrain", "sft", "reward", "ppo"] = "pretrain"
    seed: int = Field(1234, ge=0)
    run_dir: Path = Path("runs/default")
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    roles: dict[Literal["actor", "critic", "reference", "reward"], RoleConfig] | None = None
    ppo: PPOConfig | None = None


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "runtime": RuntimeConfig,
    "ppo": PPOConfig,
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
        return f"{self.where}: {self.text}"


class InvalidConfig(ConfigError):
    """A config with one or more problems; prints all of them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  {problem}" for problem in self.problems))


def load_config(path: Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads `path`, applies `section.key=value` overrides in order and returns the checked config.

    Raises InvalidConfig with every problem at once; sizes that depend on the world are checked by `check_world`.
    """
    values, lines = read_yaml(path)
    for override in overrides:
        _apply_override(values, lines, override)
    problems: list[Problem] = []
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_problem_of(detail, lines, path) for detail in error.errors()]
        raise InvalidConfig(problems) from None
    problems = [Problem(lines.where(name, path), text) for name, text in _rules(config)]
    if problems:
        raise InvalidConfig(problems)
    return config


def run_dir_of(path: Path, *, overrides: Sequence[str] = ()) -> Path | None:
    """The run folder that a config names, even where the rest of it is wrong; None if it names none."""
    try:
        values, lines = read_yaml(path)
        for override in overrides:
            _apply_override(values, lines, override)
    except ConfigError:
        return None
    value = values.get("run_dir", RunConfig.model_fields["run_dir"].default)
    return Path(value) if isinstance(value, str | Path) and str(value) else None


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML, defaults included: what RUN/run.yaml holds."""
    return yaml.safe_dump(json.loads(config.model_dump_json(exclude_none=False)), sort_keys=False)


def data_parallel_size(parallel: ParallelConfig, *, world_size: int) -> int:
    """Replicas of the model over `world_size` ranks; raises InvalidConfig where that does not divide."""
    if world_size % parallel.model_parallel_size:
        raise InvalidConfig([Problem("parallel", _world_rule(parallel, world_size))])
    return world_size // parallel.model_parallel_size


def check_world(config: RunConfig, *, world_size: int) -> None:
    """The rules that need the number of ranks; raises InvalidConfig."""
    parallel, training = config.parallel, config.training
    size = data_parallel_size(parallel, world_size=world_size)
    unit = training.micro_batch_tokens * size
    if training.global_batch_tokens % unit:
        rule = (
            f"training.global_batch_tokens ({training.global_batch_tokens}) must be a multiple of micro_batch_tokens "
            f"x data parallel size ({training.micro_batch_tokens} x {size} = {unit}); "
            f"nearest: {_nearest_multiples(training.global_batch_tokens, unit)}"
        )
        raise InvalidConfig([Problem("training.global_batch_tokens", rule)])


def check_shape(config: RunConfig) -> None:
    """The rules of the model's shape once it is complete: `model.load` has filled it in. Raises InvalidConfig."""
    problems = [Problem(name, text) for name, text in _shape_rules(config.model, config.parallel)]
    if problems:
        raise InvalidConfig(problems)


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


def _rules(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every rule between keys that does not hold, and of what is not built yet."""
    yield from _not_built(config)
    yield from _shape_rules(config.model, config.parallel)
    training, data, parallel = config.training, config.data, config.parallel
    if training.global_batch_tokens % training.micro_batch_tokens:
        yield (
            "training.global_batch_tokens",
            f"training.global_batch_tokens ({training.global_batch_tokens}) must be a multiple of micro_batch_tokens "
            f"({training.micro_batch_tokens}); nearest: "
            f"{_nearest_multiples(training.global_batch_tokens, training.micro_batch_tokens)}",
        )
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and training.micro_batch_tokens % tp:
        yield (
            "training.micro_batch_tokens",
            f"training.micro_batch_tokens ({training.micro_batch_tokens}) must be a multiple of "
            f"tensor_model_parallel_size ({tp}) under sequence_parallel; nearest: "
            f"{_nearest_multiples(training.micro_batch_tokens, tp)}",
        )
    if config.optimizer.min_lr > config.optimizer.lr and config.optimizer.lr_decay_style != "constant":
        yield (
            "optimizer.min_lr",
            f"optimizer.min_lr ({config.optimizer.min_lr:g}) must not exceed lr ({config.optimizer.lr:g})",
        )
    if data.weights is not None:
        for source, weight in data.weights.items():
            if weight < 0:
                yield "data.weights", f"data.weights.{source} ({weight:g}) must not be negative; 0 leaves it out"
        if data.weights and not any(weight > 0 for weight in data.weights.values()):
            yield "data.weights", "data.weights: at least one source needs a weight above 0"
    if not data.paths:
        yield "data.path", "data.path is missing; name a folder that `megatron-xy data build` wrote"
    if config.model.load is None:
        for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size"):
            if getattr(config.model, key) is None:
                yield f"model.{key}", f"model.{key} is missing; give it, or model.load: hf:DIR that has it"


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
    yield from divides("num_layers", model.num_layers, "pipeline_model_parallel_size", pp)
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
        elif missing := sorted(needed[kind] - set(model.rope_scaling)):
            yield "model.rope_scaling", f"model.rope_scaling of kind {kind} lacks {', '.join(missing)}"


def _not_built(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What the config format has a place for and the code does not do yet: refused, never ignored."""
    parallel, training, checkpoint = config.parallel, config.training, config.checkpoint
    if config.task != "pretrain":
        yield "task", f"task ({config.task}): only pretrain is supported"
    if parallel.virtual_pipeline_model_parallel_size not in (None, 1):
        value = parallel.virtual_pipeline_model_parallel_size
        yield (
            "parallel.virtual_pipeline_model_parallel_size",
            f"virtual_pipeline_model_parallel_size ({value}): only null is supported",
        )
    if parallel.context_parallel_size != 1:
        value = parallel.context_parallel_size
        yield "parallel.context_parallel_size", f"context_parallel_size ({value}): only 1 is supported"
    for switch in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, switch):
            yield f"parallel.{switch}", f"{switch} (true): only false is supported"
    if config.model.layer_spec == "transformer_engine":
        yield "model.layer_spec", "layer_spec (transformer_engine): only auto and torch are supported"
    if training.phases:
        yield "training.phases", f"training.phases ({len(training.phases)} given): only [] is supported"
    if training.epochs is not None:
        yield "training.epochs", f"training.epochs ({training.epochs}): only null is supported; use train_iters"
    if training.eval_interval:
        yield "training.eval_interval", f"eval_interval ({training.eval_interval}): only 0 is supported"
    if config.data.eval_path is not None:
        yield "data.eval_path", f"eval_path ({config.data.eval_path}): only null is supported"
    if checkpoint.hf_interval:
        yield "checkpoint.hf_interval", f"hf_interval ({checkpoint.hf_interval}): only 0 is supported"
    if config.roles is not None:
        yield "roles", "roles: only task ppo has roles, and it is not supported yet"
    if config.ppo is not None:
        yield "ppo", "ppo: only task ppo has this section, and it is not supported yet"


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


class Lines:
    """Where every key of a YAML file stands, by its dotted path."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def where(self, name: str, path: Path) -> str:
        """FILE:LINE of `name`, or of the nearest section around it that the file has."""
        parts = name.split(".")
        while parts:
            if (key := ".".join(parts)) in self.of:
                return self.of[key]
            parts.pop()
        return str(path)


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A YAML file as plain values and the line of every key. Tags, anchors and aliases are refused."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    lines = Lines()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                mark = event.start_mark
                assert mark is not None, "PyYAML marks every event that it parses"
                raise ConfigError(f"{path}:{mark.line + 1}: YAML anchors and aliases are not accepted; write it out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections such as `model:` and `training:`")
    assert isinstance(node, yaml.MappingNode | None), "a mapping's node is a mapping"
    if node is not None:
        _collect_lines(node, "", path, lines)
    return values, lines


def _collect_lines(node: yaml.MappingNode, prefix: str, path: Path, lines: Lines) -> None:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines.of:
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {name} is given twice (first at {lines.of[name]})")
        lines.of[name] = f"{path}:{key.start_mark.line + 1}"
        if isinstance(value, yaml.MappingNode):
            _collect_lines(value, f"{name}.", path, lines)


def _apply_override(values: dict[str, Any], lines: Lines, override: str) -> None:
    """Sets one `section.key=value` in `values`; the value is read as YAML."""
    name, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", name):
        raise ConfigError(f"{override!r} is no override; write section.key=value, such as training.train_iters=200")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {getattr(error, 'problem', error)}") from None
    *sections, key = name.replace("-", "_").split(".")
    target = values
    for section in sections:
        child = target.setdefault(section, {})
        if child is None:
            child = target[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {section} is not a section")
        target = child
    target[key] = value
    lines.of[".".join([*sections, key])] = f"override {override}"


def _problem_of(detail: Any, lines: Lines, path: Path) -> Problem:
    """Pydantic's error record as a sentence with the value, the rule and the remedy."""
    location = [str(part) for part in detail["loc"]]
    name = ".".join(location)
    where = lines.where(name, path)
    if detail["type"] == "extra_forbidden":
        return Problem(where, f"{name}: {_unknown_key(location)}")
    value = detail.get("input")
    shown = "missing" if detail["type"] == "missing" else f"{value!r}" if not isinstance(value, dict) else "a section"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(where, f"{name} ({shown}): {message}")


def _unknown_key(location: list[str]) -> str:
    """Names the nearest key, the section that has this one, or the tool that has what we leave out."""
    *sections, key = location
    key = key.replace("-", "_").removeprefix("__")
    for pattern, text in OUT_OF_SCOPE.items():
        if re.fullmatch(pattern, key):
            return text
    if key in OTHER_SPELLINGS:
        return f"unknown key; here it is {OTHER_SPELLINGS[key]}"
    section = SECTIONS.get(sections[-1]) if sections else RunConfig
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
