"""What a valid config comes to, as `check` prints it."""

from __future__ import annotations

from pathlib import Path

from megatron_xy.config import RunConfig, data_parallel_size, placed_roles
from megatron_xy.data.draws.phase_draws import total_tokens
from megatron_xy.data.draws.phases import sampler_phases
from megatron_xy.flops import num_parameters
from megatron_xy.ppo.placement import drawn


def describe(config: RunConfig, *, path: Path, world_size: int | None) -> str:
    """What the config comes to, in a few lines."""
    if config.task == "ppo":
        return "\n".join(_describe_ppo(config, path=path, world_size=world_size))
    model, training, layout = config.model, config.training, config.parallel
    lines = [f"{path}: valid, task {config.task}, run folder {config.run_dir}"]
    if model.load is None:
        lines.append(
            f"  model: {num_parameters(model) / 1e6:,.1f} M parameters, "
            f"{model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size}, {model.params_dtype}"
        )
    else:
        lines.append(f"  model: {model.load}")
    sizes = (
        f"tp {layout.tensor_model_parallel_size} x pp {layout.pipeline_model_parallel_size} x "
        f"cp {layout.context_parallel_size}"
    )
    if world_size is None:
        lines.append(f"  layout: {sizes}; give --world-size for the data parallel size")
    else:
        replicas = data_parallel_size(layout, world_size=world_size)
        micro_batches = training.global_batch_tokens // (training.micro_batch_tokens * replicas)
        of_a_step = "micro-batches as pairs fit" if config.has_pairs else f"{micro_batches} micro-batches a step"
        lines.append(f"  layout: {sizes} x dp {replicas} on {world_size} ranks, {of_a_step}")
    phases = sampler_phases(config)
    sizes_of_steps, size = "", 0
    for phase in phases:
        if phase.global_batch_tokens != size and (
            training.epochs is not None or phase.from_step < training.train_iters
        ):
            size = phase.global_batch_tokens
            sizes_of_steps += f", {size} from step {phase.from_step} on" if phase.from_step else str(size)
    all_tokens = total_tokens(phases, num_steps=training.train_iters)
    length = f"{training.train_iters} steps of {sizes_of_steps} tokens ({all_tokens / 1e6:,.1f} M in all)"
    if training.epochs is not None:
        length = f"{training.epochs} epoch(s) in steps of {sizes_of_steps} tokens"
    lines.append(f"  training: {length}")
    late = [str(phase.from_step) for phase in phases if phase.from_step >= training.train_iters]
    if late and training.epochs is None:
        lines.append(
            f"  training.phases from step {', '.join(late)} on are never reached: train_iters is {training.train_iters}"
        )
    return "\n".join(lines)


def _describe_ppo(config: RunConfig, *, path: Path, world_size: int | None) -> list[str]:
    ppo = config.ppo_section
    lines = [f"{path}: valid, task ppo, run folder {config.run_dir}"]
    if world_size is None:
        lines.append("  give --world-size to see where the roles stand")
    else:
        lines += drawn(placed_roles(config, world_size=world_size), world_size=world_size)
    updates = ppo.ppo_epochs * ppo.rollout_batch_size // ppo.mini_batch_size
    lines.append(
        f"  {config.training.train_iters} steps of {ppo.rollout_batch_size} answers of up to "
        f"{ppo.max_response_length} tokens, {updates} updates of {ppo.mini_batch_size} answers a step"
    )
    return lines
