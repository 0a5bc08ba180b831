"""Generation: token for token transformers' under every layout, the trainer's log-probabilities, fair samples."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xy.config import ModelConfig
from tests.distributed import models
from tests.distributed.models import Layout
from tests.distributed.spawn import run_ranks

VOCAB_SIZE = 150  # padded to 256 or 512: under tp 2 the second rank has few true columns
STOP_IDS = (7, 21, 90)
MAX_LENGTH = 24
PROMPTS = [
    np.random.default_rng(number).integers(0, VOCAB_SIZE, length).tolist()
    for number, length in enumerate([5, 31, 1, 12, 12, 3, 40, 8, 17, 2, 25, 9])
]
LAYOUTS = [
    Layout(),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(tp=2, pp=2, sp=True),
    Layout(pp=2, vp=2),
    Layout(dp=2),
    Layout(dp=3, pp=1),
]

# In a process of its own, as a user's: the stand-in for CUDA is not made for transformers. argv: folder, job (JSON).
TRANSFORMERS = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
folder, job = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**job["shape"], initializer_range=0.15)).eval()
for parameter in model.parameters():
    if parameter.dim() == 1:
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
model.save_pretrained(folder)
answers = []
for prompt in job["prompts"]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=job["length"],
        min_new_tokens=job["least"], eos_token_id=job["stops"], pad_token_id=0, bos_token_id=None,
    )
    answers.append(output[0, len(prompt):].tolist())
print(json.dumps(answers))
"""
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder, and in it what transformers answers greedily, each prompt by itself."""
    path = tmp_path_factory.mktemp("hf")
    for least in (0, 6):
        job = {"shape": SHAPE, "prompts": PROMPTS, "length": MAX_LENGTH, "least": least, "stops": STOP_IDS}
        command = [sys.executable, "-P", "-c", TRANSFORMERS, str(path), json.dumps(job)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        (path / f"answers-{least}.json").write_text(output)
    return path


def requests_for(prompts: list[list[int]], *, answers: int = 1, epoch: int = 0) -> list[Any]:
    from megatron_xy.model.generate import Request

    return [
        Request(prompt, row=row, index=index, epoch=epoch)
        for row, prompt in enumerate(prompts)
        for index in range(answers)
    ]


def load_role(layout: Layout, folder: Path | str) -> Any:
    from megatron_xy.model.source import resolve_model
    from megatron_xy.model.weights import load_initial_weights

    role = models.make_role(layout, model=resolve_model(ModelConfig(load=f"hf:{folder}")), seed=3)
    assert role is not None
    load_initial_weights(role, seed=3)
    return role


def generated(
    layout: Layout, folder: Path, answers: int, sizes: list[int], cases: list[dict[str, Any]]
) -> list[list[dict[str, Any]]]:
    """The answers to PROMPTS, for every case of options and every number of sequences at a time."""
    from megatron_xy.model.generate import SamplingOptions

    role = load_role(layout, folder)
    requests = requests_for(PROMPTS, answers=answers)
    return [
        all_answers(role, requests, SamplingOptions(**case), max_sequences=size) for case in cases for size in sizes
    ]


def all_answers(role: Any, requests: list[Any], options: Any, *, max_sequences: int = 64) -> list[dict[str, Any]]:
    """The replicas' shares together, in the order of the requests, on every rank."""
    from megatron_xy.model.generate import generate_share
    from megatron_xy.parallel import gathered_values

    mine: dict[int, Any] = {}
    generate_share(role, requests, options, on_answer=mine.__setitem__, max_sequences=max_sequences)
    told = [[place, dataclasses.asdict(answer)] for place, answer in mine.items()]
    every = dict(pair for share in gathered_values(told, role.groups.collection.dp) for pair in share)
    return [every[place] for place in range(len(requests))]


