"""One PPO step over given answers on the ranks of a test: what is compared between placements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_xy.config import ModelConfig, OptimizerConfig, ParallelConfig, PlacedRole, PPOConfig, RoleName

VOCAB_SIZE = 40
ACTOR = ModelConfig(
    num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
    vocab_size=VOCAB_SIZE, max_position_embeddings=64, init_method_std=0.3,
)  # fmt: skip
CRITIC = ACTOR.model_copy(update={"hidden_size": 16, "head": "value"})
OPTIMIZER = OptimizerConfig(lr=1e-3, lr_decay_style="constant", adam_eps=1e-5, weight_decay=0.0, clip_grad=0.0)
SEEDS: dict[str, int] = {"actor": 1, "reference": 2, "critic": 3, "reward": 4}
ANSWERS = 12
STOP_IDS = tuple(range(3, 7))  # none of them the end token that a tokenizer would name


def placed(
    name: RoleName, ranks: list[int], *, tp: int = 1, pp: int = 1, vp: int = 1, tokens: int = 64, sp: bool = False
) -> Any:
    """A role on its ranks."""
    model = ACTOR if name in ("actor", "reference") else CRITIC
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sp,
        use_distributed_optimizer=len(ranks) > tp * pp, virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
    )  # fmt: skip
    optimizer = OPTIMIZER if name in ("actor", "critic") else None
    return PlacedRole(name, tuple(ranks), model, parallel, optimizer, tokens)


def rollout() -> Any:
    """Prompts of several lengths with answers of 1 to 9 tokens; the reward model's prompts are longer."""
    from megatron_xy.ppo.experience import Rollout
    from megatron_xy.ppo.prompts import DrawnPrompt

    draw = torch.Generator().manual_seed(0)

    def row(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=draw).tolist()

    lengths = [1 + (5 * index) % 9 for index in range(ANSWERS)]
    prompts = [row(2 + index % 5) for index in range(ANSWERS)]
    responses = [row(length) for length in lengths]
    longer = [[7, 8, 9, *prompt] for prompt in prompts]
    mask = (torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)).float()
    return Rollout(
        drawn=[DrawnPrompt(index, 0) for index in range(ANSWERS)],
        prompts={"actor": prompts, "reference": prompts, "critic": longer, "reward": longer},
        responses=responses,
        has_ended=torch.arange(ANSWERS) % 4 != 0,
        mask=mask,
    )


def generated(actor: Any, ppo: PPOConfig) -> Any:
    """The same prompts, answered by the actor, whose logits are peaked."""
    from megatron_xy.model.sampling import SamplingOptions
    from megatron_xy.ppo.rollouts import GeneratedAnswers, as_rollout

    given = rollout()
    options = SamplingOptions(
        temperature=ppo.temperature, max_response_length=9, stop_ids=STOP_IDS, seed=7
    )  # fmt: skip
    answers = GeneratedAnswers(actor, options).answers(given.drawn, given.prompts["actor"], first=0)
    return as_rollout(given.drawn, given.prompts, answers)


def weights_of(built: dict[str, Any], *, gradients: bool = False) -> dict[str, Any]:
    """Of what is trained, by name: where this rank's shard begins, its values, its number of boxes.

    gradients: those of the last update in place of the weights; where a rank has all of a shard's.
    """
    found = {}
    for name in ("actor", "critic"):
        role = built[name]
        if role is None or (gradients and role.parallel.use_distributed_optimizer):
            continue
        for named in role.named_parameters():
            tensor = named.parameter.main_grad if gradients else named.parameter.detach()
            values = named.shard.trim(tensor).float().numpy().copy()
            found[f"{name}.{named.name}"] = (named.shard.boxes[0].start, values, len(named.shard.boxes))
    return found


def check_finite(rollout: Any, judged: dict[str, torch.Tensor]) -> None:
    """As a run's."""
    for name, tensor in judged.items():
        assert bool(torch.isfinite(tensor).all()), f"{name} are not finite"


def one_step(
    roles: dict[RoleName, PlacedRole],
    ppo: PPOConfig,
    plant: Callable[[], None] | None = None,
    generates: bool = False,
) -> Any:
    """Rewards, advantages, metrics of a step, and the updates and gradients of what is trained (this rank's shards)."""
    from megatron_xy.parallel import build_groups
    from megatron_xy.ppo.engine import PPO, PPOState
    from megatron_xy.ppo.roles import Actor, Critic, Policy, RewardModel
    from megatron_xy.role import build_role

    if plant is not None:
        plant()
    built: dict[str, Any] = {}
    for name, role in roles.items():
        groups = build_groups(name, ranks=role.ranks, parallel=role.parallel, timeout_seconds=60)
        built[name] = groups and build_role(
            groups, model=role.model, parallel=role.parallel, optimizer=role.optimizer, seed=SEEDS[name]
        )
    engine = PPO(
        config=ppo,
        actor=Actor(roles["actor"], built["actor"], temperature=ppo.temperature),
        critic=Critic(roles["critic"], built["critic"], shift=0.1, scale=0.5),
        reference=Policy(roles["reference"], built["reference"], temperature=ppo.temperature),
        scorer=RewardModel(roles["reward"], built["reward"]),
        state=PPOState(kl_coef=ppo.kl_coef),
    )
    answered = generated(engine.actor, ppo) if generates else rollout()
    experience = engine.collect(answered, check=check_finite)
    half = ANSWERS // 2
    rates = {"actor": 1e-3, "critic": 1e-3}
    batches = [list(range(ANSWERS))] if ppo.mini_batch_size == ANSWERS else [
        list(range(half)), list(range(half, ANSWERS))
    ]  # fmt: skip
    before = weights_of(built)
    metrics = engine.learn(experience, batches, rates, is_warmup=False)
    updates = {key: (start, after - before[key][1], boxes) for key, (start, after, boxes) in weights_of(built).items()}
    gradients = weights_of(built, gradients=True)
    names = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns", "entropy")
    tensors = {name: getattr(experience, name).numpy().copy() for name in names}
    told = {"tensors": tensors, "metrics": metrics, "updates": updates, "gradients": gradients, "rank": dist.get_rank()}
    return {**told, "responses": answered.responses}
