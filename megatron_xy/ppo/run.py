"""The verb `ppo`: roles on their ranks of one torchrun world, built, restored and trained.

What can be known to fail is found before any process group starts: files, prompts, vocabularies, shapes, placement.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_xy import device, mcore, parallel
from megatron_xy.config import ParallelConfig, PlacedRole, RunConfig, check_world, placed_roles
from megatron_xy.flops import num_parameters
from megatron_xy.log import RunLog
from megatron_xy.model.sampling import SamplingOptions
from megatron_xy.model.source import stored_head
from megatron_xy.ppo.engine import PPO, PPOState, Scorer
from megatron_xy.ppo.material import Material, look_at
from megatron_xy.ppo.placement import drawn
from megatron_xy.ppo.reward_function import FunctionScorer, RewardFunction, load_reward_function
from megatron_xy.ppo.roles import Actor, Critic, Policy, RewardModel
from megatron_xy.ppo.rollouts import AnswersFromFile, AnswerSource, GeneratedAnswers
from megatron_xy.ppo.trainer import PPOTrainer
from megatron_xy.ppo.worker import Cast, RoleWorker
from megatron_xy.preflight import check_boards
from megatron_xy.role import build_role
from megatron_xy.run_dir import check_space, check_weights_to_load
from megatron_xy.runtime import environment
from megatron_xy.runtime.session import session
from megatron_xy.runtime.signals import StopRequest
from megatron_xy.runtime.watchdog import Watchdog, backend_timeout
from megatron_xy.training.trainer import starting


def run(config: RunConfig, *, stop: StopRequest, watchdog: Watchdog, began: float) -> None:
    """Trains as `config` says, in this rank of torchrun's world. `began`: time.monotonic() at the process's start.

    Raises ConfigError, DataError, StorageError, Stopped or PeerLost.
    """
    rank, world_size = environment.rank(), environment.world_size()
    check_world(config, world_size=world_size)
    check_boards(config.runtime)
    material = look_at(config, placed_roles(config, world_size=world_size))
    if rank == 0:  # one rank's end is that of all, and one asks the file system
        check_space(config, material.trained_models)
        for role in material.roles.values():
            check_weights_to_load(config, role.model, is_trained=role.optimizer is not None)
    named = config.ppo_section.reward_function
    function = None if named is None else load_reward_function(named)
    log = RunLog(config.run_dir, rank=rank, is_leader=rank == 0, wandb_project=config.runtime.wandb_project)
    for line in told(material, world_size=world_size):
        log.say(line)
    with session(config, log=log, watchdog=watchdog, began=began):
        trainer = build(config, material, function=function, log=log, watchdog=watchdog, stop=stop)
        with starting(log, watchdog, "weights"):
            trainer.restore()
        stop.can_save = True
        trainer.train()


def told(material: Material, *, world_size: int) -> list[str]:
    """What runs where, in lines."""
    lines = [f"megatron_xy ppo on {world_size} ranks of {device.name()}, megatron-core {mcore.VERSION}"]
    lines += drawn(material.roles, world_size=world_size)
    sizes = ", ".join(f"{name} {num_parameters(role.model) / 1e6:,.1f} M" for name, role in material.roles.items())
    lines.append(f"  parameters: {sizes}")
    critic = material.roles["critic"].model.load
    if critic is not None and stored_head(critic) == "language_model":
        lines.append(f"  critic: the trunk of {critic}, with a fresh value head")
    actor = material.roles["actor"].model.load
    fresh = [name for name, role in material.roles.items() if role.model.load is None]
    if actor is not None and fresh:
        lines.append(
            f"  warning: {', '.join(fresh)}: fresh weights, though the actor starts from {actor}; name theirs in "
            f"roles.ROLE.model.load"
        )
    lines.append(f"  {len(material.prompts):,} prompts in {material.prompts.path}")
    return lines


def build(
    config: RunConfig,
    material: Material,
    *,
    function: RewardFunction | None,
    log: RunLog,
    watchdog: Watchdog,
    stop: StopRequest,
) -> PPOTrainer:
    """Groups and models of all roles, in one order on all ranks, and the trainer over them.

    function: that stands in for the reward model.
    """
    timeout = backend_timeout(config.runtime.timeout_seconds)
    everyone = range(environment.world_size())
    world = parallel.build_groups("world", ranks=everyone, parallel=ParallelConfig(), timeout_seconds=timeout)
    assert world is not None, "every rank is in the world"

    def beat(phase: str) -> None:
        watchdog.beat(iteration=trainer.state.iteration + 1, phase=phase, of_all=False)

    workers: dict[str, RoleWorker] = {}
    for name, placed in material.roles.items():
        watchdog.beat(iteration=0, phase=f"{name}: model and optimizer")
        with log.phase(f"{name}: groups and model"):
            workers[name] = build_worker(config, placed, stored_scores=material.stored_scores)
            workers[name].beat = beat
    if function is not None:
        scorer: Scorer = FunctionScorer(function, prompts=material.prompts, tokenizer=material.tokenizer, beat=beat)
    else:
        reward = workers["reward"]
        assert isinstance(reward, RewardModel), "made by name"
        scorer = reward
    trainer = PPOTrainer(
        config,
        material,
        cast=Cast(world, workers),
        engine=_engine(config, material, workers, scorer),
        source=_source(config, material, workers["actor"]),
        log=log,
        watchdog=watchdog,
        stop=stop,
    )
    return trainer


def _engine(config: RunConfig, material: Material, workers: Mapping[str, RoleWorker], scorer: Scorer) -> PPO:
    actor, critic, reference = workers["actor"], workers["critic"], workers["reference"]
    assert isinstance(actor, Actor) and isinstance(critic, Critic) and isinstance(reference, Policy), "made by name"
    ppo = config.ppo_section
    state = PPOState(kl_coef=ppo.kl_coef)
    return PPO(ppo, actor, critic, reference, scorer, state, stored=material.stored_scores)


def build_worker(
    config: RunConfig, placed: PlacedRole, *, stored_scores: tuple[float, float] = (0.0, 1.0)
) -> RoleWorker:
    """A role's groups, and its part on this rank, if it has one, the weights still to come. Collective over the world.

    stored_scores: mean and deviation, on whose scale the critic's values are.
    """
    ppo = config.ppo_section
    groups = parallel.build_groups(
        placed.name,
        ranks=placed.ranks,
        parallel=placed.parallel,
        timeout_seconds=backend_timeout(config.runtime.timeout_seconds),
    )
    role = None
    if groups is not None:
        role = build_role(
            groups,
            model=placed.model,
            parallel=placed.parallel,
            optimizer=placed.optimizer,
            seed=config.seed,
            draw=False,
        )
    shift, scale = stored_scores
    if placed.name == "actor":
        return Actor(placed, role, temperature=ppo.temperature)
    if placed.name == "critic":
        return Critic(placed, role, shift=shift, scale=scale)
    if placed.name == "reference":
        return Policy(placed, role, temperature=ppo.temperature)
    return RewardModel(placed, role)


def _source(config: RunConfig, material: Material, actor: RoleWorker) -> AnswerSource:
    ppo, vocab_size = config.ppo_section, actor.placed.model.vocab_size
    assert vocab_size, "the shape is complete"
    if material.responses is not None:
        return AnswersFromFile(material.responses, stop_tokens=material.stop_ids)
    options = SamplingOptions(
        temperature=ppo.temperature,
        top_p=ppo.top_p,
        top_k=ppo.top_k,
        max_response_length=ppo.max_response_length,
        stop_ids=material.stop_ids,
        seed=config.seed,
    )
    return GeneratedAnswers(actor, options)