GREEDY = {"temperature": 0.0, "max_response_length": MAX_LENGTH, "stop_ids": STOP_IDS}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_greedy_answers_are_those_of_transformers(folder: Path, layout: Layout) -> None:
    cases = [GREEDY, GREEDY | {"min_response_length": 6}]
    theirs = [json.loads((folder / f"answers-{least}.json").read_text()) for least in (0, 6)]
    for results in run_ranks(generated, layout, folder, 1, [5], cases, world_size=layout.world_size):
        for answers, expected in zip(results, theirs, strict=True):
            assert [answer["tokens"] for answer in answers] == expected
            for answer in answers:
                assert answer["finish_reason"] == ("stop" if answer["tokens"][-1] in STOP_IDS else "length")
                assert len(answer["logprobs"]) == len(answer["tokens"])
                assert max(answer["logprobs"]) <= 0
    assert {len(answer) for answer in theirs[0]} > {MAX_LENGTH}, "some stop early, some do not"
    assert min(map(len, theirs[1])) >= 6 > min(map(len, theirs[0]))


def answered_without_and_with_the_first_token_as_a_stop(folder: Path) -> list[list[int]]:
    from megatron_xy.model.generate import SamplingOptions

    role, requests = load_role(Layout(), folder), requests_for(PROMPTS[:1])
    (free,) = all_answers(role, requests, SamplingOptions(temperature=0.0, max_response_length=4))
    stop = free["tokens"][0]
    options = SamplingOptions(temperature=0.0, max_response_length=4, min_response_length=2, stop_ids=(stop,))
    (answer,) = all_answers(role, requests, options)
    return [free["tokens"], answer["tokens"]]


def test_the_shortest_answer_that_is_allowed_counts_its_stop_token(folder: Path) -> None:
    ((free, answer),) = run_ranks(answered_without_and_with_the_first_token_as_a_stop, folder, world_size=1)
    assert answer[0] != free[0] and len(answer) >= 2


SAMPLED = {"temperature": 0.7, "max_response_length": MAX_LENGTH, "stop_ids": STOP_IDS, "seed": 5}
CASES = [SAMPLED, SAMPLED | {"top_p": 0.8}, SAMPLED | {"top_k": 20, "top_p": 0.9, "min_response_length": 4}]


@pytest.fixture(scope="module")
def sampled(folder: Path) -> list[list[dict[str, Any]]]:
    """Two answers a prompt for each of CASES, all sequences at once on one rank."""
    (results,) = run_ranks(generated, Layout(), folder, 2, [64], CASES, world_size=1)
    return results


