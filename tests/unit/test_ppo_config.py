"""The sections of a PPO run: roles fill in what they leave out, stand on their ranks, and problems are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_xy.config import InvalidConfig, check_world, dump_config, load_config, placed_roles
from megatron_xy.ppo.facts import facts
from megatron_xy.ppo.placement import drawn

SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 96}


def config_of(tmp_path: Path, changes: dict[str, Any] | None = None, *, overrides: tuple[str, ...] = ()) -> Any:
    values: dict[str, Any] = {
        "task": "ppo",
        "model": SHAPE,
        "data": {"tokenizer": "tokenizer.model"},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4},
        "roles": {
            "actor": {"ranks": "0-1", "parallel": {"tensor_model_parallel_size": 2}},
            "critic": {"ranks": "2,3", "optimizer": {"lr": 2e-3}, "model": {"num_layers": 2}},
            "reference": {"ranks": 0},
            "reward": {"ranks": "1-2", "micro_batch_tokens": 1024},
        },
        "ppo": {"prompts": "prompts.jsonl"},
    }
    for name, section in (changes or {}).items():
        values[name] = section if section is None else {**values.get(name, {}), **section}
        values[name] = values[name] and {key: value for key, value in values[name].items() if value is not None}
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return load_config(path, overrides=overrides)


def test_roles_take_what_they_leave_out_from_the_sections_of_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    check_world(config, world_size=4)
    roles = placed_roles(config, world_size=4)
    assert {name: role.ranks for name, role in roles.items()} == {
        "actor": (0, 1),
        "critic": (2, 3),
        "reference": (0,),
        "reward": (1, 2),
    }
    actor, critic = roles["actor"], roles["critic"]
    assert (actor.parallel.tensor_model_parallel_size, critic.parallel.tensor_model_parallel_size) == (2, 1)
    assert actor.optimizer and critic.optimizer
    assert (actor.optimizer.lr, critic.optimizer.lr, critic.optimizer.min_lr) == (1e-3, 2e-3, 1e-4)
    assert roles["reference"].optimizer is None
    assert [role.model.head for role in roles.values()] == ["language_model", "value", "language_model", "value"]
    assert (actor.model.num_layers, critic.model.num_layers, critic.model.hidden_size) == (4, 2, 64)
    assert (actor.micro_batch_tokens, roles["reward"].micro_batch_tokens) == (2048, 1024)


def test_a_min_lr_that_nobody_gives_is_no_higher_than_the_roles_lr(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"optimizer": {"min_lr": None}}, overrides=("roles.actor.optimizer.lr=1e-6",))
    roles = placed_roles(config, world_size=4)
    assert [roles[name].optimizer.min_lr for name in ("actor", "critic")] == [1e-6, 3e-5]


def test_shares_follow_one_another(tmp_path: Path) -> None:
    shares = {"actor": 0.5, "critic": 0.25, "reference": 0.125, "reward": 0.125}
    config = config_of(tmp_path, {"roles": {name: {"share": share} for name, share in shares.items()}})
    roles = placed_roles(config, world_size=16)
    assert [role.ranks for role in roles.values()] == [tuple(range(8)), (8, 9, 10, 11), (12, 13), (14, 15)]
    with pytest.raises(InvalidConfig, match=r"roles.reference.share \(0.125\) of 12 ranks is no whole number of ranks"):
        check_world(config, world_size=12)


def test_an_override_of_ranks_replaces_a_share_and_the_reverse(tmp_path: Path) -> None:
    roles = {name: {"share": 0.25} for name in ("actor", "critic", "reference", "reward")}
    config = config_of(tmp_path, {"roles": roles}, overrides=("roles.reward.ranks=0",))
    assert placed_roles(config, world_size=4)["reward"].ranks == (0,)
    mixed = {name: {"ranks": 0} for name in roles}
    for overrides in (
        ("roles.actor.share=1.0",),
        ("roles.actor.ranks=null", "roles.actor.share=1.0"),
        ("roles.actor.ranks=0-3", "roles.actor.share=1.0"),
    ):
        config = config_of(tmp_path, {"roles": mixed}, overrides=overrides)
        assert placed_roles(config, world_size=4)["actor"].ranks == (0, 1, 2, 3)


def test_run_yaml_reads_back_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    again = tmp_path / "run.yaml"
    again.write_text(dump_config(config))
    assert placed_roles(load_config(again), world_size=4) == placed_roles(config, world_size=4)
    assert load_config(again).model.model_fields_set == config.model.model_fields_set, "the rest is the weights' to say"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ppo": {"prompts": None}}, "ppo.prompts is missing; name a jsonl file of rows with a prompt"),
        ({"data": {"tokenizer": None}}, "data.tokenizer is missing"),
        (
            {"roles": {"critic": None}},
            "roles.critic is missing; task ppo has the roles actor, critic, reference, reward",
        ),
        ({"roles": {"critic": {"ranks": "3-2"}}}, "roles.critic.ranks (3-2) must be a rank or ranges of ranks"),
        ({"roles": {"critic": {"ranks": "2,2-3"}}}, "roles.critic.ranks (2,2-3) names a rank twice"),
        ({"roles": {"critic": {}}}, "roles.critic needs either ranks or a share of the world"),
        ({"roles": {"critic": {"ranks": "2-3", "share": 0.5}}}, "roles.critic has both ranks and a share (0.5) of the"),
        (
            {"ppo": {"reward_normalization": "stored"}},
            "ppo.reward_normalization (stored): roles.reward.model.load (null) must be the ckpt:DIR of a reward run",
        ),
        (
            {"roles": {"actor": {"ranks": 0, "parallel": {"tensor_model_parallel_size": 2}}}},
            "roles.actor has 1 ranks, which must be a multiple of its tensor x pipeline parallel size (2); nearest: 2",
        ),
        ({"roles": {"critic": {"ranks": "4-5"}}}, "roles: no role has rank 3; every rank of the world needs one"),
        (
            {"roles": {"critic": {"ranks": "2-3", "parallel": {"tensor_model_parallel_size": 3}}}},
            "roles.critic: model.num_attention_heads (4) must be a multiple of tensor_model_parallel_size (3)",
        ),
        (
            {"roles": {"critic": {"ranks": "2-3", "parallel": {"context_parallel_size": 2}}}},
            "roles.critic: context_parallel_size (2): only 1 is supported",
        ),
        ({"roles": {"critic": {"ranks": "2-3", "model": {"layers": 2}}}}, "roles.critic.model.layers: unknown key"),
        (
            {"ppo": {"rollout_batch_size": 60, "mini_batch_size": 32}},
            "ppo.mini_batch_size (32) must divide rollout_batch_size (60); nearest: 30, 60",
        ),
        ({"training": {"epochs": 2}}, "training.epochs: task ppo counts in train_iters; leave it out"),
        ({"training": {"phases": [{"from_iter": 0}]}}, "training.phases: task ppo has one phase; leave it out"),
        ({"training": {"eval_interval": 5}}, "training.eval_interval: task ppo evaluates nothing by itself"),
        ({"training": {"spike_policy": "skip"}}, "training.spike_policy: task ppo skips no spikes"),
        ({"runtime": {"profile": "2:3"}}, "runtime.profile: task ppo is not profiled yet; leave it out"),
        ({"ppo": {"kl_loss_coef": 0.1}}, "would count the divergence twice"),
        (
            {"ppo": {"kl_target": 6, "kl_horizon": 63}},
            "ppo.kl_horizon (63) counts answers, and a step has 64 (rollout_batch_size): kl_coef would leap",
        ),
        (
            {"roles": {"reward": {"ranks": "1-2", "optimizer": {"lr": 1}}}},
            "roles.reward: the reward is not trained; leave",
        ),
        ({"ppo": {"clip_ratio": 1e39}}, "ppo.clip_ratio (1e+39): must be less than or equal to 1000000"),
        ({"ppo": {"value_clip": 1e308}}, "ppo.value_clip (1e+308): must be less than or equal to 1000000"),
        ({"ppo": {"temperature": 0}}, "ppo.temperature (0): must be greater than or equal to 0.0001"),
        ({"ppo": {"reward_function": "score"}}, "ppo.reward_function (score) must be FILE.py:FUNCTION"),
        ({"ppo": {"reward_function": "a.py:score"}}, "roles.reward: ppo.reward_function stands in for it"),
        (
            {"ppo": {"max_response_length": 1024}},
            "ppo.max_response_length (1024) leaves no room for a prompt: the reward has 1024 tokens",
        ),
        (
            {"model": {"max_position_embeddings": 512}},
            "ppo.max_response_length (512) leaves no room for a prompt: the actor has 512 tokens",
        ),
        (
            {"roles": {"critic": {"ranks": "2,3", "model": {"load": "hf:c"}, "micro_batch_tokens": 500}}},
            "leaves no room for a prompt: the critic has 500 tokens",
        ),
        (
            {"roles": {"critic": {"ranks": "2,3", "model": {"vocab_size": 90}}}},
            "roles.critic has a vocabulary of 90, the actor one of 96; the roles read the same token ids",
        ),
        (
            {"roles": {"reference": {"ranks": 0, "model": {"num_layers": 3}}}},
            "roles.reference.model.num_layers (3) must be the actor's (4): a reference that loads no weights stands",
        ),
        (
            {"roles": {"reference": {"ranks": 0, "model": {"num_query_groups": 2}}}},
            "roles.reference.model.num_query_groups (2) must be the actor's (4)",
        ),
        (
            {"roles": {"actor": {"ranks": "0-1", "model": {"load": "hf:a", "num_layers": 6}}}},
            "roles.reference.model.num_layers (4) must be the actor's (6)",
        ),
        ({"model": {"num_layers": None}}, "roles.actor.model.load is missing; name the weights that it starts from"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        config_of(tmp_path, changes)
    assert text in str(caught.value)


def test_a_horizon_of_one_step_is_taken(tmp_path: Path) -> None:
    ppo = config_of(tmp_path, {"ppo": {"prompts": "prompts.jsonl", "kl_target": 6, "kl_horizon": 64}}).ppo
    assert ppo is not None and ppo.kl_horizon == ppo.rollout_batch_size


def test_a_reference_with_weights_of_its_own_may_have_another_shape(tmp_path: Path) -> None:
    config_of(tmp_path, {"roles": {"reference": {"ranks": 0, "model": {"load": "hf:r", "num_layers": 3}}}})


def test_what_weights_say_is_left_to_them(tmp_path: Path) -> None:
    """Their context and vocabulary, where the config does not give these; a run's own run.yaml has the defaults."""
    loaded = {"model": {"load": "hf:m"}, "training": {"micro_batch_tokens": 8192}, "ppo": {"max_response_length": 2048}}
    roles = {"reward": {"ranks": "1-2", "model": {"load": "hf:r"}}}
    config = config_of(tmp_path, {**loaded, "roles": roles})
    again = tmp_path / "run.yaml"
    again.write_text(dump_config(config))
    load_config(again)


