"""Answers to look at: of a step's experience the best and the worst one, as texts; what RUN/samples.jsonl holds."""

from __future__ import annotations

from typing import Any

from megatron_xy.data.chat.renderer import Renderer
from megatron_xy.ppo import functional
from megatron_xy.ppo.experience import Experience
from megatron_xy.ppo.prompts import PromptFile

SHOWN_CHARACTERS = 160  # of a text on the terminal


def samples(experience: Experience, prompts: PromptFile, renderer: Renderer) -> list[dict[str, Any]]:
    """The answer of the highest score, then that of the lowest. renderer: the actor's."""
    rollout, scores = experience.rollout, experience.scores
    divergences = functional.masked_sum(
        functional.kl_k1(experience.logprobs, experience.ref_logprobs), rollout.mask
    ).tolist()
    chosen = {"best": int(scores.argmax()), "worst": int(scores.argmin())}
    return [
        {
            "kind": kind,
            "line": prompts.rows[rollout.drawn[index].row].line,
            "prompt": _text(prompts.rows[rollout.drawn[index].row].value["prompt"]),
            "response": renderer.tokenizer.decode_answer(rollout.responses[index]),
            "num_tokens": len(rollout.responses[index]),
            "has_ended": bool(rollout.has_ended[index]),
            "score": float(scores[index]),
            "kl": divergences[index],
        }
        for kind, index in chosen.items()
    ]


def sample_line(sample: dict[str, Any]) -> str:
    """One of them as a line of the log."""
    prompt, response = (_shortened(sample[name]) for name in ("prompt", "response"))
    cut = "" if sample["has_ended"] else " (cut)"
    return f"  {sample['kind']} answer, score {sample['score']:+.4f}: {prompt!r} -> {response!r}{cut}"


def _text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt's last words, where it is messages."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", prompt[-1].get("value", "")))


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
