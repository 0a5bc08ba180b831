"""The four roles of PPO, with the few methods that the engine calls.

Each method computes on the role's ranks alone and returns a shipment, which is empty of this rank's doing elsewhere; so
roles on separate ranks work at the same time. The answers of a batch are spread over the role's replicas and packed.
"""

from __future__ import annotations

import contextlib
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
from megatron_xy.train_step import DeviceBatch, LossFunction, forward, forward_backward, on_device

ACTOR_METRICS = ("actor_loss", "actor_grad_norm", "clip_fraction", "kl_loss", "ratio_first_max", "actor_updates")
CRITIC_METRICS = ("critic_loss", "critic_grad_norm", "value_clip_fraction", "critic_updates")


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of answers on the device, with where its response tokens are (see AnswerBatch)."""

    batch: DeviceBatch
    before: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


class RoleWorker:
    """One role as seen from one rank, which need not be one of the role's: then `role` is None and nothing is done.

    busy_seconds: what this rank has worked for the role since `take_busy_seconds`.
    """

    def __init__(self, placed: PlacedRole, role: Role | None, *, beat: Callable[[str], None] = lambda phase: None):
        self.placed, self.role = placed, role
        self._beat = beat
        self._busy_seconds = 0.0

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

    def packed(self, role: Role, rollout: Rollout, answers: Sequence[int]) -> list[PackedBatch]:
        """This replica's share of `answers` (indices into the rollout), as micro-batches."""
        prompts, responses = rollout.prompts[self.name], rollout.responses
        lengths = [len(prompts[answer]) + len(responses[answer]) for answer in answers]
        groups = role.groups
        plan = plan_answers(lengths, budget=self.placed.micro_batch_tokens, dp_size=groups.dp_size)
        width = width_of(plan, lengths, multiple=groups.tp_size)
        mine = [[answers[index] for index in batch] for batch in plan[groups.dp_rank]]
        return [_on_device(batch) for batch in pack_answers(mine, prompts, responses, width=width)]

    def fill(self, rollout: Rollout, phase: str, outputs_of: OutputsOf, names: Sequence[str]) -> Shipment:
        """A shipment of `names`, one number a response token each, from a forward pass over all answers.

        outputs_of: role and batch to a function of the last stage's output that gives the names' values, each
        [response tokens of the micro-batch].
        """
        tensors = {name: torch.zeros_like(rollout.mask) for name in names}
        if self.role is None:
            return Shipment(tensors)
        with self.working(phase) as role, torch.no_grad(), _evaluating(role):
            batches = self.packed(role, rollout, range(len(rollout.responses)))
            outputs = forward_backward(
                role,
                [packed.batch for packed in batches],
                forward_step=partial(_forward_step, role, iter(batches), outputs_of),
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

        def losses(role: Role, packed: PackedBatch, scale: Scale, logits: torch.Tensor) -> Losses:
            told = _logprobs(self.temperature, role, packed, logits)
            logprobs, entropy = told["logprobs"], told["entropy"]
            place = packed.rows, packed.columns
            old, advantages = experience.logprobs[place], experience.advantages[place]
            weights = scale.weights[place]
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
                torch.stack([(weights * part).sum().detach().double() for part in (loss, clipped.float(), divergence)]),
                ratio.max() if len(ratio) else ratio.new_zeros(()),
            )

        metrics = _updates(self, experience, mini_batches, experience.actor_mask, ppo, lr, losses)
        if metrics is None:
            return _shipped(ACTOR_METRICS, None)
        loss, clip_fraction, kl_loss, _ = metrics.sums
        told = (loss, metrics.grad_norm, clip_fraction, kl_loss, metrics.first_max, metrics.updates)
        return _shipped(ACTOR_METRICS, told)


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

        def losses(role: Role, packed: PackedBatch, scale: Scale, output: torch.Tensor) -> Losses:
            values = self._values(role, packed, output)["values"]
            place = packed.rows, packed.columns
            weights = scale.weights[place]
            loss, clipped = functional.value_loss(
                values, experience.values[place], experience.returns[place], clip=ppo.value_clip
            )
            sums = [(weights * part).sum().detach().double() for part in (loss, clipped.float())]
            return Losses((weights * loss).sum(), torch.stack(sums), values.new_zeros(()))

        metrics = _updates(self, experience, mini_batches, experience.rollout.mask, ppo, lr, losses)
        if metrics is None:
            return _shipped(CRITIC_METRICS, None)
        loss, clip_fraction, _, _ = metrics.sums
        return _shipped(CRITIC_METRICS, (loss, metrics.grad_norm, clip_fraction, metrics.updates))


class RewardModel(RoleWorker):
    """A frozen value model; its output at the last token is the score."""

    def score(self, rollout: Rollout) -> Shipment:
        """`scores` [answers]."""
        shipment = self.fill(rollout, "score", _values_at_tokens, ("at_token",))
        last = functional.last_token(rollout.mask)
        scores = shipment.tensors["at_token"].gather(1, last.unsqueeze(1)).squeeze(1)
        return Shipment({"scores": scores})