def test_a_rank_beyond_the_world(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"names rank 2, and the world has 2, from 0 to 1"):
        check_world(config_of(tmp_path), world_size=2)


@pytest.mark.parametrize(("world_size", "replicas"), [(128, (2, 4, 1, 2)), (512, (8, 16, 4, 8))])
def test_the_report_s_scale_fits_on_16_and_on_64_nodes(world_size: int, replicas: tuple[int, ...]) -> None:
    path = Path(__file__).parents[2] / "examples" / "xuanyuan2_70b" / "ppo.yaml"
    config = load_config(path, world_size=world_size)
    roles = placed_roles(config, world_size=world_size)
    assert tuple(len(role.ranks) // role.parallel.model_parallel_size for role in roles.values()) == replicas
    lines = drawn(roles, world_size=world_size)
    assert lines[0].startswith(
        "  actor     ################################................................  tp 8 x pp 4"
    )
    assert sum(line.count("#") for line in lines[:4]) == 64
    assert "a character stands for" in lines[4]


def test_a_checkpoint_keeps_the_settings_of_every_role(tmp_path: Path) -> None:
    def kept(changes: dict[str, Any], rule: str) -> dict[str, Any]:
        (tmp_path / "score.py").write_text(rule)
        config = config_of(
            tmp_path, {"ppo": {"prompts": "p", "reward_function": f"{tmp_path}/score.py:score"}, **changes}
        )
        found = facts(config, placed_roles(config, world_size=4), of="actor", fingerprints={"ppo.prompts": "0a"})
        assert found["model"]["num_layers"] == 4 and found["data_order"]["ppo.prompts"] == "0a"
        assert not found["settings"].keys() & found["data_order"].keys()
        settings: dict[str, Any] = found["settings"]
        return settings

    roles = {
        "actor": {"ranks": "0-1", "parallel": {"tensor_model_parallel_size": 2}},
        "critic": {"ranks": "2,3", "optimizer": {"lr": 2e-3}, "model": {"num_layers": 2}},
        "reference": {"ranks": 0},
        "reward": None,
    }
    before = kept({"roles": roles}, "def score(p, a, r): return [0.0] * len(r)")
    roles["critic"] = {"ranks": "1-3", "optimizer": {"lr": 5e-4}, "model": {"num_layers": 2}}
    after = kept({"roles": roles, "training": {"train_iters": 7}}, "def score(p, a, r): return [1.0] * len(r)")
    changed = {name for name, value in after.items() if before[name] != value}
    assert changed == {"roles.critic.ranks", "roles.critic.optimizer.lr", "training.train_iters", "ppo.reward_function"}
    assert (before["roles.critic.ranks"], after["roles.critic.ranks"]) == ("2-3", "1-3")