def assert_same(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, other in zip(answers, expected, strict=True):
        assert answer["tokens"] == other["tokens"]
        assert answer["finish_reason"] == other["finish_reason"]
        np.testing.assert_allclose(answer["logprobs"], other["logprobs"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_same_samples_in_every_layout_and_batch_size(
    folder: Path, sampled: list[list[dict[str, Any]]], layout: Layout
) -> None:
    sizes = [1, 7] if layout.world_size == 1 else [7]
    for results in run_ranks(generated, layout, folder, 2, sizes, CASES, world_size=layout.world_size):
        for number, answers in enumerate(results):
            assert_same(answers, sampled[number // len(sizes)])


def test_every_answer_and_every_epoch_is_another(sampled: list[list[dict[str, Any]]], folder: Path) -> None:
    texts = {tuple(answer["tokens"]) for answer in sampled[0]}
    assert len(texts) == len(sampled[0])
    (again,) = run_ranks(in_another_order, folder, world_size=1)
    assert_same([again["shuffled"][place] for place in np.argsort(again["order"])], sampled[0])
    assert not texts & {tuple(answer["tokens"]) for answer in again["next epoch"]}
    assert not texts & {tuple(answer["tokens"]) for answer in again["next seed"]}


def in_another_order(folder: Path) -> dict[str, Any]:
    from megatron_xy.model.generate import SamplingOptions

    role = load_role(Layout(), folder)
    requests = requests_for(PROMPTS, answers=2)
    order = np.random.default_rng(0).permutation(len(requests)).tolist()

    def answers(wanted: list[Any], **changes: Any) -> list[dict[str, Any]]:
        return all_answers(role, wanted, SamplingOptions(**SAMPLED | changes), max_sequences=5)

    return {
        "order": order,
        "shuffled": answers([requests[place] for place in order]),
        "next epoch": answers(requests_for(PROMPTS, answers=2, epoch=1)),
        "next seed": answers(requests, seed=6),
    }


def trainers_logprobs(layout: Layout, folder: Path, answers: list[dict[str, Any]], temperature: float) -> list[Any]:
    """Of every answer's tokens, from the forward pass of training; on the last stage."""
    from megatron_xy.model.logits import logits_of

    role = load_role(layout, folder)
    rows = [PROMPTS[number // 2] + answer["tokens"] for number, answer in enumerate(answers)]
    found = []
    for logits, row, answer in zip(logits_of(role, rows), rows, answers, strict=False):
        places = np.arange(len(row) - len(answer["tokens"]), len(row))
        logprobs = (logits / temperature).log_softmax(dim=-1).numpy()
        found.append(logprobs[places - 1, np.array(row)[places]])
    return found


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_logprobs_are_the_trainers(folder: Path, sampled: list[list[dict[str, Any]]], layout: Layout) -> None:
    """Those of the whole tempered distribution, whatever top-p, top-k and a minimum length leave of it."""
    for answers in sampled:
        results = run_ranks(trainers_logprobs, layout, folder, answers, 0.7, world_size=layout.world_size)
        largest = max(
            np.abs(theirs - np.array(answer["logprobs"])).max()
            for theirs, answer in zip(results[-1], answers, strict=True)
        )
        assert largest <= 1e-5


def with_a_fault(folder: Path, fault: str) -> list[list[int]]:
    """Greedy answers, and sampled ones, of a generator in which one thing is wrong."""
    from megatron_xy.model import cached_attention, generate

    if fault == "a position too far":
        plain_rotation = cached_attention.rotation
        generate.rotation = lambda positions, frequencies: plain_rotation(positions + (positions > 8), frequencies)
    elif fault == "a stale row of the cache":
        cached_attention.KeyValueCache.move = lambda *_, **__: None
    elif fault == "copies of a prompt without its keys":
        plain_attend = generate.attend_with_cache
        generate.attend_with_cache = lambda projected, cached, now, **rest: plain_attend(
            projected, cached, dataclasses.replace(now, copies=None), **rest
        )
    elif fault == "noise by row of the batch":
        plain_keys = generate.position_keys
        generate.position_keys = lambda keys, positions: plain_keys(np.arange(len(keys), dtype=np.uint64), positions)
    else:
        assert fault == "none"
    role = load_role(Layout(), folder)
    options = [generate.SamplingOptions(**case) for case in (GREEDY, SAMPLED)]
    return [
        answer["tokens"]
        for option in options
        for answer in all_answers(role, requests_for(PROMPTS, answers=2), option, max_sequences=5)
    ]


def test_planted_faults_are_seen(folder: Path, sampled: list[list[dict[str, Any]]]) -> None:
    greedy = json.loads((folder / "answers-0.json").read_text())
    right = [answer for answer in greedy for _ in range(2)] + [answer["tokens"] for answer in sampled[0]]
    (found,) = run_ranks(with_a_fault, folder, "none", world_size=1)
    assert found == right
    for fault in (
        "a position too far",
        "a stale row of the cache",
        "copies of a prompt without its keys",
        "noise by row of the batch",
    ):
        (found,) = run_ranks(with_a_fault, folder, fault, world_size=1)
        assert found != right, fault


def after_an_update(layout: Layout) -> list[list[int]]:
    """Greedy answers of a role that has just learned: what it has learned must show."""
    from megatron_xy.config import OptimizerConfig
    from megatron_xy.model.generate import SamplingOptions
    from megatron_xy.training.train_step import train_step

    model = models.MODEL.model_copy(update={"init_method_std": 0.2})
    role = models.make_role(layout, model=model, optimizer=OptimizerConfig())
    assert role is not None
    options = SamplingOptions(temperature=0.0, max_response_length=8)
    before = [answer["tokens"] for answer in all_answers(role, requests_for(PROMPTS), options)]
    for step in range(2):
        batches = models.micro_batches(step, dp_size=role.groups.dp_size, dp_rank=role.groups.dp_rank)
        train_step(role, batches, num_sources=2, lr=0.05, clip_grad=0.0)
    few = [answer["tokens"] for answer in all_answers(role, requests_for(PROMPTS[:1]), options)]  # not one a replica
    after = [answer["tokens"] for answer in all_answers(role, requests_for(PROMPTS), options)]
    assert before != after and few == after[:1]
    return after


def test_generation_sees_updates_that_are_still_to_be_gathered() -> None:
    overlapped = run_ranks(after_an_update, Layout(dp=2, distributed=True, overlap=True), world_size=2)
    plain = run_ranks(after_an_update, Layout(dp=2), world_size=2)
    assert overlapped == plain
