"""From run.yaml and overrides to a RunConfig: defaults, every kind of mistake with its line, value, rule and remedy."""

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.config import (
    InvalidConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    check_buckets,
    check_shape,
    check_world,
    data_parallel_size,
    dump_config,
    load_config,
    run_dir_of,
)
from megatron_xy.config.sections import SECTIONS, RoleConfig
from megatron_xy.config.unknown_keys import OTHER_SPELLINGS
from megatron_xy.errors import EXIT_BAD_CONFIG, ConfigError, StorageError, UsageError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import config_reference

SMALLEST = """\
run_dir: runs/small
model:
  num_layers: 4
  hidden_size: 64
  ffn_hidden_size: 128
  num_attention_heads: 4
  vocab_size: 512
data:
  path: runs/data
"""

# Every key that a run.yaml may have, with the values that stand for a tiny run.
EVERY_KEY = """\
task: pretrain
seed: 1234
run_dir: runs/tiny
model:
  load: null
  num_layers: 4
  hidden_size: 128
  ffn_hidden_size: 352
  num_attention_heads: 4
  num_query_groups: 2
  vocab_size: 8192
  max_position_embeddings: 2048
  rotary_base: 10000
  rope_scaling: null
  norm_epsilon: 1.0e-5
  untie_embeddings_and_output_weights: true
  params_dtype: fp32
  layer_spec: auto
  recompute_granularity: none
parallel:
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 2
  virtual_pipeline_model_parallel_size: null
  context_parallel_size: 1
  sequence_parallel: true
  use_distributed_optimizer: false
  overlap_grad_reduce: false
  overlap_param_gather: false
data:
  path: runs/data
  weights: null
  tokenizer: tokenizer.model
  split_documents: true
  eval_path: null
training:
  train_iters: 100
  global_batch_tokens: 16384
  micro_batch_tokens: 2048
  phases: []
  epochs: null
  eval_interval: 0
optimizer: {lr: 3.0e-4, min_lr: 3.0e-5, lr_decay_style: cosine, lr_warmup_iters: 10, clip_grad: 1.0, weight_decay: 0.1,
  adam_beta1: 0.9, adam_beta2: 0.95, adam_eps: 1.0e-8}
checkpoint: {save_interval: 50, keep_latest: 2, async_save: true, hf_interval: 0, resume: auto}
runtime: {timeout_seconds: 120, num_threads: 1, deterministic: false}
"""

# Keys beside those, each with its line in docs/decisions.md.
OF_OUR_OWN = {
    "init_method_std", "head", "add_qkv_bias", "allow_changes", "lr_warmup_tokens", "lr_warmup_init", "lr_decay_iters",
    "lr_decay_tokens", "lr_wsd_decay_iters", "lr_wsd_decay_tokens", "lr_wsd_decay_style", "spike_policy",
    "spike_sigmas", "max_skipped_in_a_row", "max_epochs", "profile", "profile_ranks", "chat_template",
    "chat_overflow", "last_turn_only", "wandb_project",
}  # fmt: skip

