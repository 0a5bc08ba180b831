"""`megatron-xy dryrun` as a user calls it, on a PPO job whose files need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_xy.config import load_config
from tests.planned import rank_memory

ROOT = Path(__file__).parents[2]
PPO = """\
task: ppo
run_dir: RUN
model: {num_layers: 4, hidden_size: 128, ffn_hidden_size: 320, num_attention_heads: 4, num_query_groups: 2,
        vocab_size: 1000, max_position_embeddings: 512, params_dtype: bf16}
data: {tokenizer: TOKENIZER}
training: {micro_batch_tokens: 1024}
roles:
  actor:
    ranks: "0-3"
    parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, sequence_parallel: true}
  critic: {ranks: "4-5", parallel: {use_distributed_optimizer: true}}
  reference: {ranks: "4-7", parallel: {pipeline_model_parallel_size: 2}}
  reward: {ranks: "6-7"}
ppo: {prompts: PROMPTS, rollout_batch_size: 16, mini_batch_size: 8, max_response_length: 128}
"""


def test_every_role_of_a_rank_is_built_and_run(tmp_path: Path) -> None:
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(PPO)
    result = subprocess.run(
        [sys.executable, "-m", "megatron_xy", "dryrun", str(run_yaml), "--world-size", "8", "--all-stages", "--json",
         "ppo.max_response_length=64"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["task"], told["world_size"], told["bucket"]) == ("ppo", 8, 512)
    stood = [(found["rank"], found["role"], found["pp_rank"]) for found in told["ranks"]]
    assert stood == [
        (0, "actor", 0), (2, "actor", 1), (4, "critic", 0), (4, "reference", 0), (6, "reference", 1), (6, "reward", 0),
    ]  # fmt: skip
    config = load_config(run_yaml, overrides=[], world_size=8)
    for found in told["ranks"]:
        planned = {role.role: role for role in rank_memory(config, world_size=8, rank=found["rank"])}[found["role"]]
        assert found["parameters"] == planned.parameters
        assert (found["optimizer"] > 0) == (found["update"] > 0) == (found["role"] in ("actor", "critic"))
        static = sum(found[part] for part in ("weights", "gradients", "optimizer", "beside"))
        assert found["peak"] >= static + found["activations"] > static
        kinds = {(part["group"], part["kind"]) for part in found["collectives"]}
        assert (("pp", "send") in kinds) == (found["role"] == "reference" and found["pp_rank"] == 0) or (
            found["role"] == "actor"  # both its stages send, the second one gradients
        )
    critic, reference = told["ranks"][2:4]
    others = reference["weights"] + reference["gradients"]
    assert others <= critic["beside"] < 1.5 * others, "the role on the same rank counts"
