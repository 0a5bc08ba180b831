"""What `ppo.dump_rollouts` leaves of a step: a safetensors file of all that its updates were made from."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_xy.checkpoint.files import METADATA
from megatron_xy.ppo.experience import Experience
from megatron_xy.ppo.prompts import padded
from megatron_xy.runtime.liveness import went_forward
from megatron_xy.storage import storage_errors
from megatron_xy.tensors.files import write_tensors

DUMPED = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")


def cut_rollouts(folder: Path, *, iteration: int) -> None:
    """Removes those of later steps, which an abandoned course of the run has left."""
    for path in folder.glob("iter_*.safetensors"):
        number = path.stem.removeprefix("iter_")
        if number.isdecimal() and int(number) > iteration:
            with storage_errors(path):
                path.unlink()


def dump_rollout(experience: Experience, folder: Path, *, iteration: int) -> None:
    """Writes what the actor has: tokens [answers, prompt + response], an answer right behind its prompt, 0 behind it;
    prompt_lengths [answers]; and [answers, response] from each answer's first token on: response_mask and the
    experience's tensors. Raises StorageError.
    """
    rollout = experience.rollout
    rows = [[*prompt, *response] for prompt, response in zip(rollout.prompts["actor"], rollout.responses, strict=True)]
    tensors = {
        "tokens": torch.from_numpy(padded(rows, width=max(map(len, rows)))),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in rollout.prompts["actor"]]),
        "response_mask": rollout.mask.cpu(),
        **{name: getattr(experience, name).cpu() for name in DUMPED},
    }
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    name = f"iter_{iteration:07d}.safetensors"
    write_tensors(folder / f".tmp-{name}", tensors, metadata=METADATA, on_progress=lambda size: went_forward())
    with storage_errors(folder):
        (folder / f".tmp-{name}").replace(folder / name)