@dataclass(frozen=True)
class Scale:
    """What each response token of a mini-batch weighs, [answers, tokens], times the number of tokens learned from:
    megatron-core divides gradients by that number."""

    weights: torch.Tensor
    num_tokens: int


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch: the weighted sum to learn from, weighted sums to tell, the largest |log ratio|."""

    loss: torch.Tensor
    sums: torch.Tensor
    largest: torch.Tensor


@dataclass
class _Metrics:
    sums: list[float]
    grad_norm: float
    first_max: float
    updates: float


LossesOf = Callable[[Role, PackedBatch, Scale, torch.Tensor], Losses]


def _updates(
    worker: RoleWorker,
    experience: Experience,
    mini_batches: Sequence[Sequence[int]],
    mask: torch.Tensor,
    ppo: PPOConfig,
    lr: float,
    losses_of: LossesOf,
) -> _Metrics | None:
    """Updates the role on its ranks; None but on its leader. mask: of the tokens that are learned from."""
    if worker.role is None or not mini_batches:
        return None
    assert worker.placed.optimizer is not None, "a trained role has one"
    clip_grad = worker.placed.optimizer.clip_grad
    told: list[tuple[torch.Tensor, float, bool]] = []
    first_max = 0.0
    with worker.working("update") as role:
        groups = role.groups
        for answers in mini_batches:
            chosen = torch.zeros_like(mask)
            chosen[list(answers)] = mask[list(answers)]
            num_tokens = max(1, int(chosen.sum()))
            weights = functional.token_weights(chosen, aggregation=ppo.loss_aggregation)
            scale = Scale(weights * num_tokens, num_tokens)
            role.zero_gradients()
            batches = worker.packed(role, experience.rollout, answers)
            outputs = forward_backward(
                role,
                [packed.batch for packed in batches],
                forward_step=partial(_update_step, role, iter(batches), scale, mask, losses_of),
            )
            sums = torch.zeros(4, dtype=torch.float64, device=device.current())
            largest = torch.zeros(1, device=device.current())
            for output in outputs:
                sums[: len(output["sums"])] += output["sums"]
                largest = torch.maximum(largest, output["largest"].reshape(1))
            sums = from_last_stage(sum_over(sums, groups.collection.dp), groups)
            largest = from_last_stage(max_over(largest, groups.collection.dp), groups)
            if not told:
                first_max = float(largest.exp().item())
            grad_norm, updated = apply_gradients(role.optimizer, lr=lr, clip_grad=clip_grad)
            told.append((sums / num_tokens, grad_norm, updated))
        if not groups.is_leader:
            return None
    count = len(told)
    means = (torch.stack([sums for sums, _, _ in told]).sum(dim=0) / count).tolist()
    updates = float(sum(updated for _, _, updated in told))
    return _Metrics(means, sum(norm for _, norm, _ in told) / count, first_max, updates)


def _shipped(names: Sequence[str], values: Sequence[float] | None) -> Shipment:
    """Metrics from the role's leader, by their names."""
    given = values or [0.0] * len(names)
    where = device.current()
    return Shipment(
        {
            name: torch.tensor([value], dtype=torch.float64, device=where)
            for name, value in zip(names, given, strict=True)
        }
    )


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
    role: Role,
    packed_batches: Iterator[PackedBatch],
    outputs_of: OutputsOf,
    batches: Iterator[DeviceBatch],
    module: torch.nn.Module,
) -> tuple[torch.Tensor, LossFunction]:
    output, packed = forward(module, next(batches)), next(packed_batches)

    def collect(last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return last.sum(), torch.tensor(1, dtype=torch.int, device=last.device), outputs_of(role, packed, last)

    return output, collect


def _update_step(
    role: Role,
    packed_batches: Iterator[PackedBatch],
    scale: Scale,
    mask: torch.Tensor,
    losses_of: LossesOf,
    batches: Iterator[DeviceBatch],
    module: torch.nn.Module,
) -> tuple[torch.Tensor, LossFunction]:
    output, packed = forward(module, next(batches)), next(packed_batches)

    def learn(last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        losses = losses_of(role, packed, scale, last)
        num_tokens = mask[packed.rows, packed.columns].sum().to(torch.int)
        return losses.loss, num_tokens, {"sums": losses.sums, "largest": losses.largest}

    return output, learn


@contextlib.contextmanager
def _evaluating(role: Role) -> Iterator[None]:
    for chunk in role.chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in role.chunks:
            chunk.train()


def _on_device(batch: AnswerBatch) -> PackedBatch:
    where: Any = device.current()
    before, rows, columns = (torch.from_numpy(array).to(where) for array in (batch.before, batch.rows, batch.columns))
    return PackedBatch(on_device(batch.tokens), before, rows, columns)
