"""A PPO step against TRL's PPOTrainer on the same work: CPU seconds a step, one process and one thread each, in turn.

Llamas of 4 layers of 64 (MLP 192, 4 heads, vocabulary 512), four roles; 32 prompts of 32 tokens, answers of exactly 64
tokens, micro-batches of 8 answers, one epoch, one update a step. Ours computes the old log-probabilities anew, which
TRL does not. TRL is no dependency: name an interpreter that has it (the last release with a PPOTrainer is 1.12).

    python tools/bench_ppo.py [--trl PYTHON] [--runs 5] [--steps 6]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, PROMPT_LENGTH, RESPONSE_LENGTH, MICRO_BATCH = 32, 32, 64, 8
VOCAB_SIZE, HIDDEN, LAYERS, MLP, HEADS = 512, 64, 4, 192, 4
WARM_UP = 2  # steps


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, metavar="PYTHON", help="an interpreter that has trl: time it, too")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a run")
    parser.add_argument("--only", choices=["ours", "trl"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run = ours if options.only == "ours" else trl
        print(json.dumps(run(options.steps)))
        return
    interpreters = {"ours": Path(sys.executable), **({"trl": options.trl} if options.trl else {})}
    medians: dict[str, list[float]] = {name: [] for name in interpreters}
    told: dict[str, dict[str, Any]] = {}
    for _ in range(options.runs):
        for name, interpreter in interpreters.items():
            told[name] = timed(name, interpreter, steps=options.steps)
            medians[name].append(told[name]["cpu_seconds_a_step"])
    report: dict[str, Any] = {
        name: {**told[name], "cpu_seconds_a_step": statistics.median(values), "spread": [min(values), max(values)]}
        for name, values in medians.items()
    }
    if "trl" in medians:
        pairs = [a / b for a, b in zip(medians["ours"], medians["trl"], strict=True)]
        report["ours_by_trl"] = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({**report, "runs": options.runs, "machine": machine}))


def timed(name: str, interpreter: Path, *, steps: int) -> dict[str, Any]:
    """One run in a process of its own, with one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    environment = {**os.environ, **threads, "PYTHONPATH": paths, "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [str(interpreter), __file__, "--only", name, "--steps", str(steps)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


def ours(steps: int) -> dict[str, Any]:
    """Four roles on one rank."""
    from megatron_xy import device

    device.start(local_rank=0, num_threads=1, deterministic=False)
    import torch

    from megatron_xy import mcore, parallel
    from megatron_xy.config import ModelConfig, OptimizerConfig, ParallelConfig, PlacedRole, PPOConfig
    from megatron_xy.model.sampling import SamplingOptions
    from megatron_xy.ppo.engine import PPO, PPOState
    from megatron_xy.ppo.prompts import DrawnPrompt
    from megatron_xy.ppo.roles import Actor, Critic, Policy, RewardModel
    from megatron_xy.ppo.rollouts import GeneratedAnswers, as_rollout
    from megatron_xy.role import build_role

    parallel.start_alone()
    ppo = PPOConfig(
        rollout_batch_size=PROMPTS, mini_batch_size=PROMPTS, max_response_length=RESPONSE_LENGTH, temperature=0.7
    )
    budget = MICRO_BATCH * (PROMPT_LENGTH + RESPONSE_LENGTH)
    trained = OptimizerConfig(lr=1e-5, lr_decay_style="constant", lr_warmup_iters=0)
    made: dict[str, Any] = {}
    for seed, name in enumerate(("actor", "critic", "reference", "reward")):
        model = ModelConfig(
            num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=MLP, num_attention_heads=HEADS,
            vocab_size=VOCAB_SIZE, max_position_embeddings=128,
            head="value" if name in ("critic", "reward") else "language_model",
        )  # fmt: skip
        optimizer = trained if name in ("actor", "critic") else None
        placed = PlacedRole(name, (0,), model, ParallelConfig(), optimizer, budget)  # type: ignore[arg-type]
        groups = parallel.build_groups(name, ranks=[0], parallel=ParallelConfig(), timeout_seconds=600)
        assert groups is not None, "the one rank is in it"
        role = build_role(groups, model=model, parallel=ParallelConfig(), optimizer=optimizer, seed=seed)
        kinds: dict[str, Any] = {"critic": Critic, "reward": RewardModel}
        policies: dict[str, Any] = {"actor": Actor, "reference": Policy}
        made[name] = (
            kinds[name](placed, role) if name in kinds else policies[name](placed, role, temperature=ppo.temperature)
        )
    engine = PPO(
        config=ppo,
        actor=made["actor"],
        critic=made["critic"],
        reference=made["reference"],
        scorer=made["reward"],
        state=PPOState(kl_coef=ppo.kl_coef),
    )
    options = SamplingOptions(
        temperature=ppo.temperature, min_response_length=RESPONSE_LENGTH, max_response_length=RESPONSE_LENGTH
    )
    source = GeneratedAnswers(made["actor"], options)
    draw = torch.Generator().manual_seed(0)
    phases: dict[str, list[float]] = {"generate": [], "score": [], "update": []}
    seconds = []
    for step in range(WARM_UP + steps):
        rows = torch.randint(3, VOCAB_SIZE, (PROMPTS, PROMPT_LENGTH), generator=draw).tolist()
        drawn = [DrawnPrompt(index, step) for index in range(PROMPTS)]
        times = [time.process_time()]
        answers = source.answers(drawn, rows, first=0)
        rollout = as_rollout(drawn, dict.fromkeys(made, rows), answers)
        times.append(time.process_time())
        experience = engine.collect(rollout, check=lambda rollout, judged: None)
        times.append(time.process_time())
        metrics = engine.learn(experience, [list(range(PROMPTS))], {"actor": 1e-5, "critic": 1e-5}, is_warmup=False)
        times.append(time.process_time())
        assert metrics["response_length_mean"] == RESPONSE_LENGTH, "the work is fixed"
        if step >= WARM_UP:
            seconds.append(times[-1] - times[0])
            for name, (first, last) in zip(phases, itertools.pairwise(times), strict=True):
                phases[name].append(last - first)
    return {
        "cpu_seconds_a_step": statistics.median(seconds),
        "cpu_seconds_by_phase": {name: statistics.median(values) for name, values in phases.items()},
        "versions": {"torch": torch.__version__, "megatron-core": mcore.VERSION},
    }


def trl(steps: int) -> dict[str, Any]:
    """TRL's PPOTrainer, timed between the ends of its steps."""
    import torch
    import transformers
    from trl import __version__
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCAB_SIZE)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=128, pad_token_id=0, eos_token_id=2, bos_token_id=1,
        num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, reference = (transformers.LlamaForCausalLM(config) for _ in range(2))
    value, reward = (transformers.LlamaForSequenceClassification(config) for _ in range(2))
    draw = torch.Generator().manual_seed(0)
    num_prompts = PROMPTS * (WARM_UP + steps + 1)
    rows = torch.randint(3, VOCAB_SIZE, (num_prompts, PROMPT_LENGTH), generator=draw).tolist()
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]  # untyped where it is skipped
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder, per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=PROMPTS // MICRO_BATCH,
            num_mini_batches=1, num_ppo_epochs=1, total_episodes=PROMPTS * (WARM_UP + steps + 1),
            response_length=RESPONSE_LENGTH, local_rollout_forward_batch_size=MICRO_BATCH, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", num_sample_generations=0,
            temperature=0.7, learning_rate=1e-5, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=[{"input_ids": row} for row in rows],
            callbacks=[Clock()],
        )
        trainer.train()
    between = [last - first for first, last in itertools.pairwise(ends)][WARM_UP:]
    return {
        "cpu_seconds_a_step": statistics.median(between[:steps]),
        "versions": {"trl": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
