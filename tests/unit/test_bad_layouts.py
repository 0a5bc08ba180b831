"""Thirty kinds of bad layouts and sizes: each is told, with all others in one report, before anything starts."""

from pathlib import Path

import pytest

from megatron_xy.config import InvalidConfig, load_config
from megatron_xy.config.problems import nearest_divisors
from megatron_xy.errors import EXIT_BAD_CONFIG

EXAMPLES = Path(__file__).parents[2] / "examples"
PRETRAIN, PPO = EXAMPLES / "xuanyuan2_70b/pretrain.yaml", EXAMPLES / "xuanyuan2_70b/ppo.yaml"
P, M, T = "parallel.", "model.", "training."
TP, PP = f"{P}tensor_model_parallel_size", f"{P}pipeline_model_parallel_size"
VP = f"{P}virtual_pipeline_model_parallel_size"
BAD_OF_ONE_MODEL = {  # overrides, and what the report must hold: values, rule, what to take instead
    "tp does not divide heads": ([f"{TP}=7"], ["(64)", "63, 70", "or tensor_model_parallel_size 4, 8"]),
    "tp beyond query groups": ([f"{TP}=16"], ["num_query_groups (8)", "(16)", "nearest: 16"]),
    "tp does not divide ffn": ([f"{M}ffn_hidden_size=28673"], ["ffn_hidden_size (28673)", "28672, 28680"]),
    "tp of nought": ([f"{TP}=0"], ["tensor_model_parallel_size (0)"]),
    "tp that is no number": ([f"{TP}=many"], ["tensor_model_parallel_size (many)", "whole number"]),
    "pp of nought": ([f"{PP}=0"], ["pipeline_model_parallel_size (0)"]),
    "pp below nought": ([f"{PP}=-4"], ["pipeline_model_parallel_size (-4)"]),
    "more chunks than layers": ([f"{VP}=21"], ["num_layers (80)", "4 x 21 = 84"]),
    "more stages than layers": ([f"{PP}=128", f"{VP}=null"], ["num_layers (80)", "128"]),
    "chunks without a pipeline": ([f"{PP}=1"], ["virtual_pipeline_model_parallel_size (10)", "leave it out"]),
    "context parallel": ([f"{P}context_parallel_size=2"], ["context_parallel_size (2)", "only 1 is supported"]),
    "a world that does not divide": ([f"{PP}=3", f"{VP}=null"], ["world size (512)", "8 x 3 x 1 = 24", "504, 528"]),
    "a world smaller than a replica": ([f"{PP}=80", f"{VP}=null"], ["world size (512)", "nearest: 640"]),
    "batch not of micro-batches": ([f"{T}global_batch_tokens=4194305"], ["(4194305)", "4194304, 5242880"]),
    "batch smaller than a round": ([f"{T}global_batch_tokens=16384"], ["(16384)", "nearest: 1048576"]),
    "micro-batch not of tp": ([f"{T}micro_batch_tokens=16380"], ["micro_batch_tokens (16380)", "16376, 16384"]),
    "micro-batch of nought": ([f"{T}micro_batch_tokens=0"], ["micro_batch_tokens (0)"]),
    "gather without reduce": ([f"{P}overlap_grad_reduce=false"], ["overlap_param_gather (true)", "set both"]),
    "gather without shards": ([f"{P}use_distributed_optimizer=false"], ["overlap_param_gather (true)", "set both"]),
    "hidden not of heads": ([f"{M}hidden_size=8190"], ["hidden_size (8190)", "8128, 8192"]),
    "heads not of groups": ([f"{M}num_query_groups=24"], ["num_attention_heads (64)", "(24)", "48, 72"]),
    "odd heads": ([f"{M}hidden_size=64"], ["(1) must be even"]),
    "a recomputation that is none": ([f"{M}recompute_granularity=some"], ["recompute_granularity (some)"]),
    "a precision that is none": ([f"{M}params_dtype=fp8"], ["params_dtype (fp8)"]),
    "a key misspelt": ([f"{P}tensor_parallel_size=8"], ["tensor_parallel_size", "tensor_model_parallel_size"]),
    "a profile of a rank that is not there": (
        ["runtime.profile=5:8", "runtime.profile_ranks=[0,512]"], ["names rank 512", "from 0 to 511"]
    ),
    "phases with another batch": ([f"{T}phases=[{{from_iter: 5, global_batch_tokens: 99}}]"], ["phases[0]", "(99)"]),
}  # fmt: skip
BAD_OF_ROLES = {
    "shares above the world": (["roles.actor.share=0.7"], ["shares sum to 1.2"]),
    "a share of no whole ranks": (["roles.reward.share=0.1249"], ["roles.reward.share (0.1249)", "no whole number"]),
    "a role not of replicas": (["roles.actor.parallel.pipeline_model_parallel_size=3"], ["256 ranks", "240, 264"]),
    "ranks beyond the world": (["roles.reward.ranks=448-515"], ["names rank 512", "from 0 to 511"]),
    "ranks that nobody has": (["roles.reward.ranks=456-511"], ["no role has rank 448"]),
    "a role's heads": (["roles.critic.parallel.tensor_model_parallel_size=16"], ["roles.critic", "(40)", "32, 48"]),
    "a role's chunks": (["roles.critic.parallel.virtual_pipeline_model_parallel_size=2"], ["roles.critic", "(2)"]),
}  # fmt: skip
CASES = [(PRETRAIN, *case) for case in BAD_OF_ONE_MODEL.values()] + [(PPO, *case) for case in BAD_OF_ROLES.values()]


@pytest.mark.parametrize(("path", "overrides", "told"), CASES, ids=[*BAD_OF_ONE_MODEL, *BAD_OF_ROLES])
def test_a_bad_layout_is_told_with_its_values_and_the_nearest_good_ones(path, overrides, told):
    with pytest.raises(InvalidConfig) as caught:
        load_config(path, overrides=overrides, world_size=512)
    assert caught.value.exit_code == EXIT_BAD_CONFIG == 78
    for part in told:
        assert part in str(caught.value)


def test_divisors_of_large_numbers_are_found_without_counting_up_to_them():
    assert nearest_divisors(5, 64) == "4, 8" and nearest_divisors(8, 64) == "4, 16" and nearest_divisors(7, 6) == "6"
    assert nearest_divisors(32, 1_000_000_007) == "1, 1000000007"
    assert nearest_divisors(2, 2**61 - 1) == "1, 2305843009213693951", "a prime whose root is 1.5 x 10^9"


def test_all_faults_stand_in_one_report():
    overrides = [f"{TP}=7", f"{M}hidden_size=8190", f"{P}overlap_grad_reduce=false", f"{M}params_dtype=fp8"]
    with pytest.raises(InvalidConfig) as caught:
        load_config(PRETRAIN, overrides=overrides, world_size=512)
    for part in ("num_attention_heads (64)", "hidden_size (8190)", "overlap_param_gather (true)", "params_dtype (fp8)"):
        assert part in str(caught.value)