ROLES = """\
roles:
  actor: {ranks: "0-1", model: {}, parallel: {}, optimizer: {}, micro_batch_tokens: 2048}
  critic: {share: 0.5}
  reference: {ranks: 0}
  reward: {ranks: "0,2-3"}
ppo: {prompts: FILE, rollout_batch_size: 64, mini_batch_size: 32, ppo_epochs: 1, max_response_length: 512,
  temperature: 1.0, top_p: 1.0, top_k: 0, kl_coef: 0.05, gamma: 1.0, gae_lambda: 0.95, clip_ratio: 0.2, value_clip: 0.2,
  responses: null, dump_rollouts: false}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """The smallest valid config."""
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    """The sentences, without their places, of what is wrong."""
    with pytest.raises(InvalidConfig) as caught:
        load_config(path, overrides=overrides, world_size=world_size)
    assert caught.value.exit_code == EXIT_BAD_CONFIG
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    return [problem.text for problem in caught.value.problems]


def problem_of(path: Path, *overrides: str) -> str:
    """The one thing that is wrong."""
    (text,) = problems_of(path, *overrides)
    return text


# Defaults


def test_every_key_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EVERY_KEY)
    config = load_config(path, world_size=4)
    given = yaml.safe_load(EVERY_KEY)
    for name, section in SECTIONS.items():
        if name not in ("ppo", "reward"):  # a section of our own
            assert set(section.model_fields) - set(given[name]) <= OF_OUR_OWN, "a key that nobody may rely on"
    assert set(RunConfig.model_fields) == {*given, "roles", "ppo", "reward"}
    assert config.optimizer.adam_eps == 1e-8 and config.parallel.sequence_parallel


def test_defaults(run_yaml: Path) -> None:
    config = load_config(run_yaml)
    every = yaml.safe_load(EVERY_KEY)
    assert config.parallel == ParallelConfig()
    for key, value in config.parallel.model_dump().items():
        assert value == (1 if key.endswith("_size") and "virtual" not in key else None if "virtual" in key else False)
    for name in ("optimizer", "checkpoint", "runtime", "training"):
        values = getattr(config, name).model_dump()
        assert {key: values[key] for key in every[name]} == every[name]
    shape = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size"}
    for key, value in every["model"].items():
        if key not in shape:
            assert getattr(config.model, key) == value
    assert config.model.num_query_groups is None and config.model.head_dim == 16
    assert (config.task, config.seed, config.data.split_documents) == ("pretrain", 1234, True)
    assert config.roles is None and config.ppo is None


def test_empty_sections_and_an_empty_file(run_yaml: Path, tmp_path: Path) -> None:
    run_yaml.write_text(SMALLEST + "parallel:\noptimizer:\nruntime:\n")
    assert load_config(run_yaml).parallel == ParallelConfig()
    assert RoleConfig.model_validate({"model": None, "parallel": None, "optimizer": None}) == RoleConfig()

    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing yet\n")
    missing = [text.split(" is missing")[0] for text in problems_of(empty)]
    assert missing == [
        "data.path",
        *(
            f"model.{key}"
            for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
        ),
    ]


def test_shape_may_come_from_loaded_weights(run_yaml: Path) -> None:
    config = load_config(run_yaml, overrides=["model={load: 'hf:models/base'}"])
    assert config.model.load == "hf:models/base" and config.model.num_layers is None


def test_config_cannot_be_changed(run_yaml: Path) -> None:
    config = load_config(run_yaml)
    with pytest.raises(ValueError, match="frozen"):
        config.training.train_iters = 5  # type: ignore[misc]


# Overrides


def test_min_lr_left_out_is_no_higher_than_lr(run_yaml: Path) -> None:
    config = load_config(run_yaml, overrides=["optimizer.lr=1e-6"])
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-6, 1e-6)
    assert load_config(run_yaml, overrides=["optimizer.lr=0"]).optimizer.min_lr == 0
    run_yaml.write_text(dump_config(config))
    assert load_config(run_yaml) == config
    assert problem_of(run_yaml, "optimizer.lr=-1") == "optimizer.lr (-1): must be greater than or equal to 0"


def test_overrides_the_last_counts(run_yaml: Path) -> None:
    config = load_config(
        run_yaml,
        overrides=[
            "training.train_iters=5",
            "seed=7",
            "training.train_iters=6",
            "training.train-iters=8",
            "run_dir=a=b",
        ],
    )
    assert config.training.train_iters == 8
    assert config.seed == 7
    assert config.run_dir == Path("a=b")


def test_overrides_read_values_as_yaml(run_yaml: Path) -> None:
    config = load_config(
        run_yaml,
        overrides=[
            "optimizer.lr=1e-3",
            "optimizer.min_lr=1.0e-4",
            "data.path=[runs/a, runs/b]",
            "data.weights.wiki-en=0.25",
            "data.weights.code=1e0",
            "parallel.sequence_parallel=true",
            "model.num_query_groups=null",
            "checkpoint.resume=40",
        ],
    )
    assert (config.optimizer.lr, config.optimizer.min_lr) == (1e-3, 1e-4)
    assert config.data.paths == [Path("runs/a"), Path("runs/b")]
    assert config.data.weights == {"wiki-en": 0.25, "code": 1.0}
    assert config.parallel.sequence_parallel
    assert config.checkpoint.resume == 40


def test_override_of_a_whole_section_replaces_it(run_yaml: Path) -> None:
    run_yaml.write_text(SMALLEST + "optimizer:\n  lr: 1.0e-3\n  clip_grad: 0.5\n")
    config = load_config(run_yaml, overrides=["optimizer={lr: 2.0e-3}"])
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (2e-3, 1.0)
    with pytest.raises(InvalidConfig) as caught:
        load_config(run_yaml, overrides=["optimizer={lr: 2.0e-3, min_lr: 1}"])
    assert caught.value.problems[0].where == "override optimizer={lr: 2.0e-3, min_lr: 1}"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.train_iters", "write section.key=value"),
        ("=5", "write section.key=value"),
        (".a=5", "write section.key=value"),
        ("training..a=5", "write section.key=value"),
        ("--seed=5", "write section.key=value"),
        ("seed.x=5", "seed is not a section"),
        ("training.train_iters.x=5", "training.train_iters is not a section"),
        ("training.train_iters=[5", "not valid YAML"),
        ("seed=!!int 5", "tags are not accepted"),
        ("seed=&a 5", "anchors"),
        ("data.weights={a: 1, a: 2}", "a is given twice"),
        ("data.weights={yes: 1}", "the key yes must be text; put it in quotes"),
        ("data.weights={[a]: 1}", "a key must be text; put it in quotes"),
        ("seed=2024-13-01", "not valid YAML"),
    ],
)
def test_bad_overrides(run_yaml: Path, override: str, text: str) -> None:
    run_yaml.write_text(SMALLEST + "seed: 1\ntraining:\n  train_iters: 3\n")
    with pytest.raises(InvalidConfig) as caught:
        load_config(run_yaml, overrides=[override, "no_such_key=1"])
    bad, unknown = caught.value.problems
    assert bad.where == f"override {override}" and text in bad.text
    assert unknown.text.startswith("no_such_key: unknown key"), "a bad override hides nothing else"


# Unknown keys


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.num_layer=4", "model.num_layer: unknown key; did you mean num_layers?"),
        ("trainig.train_iters=4", "trainig: unknown key; did you mean training?"),
        ("training.lr=4", "training.lr: unknown key here; lr belongs to section optimizer"),
        ("train_iters=4", "train_iters: unknown key here; train_iters belongs to section training"),
        ("model.seed=4", "model.seed: unknown key here; seed stands at the top level"),
        ("model.wieght_decay=4", "model.wieght_decay: unknown key; did you mean optimizer.weight_decay?"),
        ("training.seq_length=4096", "training.seq_length: unknown key; here it is training.micro_batch_tokens"),
        ("model.rope_theta=1", "model.rope_theta: unknown key; here it is model.rotary_base"),
        ("training.phases=[{from_iter: 1, weigths: {}}]", "did you mean weights?"),
        ("runtime.zzz=1", "known here: timeout_seconds, num_threads, deterministic"),
        ("model.num_experts=8", "mixture of experts is not part of megatron_xy; Megatron-LM has it"),
        ("model.moe_router_topk=2", "mixture of experts is not part"),
        ("parallel.expert_model_parallel_size=2", "mixture of experts is not part"),
        ("model.multi_latent_attention=true", "latent attention is not part of megatron_xy; Megatron-LM has it"),
        ("lora.rank=8", "adapters are not part of megatron_xy"),
        ("dpo.beta=0.1", "DPO and GRPO are not part of megatron_xy, which learns preferences by tasks reward"),
        ("model.fp8=e4m3", "FP8 is not part of megatron_xy; Megatron-LM has it"),
    ],
)
def test_unknown_keys(run_yaml: Path, override: str, text: str) -> None:
    assert any(text in problem for problem in problems_of(run_yaml, override))


@pytest.mark.parametrize("key", ["null", "2024-01-01", "1", "yes"])
def test_keys_that_are_no_text(run_yaml: Path, key: str) -> None:
    run_yaml.write_text(f"{SMALLEST}{key}: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config(run_yaml)
    assert str(caught.value) == f"{run_yaml}:10: the key {key} must be text; put it in quotes"


def test_keys_with_dashes_in_the_file(run_yaml: Path) -> None:
    run_yaml.write_text(SMALLEST + "training:\n  train-iters: 4\n  --micro-batch-tokens: 2048\n")
    assert problems_of(run_yaml) == [
        "training.train-iters: unknown key; it is spelled train_iters",
        "training.--micro-batch-tokens: unknown key; it is spelled micro_batch_tokens",
    ]


def test_other_spellings_lead_to_keys_that_exist() -> None:
    for text in OTHER_SPELLINGS.values():
        section, _, rest = text.partition(".")
        key = rest.split()[0].rstrip(":") if rest else ""
        if section in SECTIONS:
            assert key in SECTIONS[section].model_fields, text
        else:
            assert section.split()[0] in RunConfig.model_fields, text
    assert not set(OTHER_SPELLINGS) & {key for section in SECTIONS.values() for key in section.model_fields}


# Values


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("seed=true", "seed (true): must not be true or false"),
        ("training.train_iters=false", "training.train_iters (false): must not be true or false"),
        ("optimizer.clip_grad=true", "optimizer.clip_grad (true): must not be true or false"),
        ("data.weights={a: true}", "data.weights.a (true): must not be true or false"),
        ("checkpoint.resume=true", "checkpoint.resume (true): must not be true or false"),
        ("checkpoint.resume=-4",
         "checkpoint.resume (-4): must be 'auto' or 'never', or must be greater than or equal to 1"),
        ("checkpoint.resume=last", "checkpoint.resume (last): must be 'auto' or 'never', or must be a whole number"),
        ("model.num_layers=4.5", "model.num_layers (4.5): must be a whole number"),
        ("model.num_layers=four", "model.num_layers (four): must be a whole number"),
        ("model.num_layers=0", "model.num_layers (0): must be greater than or equal to 1"),
        ("model.num_layers=[4]", "model.num_layers ([4]): must be a whole number"),
        ("seed=-1", "seed (-1): must be greater than or equal to 0"),
        ("seed=" + "9" * 30, f"seed ({'9' * 30}): must fit in 64 bits"),
        ("optimizer.lr=" + "9" * 400, f"optimizer.lr ({'9' * 57}...): must fit in 64 bits"),
        ("optimizer.lr=.nan", "optimizer.lr (nan): must be a finite number"),
        ("optimizer.lr=high", "optimizer.lr (high): must be a number"),
        ("optimizer.adam_beta2=1", "optimizer.adam_beta2 (1): must be less than 1"),
        ("runtime.timeout_seconds=.inf", "runtime.timeout_seconds (inf): must be a finite number"),
        ("runtime.timeout_seconds=0", "runtime.timeout_seconds (0): must be greater than 0"),
        ("data.weights={a: .nan, b: 1}", "data.weights.a (nan): must be a finite number"),
        ("data.tokenizer=~/t",
         "data.tokenizer (~/t): must not begin with ~, which only a shell knows; write the path out"),
        ("run_dir=~/runs", "run_dir (~/runs): must not begin with ~, which only a shell knows; write the path out"),
        ("model={load: 'hf:~/base'}",
         "model.load (hf:~/base): must not begin with ~, which only a shell knows; write the path out"),
        ("run_dir=" + "x" * 256,
         f"run_dir ({'x' * 57}...): must be a path of at most 3800 bytes, 255 between slashes: the names "
         "of files in it need room, too"),
        ("model={load: 'ckpt:" + "x/" * 2048 + "'}",
         f"model.load (ckpt:{'x/' * 26}...): must be a path of at most 3800 bytes, 255 between slashes: the names "
         "of files in it need room, too"),
        ("data.chat_template=''",
         'data.chat_template (""): must not be empty'),
        ("training.phases=[{from_iter: 1, train_only: []}]",
         "training.phases.0.train_only ([]): must not be empty"),
        ("data.weights={a: .inf}", "data.weights.a (inf): must be a finite number"),
        ("data.weights={1: 0.5}", "the value: the key 1 must be text; put it in quotes"),
        ("data.weights=[1]", "data.weights ([1]): must be a section: `key: value` lines below it"),
        ("data.weights={a: -1, b: 2}", "data.weights.a (-1) must not be negative; 0 leaves it out"),
        ("data.weights={a: 0}", "data.weights: at least one source needs a weight above 0"),
        ("data.weights={a: 1e308, b: 1e308}", "data.weights: they add up to infinity; give smaller ones"),
        ("data.weights={}", "data.weights: at least one source needs a weight above 0"),
        ("data.path=5", "data.path (5): must be a path; put it in quotes if it is one, or must be a list"),
        ("data.path=[1, 2]", "data.path ([1, 2]): must be a path; put it in quotes if it is one"),
        ("data.path=[]", "data.path is missing; name a folder that `megatron-xy data build` wrote"),
        ("run_dir=", "run_dir (null): must be a path; put it in quotes if it is one"),
        ("run_dir=''", 'run_dir (""): must be a path; it is empty or holds a NUL character'),
        ("run_dir=2024-01-01", "run_dir (2024-01-01): must be a path; put it in quotes if it is one"),
        ("model.load=models/base", "model.load (models/base): must be ckpt:DIR or hf:DIR"),
        ("model.load=5", "model.load (5): must be text; put it in quotes"),
        ("model.params_dtype=fp16", "model.params_dtype (fp16): must be 'fp32' or 'bf16'"),
        ("parallel.sequence_parallel=often", "parallel.sequence_parallel (often): must be true or false"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel (1): must be true or false"),
        ("parallel.sequence_parallel='yes'", "parallel.sequence_parallel (yes): must be true or false"),
        ("model.head=value", "model.head (value): task pretrain has language_model; leave it out"),
        ("runtime.profile=5", "runtime.profile (5): must be text; put it in quotes"),
        ("runtime.profile='5:5'",
         "runtime.profile (5:5): must be A:B, iterations from A (1 is the first) to B - 1, such as 10:13"),
        ("runtime.profile=101:110",
         "runtime.profile (101:110) begins after the last step, training.train_iters (100); take an earlier window, or "
         "leave it out"),
        ("training.eval_interval=5",
         "data.eval_path is missing; training.eval_interval (5) needs held-out data, such as the held_out folder of "
         "`megatron-xy data build --held-out`"),
        ("training.spike_policy=stop", "training.spike_policy (stop): must be 'log' or 'skip'"),
        ("task=dpo", "task (dpo): must be 'pretrain', 'sft', 'reward' or 'ppo'"),
        *((f"{name}=false", f"{name} (false): must be a section: `key: value` lines below it")
          for name in ("checkpoint", "ppo", "roles", "data.weights", "model.rope_scaling")),
        ("training=5", "training (5): must be a section: `key: value` lines below it"),
        ("optimizer.min_lr=1", "optimizer.min_lr (1) must not exceed lr (0.0003); lower it"),
        ("model.rope_scaling={rope_type: yarn}",
         "model.rope_scaling: kind yarn is not supported; linear and llama3 are"),
        ("model.rope_scaling={type: [1]}",
         "model.rope_scaling: kind [1] is not supported; linear and llama3 are"),
        ("model.rope_scaling={factor: 8}", "model.rope_scaling: kind null is not supported; linear and llama3 are"),
        (f"model.rope_scaling={{rope_type: {'x' * 5000}}}",
         f"model.rope_scaling: kind {'x' * 57}... is not supported; linear and llama3 are"),
        ("model.rope_scaling={type: linear, factor: 2.0, rope_theta: .inf}",
         "model.rope_scaling.rope_theta: unknown key; kind linear has factor"),
        ("model.rope_scaling={type: linear}", "model.rope_scaling of kind linear lacks factor"),
        ("model.rope_scaling={type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 4, "
         "original_max_position_embeddings: 512}",
         "model.rope_scaling.high_freq_factor (4) must be above low_freq_factor (4)"),
        ("checkpoint.hf_interval=60",
         "checkpoint.hf_interval (60) must be a multiple of save_interval (50): an HF folder is made of a checkpoint; "
         "nearest: 50, 100"),
        ("model.rope_scaling={type: linear, factor: x}",
         "model.rope_scaling.factor (x) must be a number above 0 and in 64 bits, such as 8.0"),
        ("model.rope_scaling={type: linear, factor: 100000000000000000000}",
         "model.rope_scaling.factor (100000000000000000000) must be a number above 0 and in 64 bits, such as 8.0"),
        ("runtime.num_threads=1000000", "runtime.num_threads (1000000): must be less than or equal to 1024"),
        ("model.rope_scaling={type: linear, factor: 0}",
         "model.rope_scaling.factor (0) must be a number above 0 and in 64 bits, such as 8.0"),
    ],
)  # fmt: skip
def test_bad_values(run_yaml: Path, override: str, text: str) -> None:
    assert problem_of(run_yaml, override) == text


def test_numbers_that_yaml_reads_as_text_or_the_other_kind(run_yaml: Path) -> None:
    """YAML 1.1 takes 1e-4 for text, 4.0 for a float and 0100 for 64."""
    run_yaml.write_text(SMALLEST.replace("num_layers: 4", "num_layers: 4.0") + "optimizer:\n  lr: 1e-4\n  min_lr: 0\n")
    config = load_config(run_yaml)
    assert config.optimizer.lr == 1e-4
    assert config.model.num_layers == 4 and isinstance(config.model.num_layers, int)
    octal = load_config(run_yaml, overrides=["training.train_iters=0100", "seed=-0", "data.path=0777"])
    assert (octal.training.train_iters, octal.seed, octal.data.paths) == (100, 0, [Path("0777")])


# Rules between keys


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.hidden_size=66"],
         "model.hidden_size (66) must be a multiple of num_attention_heads (4); nearest: 64, 68"),
        (["model.num_query_groups=3"],
         "model.num_attention_heads (4) must be a multiple of num_query_groups (3); nearest: 3, 6"),
        (["model.hidden_size=12"], "model.hidden_size / num_attention_heads (3) must be even for RoPE"),
        (["model.num_layers=1000000000"], "model.num_layers (1000000000) must be at most 10000; is it a typo?"),
        (["model.num_layers=3", "parallel.pipeline_model_parallel_size=2",
          "parallel.virtual_pipeline_model_parallel_size=2"],
         "model.num_layers (3) must be at least pipeline x virtual pipeline size (2 x 2 = 4), a layer a chunk; "
         "split it less"),
        (["parallel.virtual_pipeline_model_parallel_size=2"],
         "virtual_pipeline_model_parallel_size (2) needs "
         "pipeline_model_parallel_size above 1; leave it out"),
        (["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2",
          "model.num_layers=8", "training.global_batch_tokens=10240"],
         "training.global_batch_tokens (10240) must be a multiple of micro_batch_tokens x pipeline_model_parallel_size "
         "(2048 x 4 = 8192); nearest: 8192, 16384"),
        (["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
         "overlap_param_gather (true) needs use_distributed_optimizer and "
         "overlap_grad_reduce; set both to true"),
        (["model.ffn_hidden_size=129", "parallel.tensor_model_parallel_size=2"],
         "model.ffn_hidden_size (129) must be a multiple of tensor_model_parallel_size (2); nearest: 128, 130; or "
         "tensor_model_parallel_size 1"),
        (["model.num_query_groups=1", "parallel.tensor_model_parallel_size=2"],
         "model.num_query_groups (1) must be a multiple of tensor_model_parallel_size (2); nearest: 2; or "
         "tensor_model_parallel_size 1"),
        (["training.global_batch_tokens=10000"],
         "training.global_batch_tokens (10000) must be a multiple of micro_batch_tokens (2048); nearest: 8192, 10240"),
        (["training.phases=[{from_iter: 9, global_batch_tokens: 10000}]"],
         "training.phases[0].global_batch_tokens (10000) must be a multiple of micro_batch_tokens (2048); "
         "nearest: 8192, 10240"),
        (["training.phases=[{from_iter: 9, weights: {a: 1}}, {from_iter: 9, weights: {a: 2}}]"],
         "training.phases[1].from_iter (9) must be above that of the phase before it (9); sort the phases, and name "
         "each step once"),
        (["training.phases=[{from_iter: 9, weights: {a: 1, b: -1}}]"],
         "training.phases[0].weights.b (-1) must not be negative; 0 leaves it out"),
        (["training.phases=[{from_iter: 9, weights: {a: 0}}]"],
         "training.phases[0].weights: at least one source needs a weight above 0"),
        (["training.phases=[{from_iter: 9}]"],
         "training.phases[0] changes nothing; give it weights, global_batch_tokens or train_only"),
        (["training.micro_batch_tokens=1", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
         "training.micro_batch_tokens (1) must be a multiple of tensor_model_parallel_size (2) under "
         "sequence_parallel; nearest: 2"),
    ],
)  # fmt: skip
def test_rules_name_the_nearest_valid_values(run_yaml: Path, overrides: list[str], text: str) -> None:
    assert problem_of(run_yaml, *overrides) == text


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        ("{lr_decay_style: WSD}",
         "optimizer.lr_wsd_decay_iters is missing; a schedule of style WSD that counts iters needs it"),
        ("{lr_decay_tokens: 100}",
         "optimizer.lr_warmup_tokens is missing; a schedule of style cosine that counts tokens needs it "
         "(0: no warm-up)"),
        ("{lr_warmup_tokens: 0}",
         "optimizer.lr_decay_tokens is missing; a schedule of style cosine that counts tokens needs it"),
        ("{lr_warmup_tokens: 5, lr_decay_tokens: 100, lr_decay_iters: 7}",
         "optimizer.lr_decay_iters (7): this schedule counts tokens; give lr_decay_tokens in its place, or every "
         "length of the schedule in iters"),
        ("{lr_wsd_decay_iters: 7}", "optimizer.lr_wsd_decay_iters: only lr_decay_style WSD has it; leave it out"),
        ("{lr_warmup_init: 1}", "optimizer.lr_warmup_init (1) must not exceed lr (0.0003); lower it"),
    ],
)  # fmt: skip
def test_a_schedule_counts_in_one_unit_and_has_what_it_needs(run_yaml: Path, optimizer: str, text: str) -> None:
    assert problem_of(run_yaml, f"optimizer={optimizer}") == text


@pytest.mark.parametrize(
    "optimizer",
    ["{lr_decay_style: constant, lr_warmup_tokens: 9}", "{lr_decay_style: WSD, lr_wsd_decay_iters: 9}",
     "{lr_decay_style: WSD, lr_warmup_tokens: 0, lr_decay_tokens: 99, lr_wsd_decay_tokens: 9}"],
)  # fmt: skip
def test_whole_schedules_are_accepted(run_yaml: Path, optimizer: str) -> None:
    config = load_config(run_yaml, overrides=[f"optimizer={optimizer}"])
    run_yaml.write_text(dump_config(config))
    assert load_config(run_yaml) == config, "with every key of the section written out, too"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("parallel.context_parallel_size=2", "context_parallel_size (2): only 1 is supported"),
        ("training.epochs=2", "training.epochs (2): task pretrain counts in train_iters; use them"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(run_yaml: Path, override: str, text: str) -> None:
    assert problem_of(run_yaml, override) == text


def test_roles_belong_to_task_ppo(run_yaml: Path) -> None:
    run_yaml.write_text(SMALLEST + ROLES)
    assert problems_of(run_yaml) == [
        "roles: only task ppo has roles, and task is pretrain; leave them out",
        "ppo: only task ppo has this section, and task is pretrain; leave it out",
    ]


def test_all_problems_come_in_one_report_with_their_lines(run_yaml: Path) -> None:
    run_yaml.write_text(
        "model:\n  num_layers: four\n  hidden_size: 66\n  ffn_hidden_size: 128\n  num_attention_heads: 4\n"
        "  vocabsize: 512\n\nparallel: {context_parallel_size: 2}\ndata:\n  path: runs/data\ntraining:\n"
        "  # a comment\n  global_batch_tokens: 1000\n"
    )
    with pytest.raises(InvalidConfig) as caught:
        load_config(run_yaml, overrides=["optimizer.lr=-1", "xx"], world_size=3)
    problems = caught.value.problems
    assert {(problem.where.replace(str(run_yaml), "F"), problem.text.split(" must")[0]) for problem in problems} == {
        ("F:2", "model.num_layers (four):"),
        ("F:3", "model.hidden_size (66)"),
        ("F:6", "model.vocabsize: unknown key; did you mean vocab_size?"),
        ("F:1", "model.vocab_size is missing; give it, or model.load: hf:DIR that has it"),
        ("F:8", "context_parallel_size (2): only 1 is supported"),
        ("F:8", "world size (3)"),
        ("F:13", "training.global_batch_tokens (1000)"),
        ("override optimizer.lr=-1", "optimizer.lr (-1):"),
        ("override xx", "this is no override; write section.key=value, such as training.train_iters=200"),
    }  # fmt: skip


def test_a_refused_value_is_not_judged_by_the_default_in_its_place(run_yaml: Path) -> None:
    run_yaml.write_text(SMALLEST + "training:\n  micro_batch_tokens: 1000.5\n  global_batch_tokens: 3000\n")
    assert problem_of(run_yaml) == "training.micro_batch_tokens (1000.5): must be a whole number"
    assert problem_of(run_yaml, "model=5", "training={}") == "model (5): must be a section: `key: value` lines below it"


# Worlds and buckets


def test_check_world(run_yaml: Path) -> None:
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    config = load_config(run_yaml, overrides=[*layout, "training.global_batch_tokens=8192"])
    for world_size in (4, 8, 16):
        check_world(config, world_size=world_size)
    with pytest.raises(InvalidConfig) as caught:
        check_world(config, world_size=6)
    assert caught.value.problems[0].text == (
        "world size (6) must be a multiple of tensor x pipeline x context parallel size (2 x 2 x 1 = 4); nearest: 4, 8"
    )
    with pytest.raises(InvalidConfig) as caught:
        check_world(config, world_size=12)
    assert caught.value.problems[0].text == (
        "training.global_batch_tokens (8192) must be a multiple of micro_batch_tokens x data parallel size "
        "(2048 x 3 = 6144); nearest: 6144, 12288"
    )
    assert problems_of(run_yaml, *layout, "training.global_batch_tokens=8192", world_size=12) == [
        problem.text for problem in caught.value.problems
    ]


def test_more_ranks_than_can_be_listed_are_refused(run_yaml: Path) -> None:
    with pytest.raises(UsageError, match=r"world size \(10000000000\) must be at most 1000000"):
        load_config(run_yaml, world_size=10**10)


def test_data_parallel_size() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    assert data_parallel_size(parallel, world_size=24) == 3
    with pytest.raises(InvalidConfig, match=r"world size \(2\).*nearest: 8"):
        data_parallel_size(parallel, world_size=2)


def test_check_buckets() -> None:
    training = TrainingConfig(micro_batch_tokens=8192)
    check_buckets(training, buckets=[2048, 4096, 8192])
    with pytest.raises(InvalidConfig, match=r"micro_batch_tokens \(8192\).*none of 16384; nearest: 16384"):
        check_buckets(training, buckets=[2048, 16384])
    with pytest.raises(InvalidConfig, match=r"micro_batch_tokens \(240\).*none of 96; nearest: 480$"):
        check_buckets(TrainingConfig(micro_batch_tokens=240), buckets=(48, 96, 240))


def test_check_shape_of_a_completed_model(run_yaml: Path) -> None:
    config = load_config(run_yaml, overrides=["model={load: 'hf:base'}", "parallel.tensor_model_parallel_size=4"])
    check_shape(config)
    model = config.model.model_copy(update={"num_attention_heads": 6, "hidden_size": 96})
    with pytest.raises(
        InvalidConfig, match=r"num_attention_heads \(6\) must be a multiple of tensor_model_parallel_size"
    ):
        check_shape(config.model_copy(update={"model": model}))


# YAML


@pytest.mark.parametrize(
    ("added", "text"),
    [
        ("seed: !!python/object:os.system x\n", ":10: YAML anchors, aliases and tags are not accepted"),
        ("seed: !!str 5\n", ":10: YAML anchors, aliases and tags are not accepted"),
        ("seed: &a 5\n", ":10: YAML anchors, aliases and tags are not accepted"),
        ("seed: *a\n", ":10: YAML anchors, aliases and tags are not accepted"),
        ("<<: {seed: 5}\n", ":10: YAML merge keys (<<) are not accepted"),
        ("run_dir: again\n", ":10: run_dir is given twice"),
        ("training:\n  train_iters: 1\n  train_iters: 2\n", ":12: train_iters is given twice"),
        ("training:\n  phases: [{from_iter: 1, from_iter: 2}]\n", ":11: from_iter is given twice"),
        ("---\nseed: 5\n", ":10: not valid YAML: but found another document"),
        ("seed: [5\n", ":11: not valid YAML"),
        ("\tseed: 5\n", ":10: not valid YAML"),
        ("seed: 2024-13-01\n", ": not valid YAML: month must be in 1..12"),
        ("seed: " + "9" * 5000 + "\n", ": not valid YAML: Exceeds the limit"),
        ("seed: a\0b\n", ": not valid YAML: unacceptable character #x0000"),
        ("seed: " + "[" * 1000 + "]" * 1000 + "\n", ": not valid YAML: maximum recursion depth"),
    ],
)
def test_yaml_beyond_the_plain_part_is_refused(run_yaml: Path, added: str, text: str) -> None:
    run_yaml.write_text(SMALLEST + added)
    with pytest.raises(ConfigError) as caught:
        load_config(run_yaml)
    assert str(caught.value).startswith(f"{run_yaml}:") and text in str(caught.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="File name too long"):
        load_config(tmp_path / ("a" * 300))
    with pytest.raises(StorageError, match="cannot be read: Input/output error"):
        load_config(Path("/proc/self/mem"))
    assert run_dir_of(Path("/proc/self/mem")) is None


# run_dir_of and dump_config


def test_a_run_dir_that_cannot_be_made_hides_nothing_else(run_yaml: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(run_yaml), f"run_dir={run_yaml}/below", "seed=x"])
    assert isinstance(result.exception, InvalidConfig) and "seed (x)" in str(result.exception)


def test_run_dir_of_broken_configs(run_yaml: Path, tmp_path: Path) -> None:
    assert run_dir_of(run_yaml) == Path("runs/small")
    assert run_dir_of(run_yaml, overrides=["run_dir=elsewhere", "nonsense", "seed.x=1", "run_dirr=b"]) == Path(
        "elsewhere"
    )
    assert run_dir_of(run_yaml, overrides=["run_dir=~/runs"]) is None, "no folder of the name ~ is made"
    run_yaml.write_text("run_dir: here\nmodel: 5\nsead: x\n")
    assert run_dir_of(run_yaml) == Path("here")
    run_yaml.write_text("model: {}\n")
    assert run_dir_of(run_yaml) == RunConfig().run_dir
    for bad in (
        "run_dir: 5\n",
        "run_dir: ''\n",
        "run_dir: null\n",
        "run_dir: [a\n",
        'run_dir: "a\\0b"\n',
        "- run_dir\n",
    ):
        run_yaml.write_text(bad)
        assert run_dir_of(run_yaml) is None, bad
    assert run_dir_of(tmp_path / "none.yaml") is None


def test_dump_config_is_a_whole_run_yaml(run_yaml: Path) -> None:
    text = dump_config(load_config(run_yaml))
    assert set(yaml.safe_load(text)) == set(RunConfig.model_fields)
    assert set(yaml.safe_load(text)["training"]) == set(TrainingConfig.model_fields)


NAMES = st.text("abcdefgh0123456789-_.: #'\"\\é中{[&*!", min_size=1, max_size=12)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(1e-30, 1e30),
    weights=st.none() | st.dictionaries(NAMES, st.floats(1e-300, 1e300), min_size=1, max_size=4),
    path=NAMES | st.lists(NAMES, min_size=1, max_size=3),
    resume=st.sampled_from(["auto", "never"]) | st.integers(1, 10**6),
    run_dir=NAMES | st.sampled_from(["1e5", "on", "null", "2024-01-01", "0x1f", "1_000", "=", "<<"]),
    factor=st.floats(1.0, 1e6),
)
def test_dump_config_reads_back_the_same(tmp_path_factory, **drawn) -> None:
    values = yaml.safe_load(EVERY_KEY)
    values |= {"seed": drawn["seed"], "run_dir": drawn["run_dir"]}
    values["optimizer"] |= {"lr": drawn["lr"], "min_lr": 0}
    values["data"] |= {"weights": drawn["weights"], "path": drawn["path"]}
    values["checkpoint"]["resume"] = drawn["resume"]
    values["model"]["rope_scaling"] = {"rope_type": "linear", "factor": drawn["factor"]}
    config = RunConfig.model_validate(values)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert dump_config(load_config(path)) == path.read_text(encoding="utf-8")


@settings(deadline=None, derandomize=True, max_examples=150)
@given(text=st.text("ab:{}[],-&*!<>|'\"#%@`?~ \n\t=.0123\0\x85é", max_size=40), as_override=st.booleans())
def test_no_text_ends_in_anything_but_a_config_error(tmp_path_factory, text: str, as_override: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(SMALLEST if as_override else text, encoding="utf-8")
    overrides = [f"training.phases={text}", f"data.weights.a={text}", text] if as_override else []
    run_dir_of(path, overrides=overrides)
    with pytest.raises(ConfigError):
        load_config(path, overrides=overrides)


def test_a_window_of_steps_is_text_in_a_file_and_in_an_override(run_yaml: Path) -> None:
    """YAML 1.1 reads 10:12 as the base-60 number 612."""
    run_yaml.write_text(run_yaml.read_text() + "runtime:\n  profile: 10:12\n")
    assert load_config(run_yaml).runtime.profiled_iterations == range(10, 12)
    assert load_config(run_yaml, overrides=["runtime.profile=30:45"]).runtime.profile == "30:45"
    last = ["runtime.profile=45:46", "training.train_iters=45"]
    assert load_config(run_yaml, overrides=last).runtime.profiled_iterations == range(45, 46)


def test_the_page_of_all_keys_is_what_its_tool_writes():
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == config_reference.page(), (
        "run tools/config_reference.py --output docs/config.md"
    )
