"""The four roles of PPO, with the few methods that the engine calls.

Each method computes on the role's ranks alone and returns a shipment, which is empty of this rank's doing elsewhere; so
roles on separate ranks work at the same time. The answers of a batch are spread over the role's replicas and packed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_xy import device
from megatron_xy.config import PlacedRole, PPOConfig
from megatron_xy.losses import token_logprobs_and_entropy
from megatron_xy.optimizer import apply_gradients
from megatron_xy.parallel import from_last_stage, max_over, sum_over
from megatron_xy.ppo import functional
from megatron_xy.ppo.batches import AnswerBatch, pack_answers, plan_answers, width_of
from megatron_xy.ppo.experience import Experience, Rollout
from megatron_xy.ppo.transport import Shipment
from megatron_xy.role import Role
from megatron_xy.training.train_step import DeviceBatch, LossFunction, forward, forward_backward, on_device

ACTOR_METRICS = ("actor_loss", "actor_grad_norm", "clip_fraction", "kl_loss", "ratio_first_max", "actor_updates")
CRITIC_METRICS = ("critic_loss", "critic_grad_norm", "value_clip_fraction", "critic_updates")


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of answers on the device, with where its response tokens are (see AnswerBatch)."""

    batch: DeviceBatch
    before: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """[1, tokens]."""
        return self.batch.tokens


class RoleWorker:
    """One role as seen from one rank, which need not be one of the role's: then `role` is None and nothing is done.

    busy_seconds: what this rank has worked for the role since `take_busy_seconds`.
    """

    def __init__(self, placed: PlacedRole, role: Role | None, *, beat: Callable[[str], None] = lambda phase: None):
        self.placed, self.role = placed, role
        self.before_update: Callable[[], object] = lambda: None  # called right before weights change
        self._beat = beat
        self._busy_seconds = 0.0
        self._padding = (0, 0)

    @property
    def name(self) -> str:
        """actor, critic, reference or reward."""
        return self.placed.name

    def take_busy_seconds(self) -> float:
        """Seconds of work since the last call."""
        seconds, self._busy_seconds = self._busy_seconds, 0.0
        return seconds

    @contextlib.contextmanager
    def working(self, phase: str) -> Iterator[Role]:
        """Inside, this rank works as the role, in a phase of a name; the time counts as busy."""
        assert self.role is not None, "only the role's own ranks work"
        self._beat(f"{self.name}.{phase}")
        began = time.perf_counter()
        with self.role.active():
            yield self.role
        device.synchronize()
        self._busy_seconds += time.perf_counter() - began

    def take_padding(self) -> tuple[int, int]:
        """(padding, all tokens) of this rank's micro-batches since the last call; of the ranks of a replica the first
        counts."""
        counted, self._padding = self._padding, (0, 0)
        return counted

    def packed(self, role: Role, rollout: Rollout, answers: Sequence[int]) -> list[PackedBatch]:
        """This replica's share of `answers` (indices into the rollout), as micro-batches."""
        prompts, responses = rollout.prompts[self.name], rollout.responses
        lengths = [len(prompts[answer]) + len(responses[answer]) for answer in answers]
        groups = role.groups
        rounds = groups.pp_size if len(role.chunks) > 1 else 1  # as an interleaved schedule has them
        budget = self.placed.micro_batch_tokens
        plan = plan_answers(lengths, budget=budget, dp_size=groups.dp_size, multiple=rounds)
        width = width_of(plan, lengths, multiple=groups.tp_size)
        mine = [[answers[index] for index in batch] for batch in plan[groups.dp_rank]]
        batches = pack_answers(mine, prompts, responses, width=width)
        if groups.tp_rank == 0 and groups.is_first_stage:
            padding, room = self._padding
            padding += sum(batch.tokens.num_padding_tokens for batch in batches)
            self._padding = padding, room + width * len(batches)
        return [_on_device(batch) for batch in batches]

    def fill(self, rollout: Rollout, phase: str, outputs_of: OutputsOf, names: Sequence[str]) -> Shipment:
        """A shipment of `names`, one number a response token each, from a forward pass over all answers.

        outputs_of: role and batch to a function of the last stage's output that gives the names' values, each
        [response tokens of the micro-batch].
        """
        tensors = {name: torch.zeros_like(rollout.mask) for name in names}
        if self.role is None:
            return Shipment(tensors)
        with self.working(phase) as role, torch.no_grad(), role.evaluating():
            batches = self.packed(role, rollout, range(len(rollout.responses)))
            outputs = forward_backward(
                role,
                batches,
                forward_step=partial(_forward_step, role, outputs_of),
                forward_only=True,
            )
            if role.groups.is_last_stage and role.groups.tp_rank == 0:
                for packed, output in zip(batches, outputs, strict=True):
                    for name, tensor in tensors.items():
                        tensor[packed.rows, packed.columns] = output[name]
        return Shipment(tensors)


OutputsOf = Callable[[Role, PackedBatch, torch.Tensor], dict[str, torch.Tensor]]


class Policy(RoleWorker):
    """A language model that gives log-probabilities: the reference, and what the actor is built on."""

    def __init__(
        self,
        placed: PlacedRole,
        role: Role | None,
        *,
        temperature: float,
        beat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        super().__init__(placed, role, beat=beat)
        self.temperature = temperature

    def logprobs(self, rollout: Rollout) -> Shipment:
        """`logprobs` and `entropy` of every response token under the tempered distribution."""
        return self.fill(rollout, "logprobs", partial(_logprobs, self.temperature), ("logprobs", "entropy"))


class Actor(Policy):
    """The policy that is trained."""

    def update(
        self,
        experience: Experience,
        mini_batches: Sequence[Sequence[int]],
        *,
        ppo: PPOConfig,
        lr: float,
    ) -> Shipment:
        """One update a mini-batch (indices of answers); ships ACTOR_METRICS: means over the updates."""

        def losses(role: Role, packed: PackedBatch, weights: torch.Tensor, logits: torch.Tensor) -> Losses:
            outputs = _logprobs(self.temperature, role, packed, logits)
            logprobs, entropy = outputs["logprobs"], outputs["entropy"]
            place = packed.rows, packed.columns
            old, advantages = experience.logprobs[place], experience.advantages[place]
            loss, clipped = functional.policy_loss(
                logprobs,
                old,
                advantages,
                clip_low=ppo.clip_ratio,
                clip_high=ppo.clip_ratio_high or ppo.clip_ratio,
                dual_clip=ppo.dual_clip,
            )
            divergence = functional.kl_k2(logprobs, experience.ref_logprobs[place])
            whole = loss - ppo.entropy_coef * entropy + ppo.kl_loss_coef * divergence
            ratio = functional.log_ratio(logprobs, old).abs().detach()
            return Losses(
                (weights * whole).sum(),
                _weighted(weights, actor_loss=loss, clip_fraction=clipped, kl_loss=divergence),
                ratio.max() if len(ratio) else ratio.new_zeros(()),
            )

        mask = experience.actor_mask
        return _shipped(ACTOR_METRICS, _updates(self, ACTOR_METRICS, experience, mini_batches, mask, ppo, lr, losses))


class Critic(RoleWorker):
    """The value model that is trained. Its output is shifted and scaled as the scores are."""

    def __init__(
        self,
        placed: PlacedRole,
        role: Role | None,
        *,
        shift: float = 0.0,
        scale: float = 1.0,
        beat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """Values are (output - shift) / scale."""
        super().__init__(placed, role, beat=beat)
        self.shift, self.scale = shift, scale

    def values(self, rollout: Rollout) -> Shipment:
        """`values` at the position before every response token; `value_after` [answers] at each one's last token."""
        shipment = self.fill(rollout, "values", self._values, ("values", "values_at_token"))
        at_token = shipment.tensors.pop("values_at_token")
        last = functional.last_token(rollout.mask)
        shipment.tensors["value_after"] = at_token.gather(1, last.unsqueeze(1)).squeeze(1)
        return shipment

    def _values(self, role: Role, packed: PackedBatch, output: torch.Tensor) -> dict[str, torch.Tensor]:
        values = (output[0, :, 0] - self.shift) / self.scale
        return {"values": values[packed.before], "values_at_token": values[packed.before + 1]}

    def update(
        self,
        experience: Experience,
        mini_batches: Sequence[Sequence[int]],
        *,
        ppo: PPOConfig,
        lr: float,
    ) -> Shipment:
        """One update a mini-batch (indices of answers); ships CRITIC_METRICS: means over the updates."""

        def losses(role: Role, packed: PackedBatch, weights: torch.Tensor, output: torch.Tensor) -> Losses:
            values = self._values(role, packed, output)["values"]
            place = packed.rows, packed.columns
            loss, clipped = functional.value_loss(
                values, experience.values[place], experience.returns[place], clip=ppo.value_clip
            )
            told = _weighted(weights, critic_loss=loss, value_clip_fraction=clipped)
            return Losses((weights * loss).sum(), told, values.new_zeros(()))

        mask = experience.rollout.mask
        return _shipped(CRITIC_METRICS, _updates(self, CRITIC_METRICS, experience, mini_batches, mask, ppo, lr, losses))


class RewardModel(RoleWorker):
    """A frozen value model; its output at the last token is the score."""

    def score(self, rollout: Rollout) -> Shipment:
        """`scores` [answers]."""
        shipment = self.fill(rollout, "score", _values_at_tokens, ("at_token",))
        last = functional.last_token(rollout.mask)
        scores = shipment.tensors["at_token"].gather(1, last.unsqueeze(1)).squeeze(1)
        return Shipment({"scores": scores})


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch: the weighted sum to learn from, weighted sums to tell by their metrics' names, the largest
    |log ratio|."""

    loss: torch.Tensor
    told: dict[str, torch.Tensor]
    largest: torch.Tensor


# Of a role, a micro-batch, what each of its response tokens weighs, and the last stage's output.
LossesOf = Callable[[Role, PackedBatch, torch.Tensor, torch.Tensor], Losses]


def _updates(
    worker: RoleWorker,
    names: Sequence[str],
    experience: Experience,
    mini_batches: Sequence[Sequence[int]],
    mask: torch.Tensor,
    ppo: PPOConfig,
    lr: float,
    losses_of: LossesOf,
) -> dict[str, float]:
    """Updates the role on its ranks; metrics on its leader, none elsewhere. mask: of the tokens to learn from.

    names: of the metrics; of those that the losses tell, and of the gradient norm, means over the updates.
    """
    if worker.role is None or not mini_batches:
        return {}
    assert worker.placed.optimizer is not None, "a trained role has one"
    clip_grad = worker.placed.optimizer.clip_grad
    sums = torch.zeros(len(names), dtype=torch.float64, device=device.current())
    norms: list[float] = []
    num_updates, first_max = 0, 0.0
    with worker.working("update") as role:
        groups = role.groups
        for answers in mini_batches:
            chosen = torch.zeros_like(mask)
            chosen[list(answers)] = mask[list(answers)]
            num_tokens = max(1, int(chosen.sum()))
            # Times the number of tokens, by which megatron-core divides the gradients.
            weights = num_tokens * functional.token_weights(chosen, aggregation=ppo.loss_aggregation)
            role.zero_gradients()
            batches = worker.packed(role, experience.rollout, answers)
            outputs = forward_backward(
                role,
                batches,
                forward_step=partial(_update_step, role, weights, mask, losses_of),
            )
            largest = torch.zeros(1, device=device.current())
            for output in outputs:  # none but on the last stage
                for index, name in enumerate(names):
                    sums[index] += output[name] / num_tokens if name in output else 0.0
                largest = torch.maximum(largest, output["largest"].reshape(1))
            if not norms:
                largest = from_last_stage(max_over(largest, groups.collection.dp), groups)
                first_max = float(largest.exp().item())
            has_tokens = bool(chosen.any())
            grad_norm, updated = apply_gradients(
                role.optimizer,
                lr=lr,
                clip_grad=clip_grad,
                accepts=lambda norm: has_tokens and math.isfinite(norm),  # noqa: B023  asked within the call
                before_update=worker.before_update,
            )
            norms.append(grad_norm)
            num_updates += int(updated)
        means = (sum_over(sums, groups.collection.dp) / len(norms)).tolist()  # the last stage's, where the leader is
    if not groups.is_leader:
        return {}
    return {
        **dict(zip(names, means, strict=True)),
        f"{worker.name}_grad_norm": sum(norms) / len(norms),
        f"{worker.name}_updates": float(num_updates),
        "ratio_first_max": first_max,
    }


def _weighted(weights: torch.Tensor, **parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weighted sum of each part over a micro-batch's tokens, in fp64 and without gradients."""
    return {name: (weights * part).sum().detach().double() for name, part in parts.items()}


def _shipped(names: Sequence[str], metrics: dict[str, float]) -> Shipment:
    """Metrics, from the role's leader, which alone has some."""
    where = device.current()
    return Shipment({name: torch.tensor([metrics.get(name, 0.0)], dtype=torch.float64, device=where) for name in names})


def _logprobs(temperature: float, role: Role, packed: PackedBatch, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    assert role.model.vocab_size, "the shape is complete once a run starts"
    logprobs, entropy = token_logprobs_and_entropy(
        logits[0, packed.before],
        packed.batch.labels[0, packed.before],
        vocab_size=role.model.vocab_size,
        temperature=temperature,
        tp_group=role.groups.collection.tp,
    )
    return {"logprobs": logprobs, "entropy": entropy}


def _values_at_tokens(role: Role, packed: PackedBatch, output: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"at_token": output[0, packed.before + 1, 0]}


def _forward_step(
    role: Role, outputs_of: OutputsOf, batches: Iterator[PackedBatch], module: torch.nn.Module
) -> tuple[torch.Tensor, LossFunction]:
    packed = next(batches)
    output = forward(module, packed.batch)

    def collect(last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return last.sum(), torch.tensor(1, dtype=torch.int, device=last.device), outputs_of(role, packed, last)

    return output, collect


def _update_step(
    role: Role,
    weights: torch.Tensor,
    mask: torch.Tensor,
    losses_of: LossesOf,
    batches: Iterator[PackedBatch],
    module: torch.nn.Module,
) -> tuple[torch.Tensor, LossFunction]:
    packed = next(batches)
    output = forward(module, packed.batch)

    def learn(last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        place = packed.rows, packed.columns
        losses = losses_of(role, packed, weights[place], last)
        return losses.loss, mask[place].sum().to(torch.int), {**losses.told, "largest": losses.largest}

    return output, learn


def _on_device(batch: AnswerBatch) -> PackedBatch:
    where: Any = device.current()
    before, rows, columns = (torch.from_numpy(array).to(where) for array in (batch.before, batch.rows, batch.columns))
    return PackedBatch(on_device(batch.tokens), before, rows, columns)
