"""Sampling: the right distribution, the same noise for every slice of the vocabulary, top-k and top-p as defined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_xy.model.noise import exponential_noise, hashed_ids, position_keys, sequence_key
from megatron_xy.model.sampling import Sampler, SamplingOptions

CPU = torch.device("cpu")
VOCAB_SIZE, COLUMNS = 23, 32
LOGITS = torch.from_numpy(np.random.default_rng(3).normal(0, 1.5, VOCAB_SIZE).astype(np.float32))


@pytest.fixture(scope="module", autouse=True)
def world() -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def keys_of(number: int, *, seed: int = 1, position: int = 0) -> torch.Tensor:
    """Noise keys at one position of `number` answers to one prompt."""
    keys = np.array([sequence_key(seed, 0, 4, index) for index in range(number)], dtype=np.uint64)
    return torch.from_numpy(position_keys(keys, np.full(number, position)))


def drawn(number: int, **options: object) -> tuple[np.ndarray, np.ndarray]:
    sampler = Sampler(
        SamplingOptions(**options), columns=COLUMNS, vocab_size=VOCAB_SIZE, tp_group=dist.group.WORLD
    )  # fmt: skip
    logits = torch.full((number, COLUMNS), 50.0)  # the padding looks likely
    logits[:, :VOCAB_SIZE] = LOGITS
    found = sampler.sample(logits, keys=keys_of(number), too_short=None).numpy()
    return found[:, 0].astype(int), found[:, 1]


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """In standard deviations from its mean."""
    expected = probabilities * len(tokens)
    kept = expected > 5
    counts = np.bincount(tokens, minlength=len(probabilities))
    observed = np.append(counts[kept], counts[~kept].sum())
    expected = np.append(expected[kept], expected[~kept].sum())
    freedom = kept.sum() - (expected[-1] == 0)
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_are_distributed_as_the_tempered_softmax(temperature: float) -> None:
    tokens, logprobs = drawn(200_000, temperature=temperature)
    expected = (LOGITS.double() / temperature).softmax(dim=0).numpy()
    assert chi_square(tokens, expected) < 4
    assert chi_square(tokens, np.roll(expected, 1)) > 100
    np.testing.assert_allclose(logprobs, np.log(expected)[tokens], atol=1e-5)


def test_top_k_leaves_so_many_tokens_whatever_top_p_is() -> None:
    tokens, _ = drawn(20_000, temperature=2.0, top_k=5, top_p=0.9999)
    assert set(tokens.tolist()) == set(LOGITS.topk(5).indices.tolist())


def test_noise_is_independent_of_answer_position_and_token() -> None:
    ids = hashed_ids(0, 400, device=CPU)
    noise = torch.stack([exponential_noise(keys_of(200, position=place), ids) for place in range(10)]).double().numpy()
    assert noise.min() > 0 and np.isfinite(noise).all()
    assert abs(noise.mean() - 1) < 0.005 and abs(noise.var() - 1) < 0.02
    uniform = np.exp(-noise)
    counts = np.histogram(uniform, bins=64, range=(0, 1))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 64 + 4 * np.sqrt(128)
    for axis in range(3):
        one, other = np.moveaxis(uniform, axis, 0)[:-1], np.moveaxis(uniform, axis, 0)[1:]
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.005
    for answer in range(0, 200, 40):  # neighbours in the vocabulary, of one draw
        assert abs(np.corrcoef(uniform[0, answer, :-1], uniform[0, answer, 1:])[0, 1]) < 0.2


def test_a_slice_of_the_vocabulary_has_its_slice_of_the_noise() -> None:
    keys = keys_of(5)
    whole = exponential_noise(keys, hashed_ids(0, 39_438, device=CPU))
    for first, last in ((0, 128), (19_719, 39_438), (39_000, 39_001)):
        assert torch.equal(exponential_noise(keys, hashed_ids(first, last, device=CPU)), whole[:, first:last])


def test_keys_differ_in_every_part_and_in_their_order() -> None:
    seen = {sequence_key(*parts) for parts in np.ndindex(4, 4, 8, 8)}
    assert len(seen) == 4 * 4 * 8 * 8
    assert sequence_key(1, 2) != sequence_key(2, 1)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (8, 0.7), (100, 1.0), (0, 1e-9), (1, 1.0)])
def test_only_what_top_k_and_then_top_p_leave_is_drawn(top_k: int, top_p: float) -> None:
    tokens, logprobs = drawn(20_000, top_k=top_k, top_p=top_p)
    whole = LOGITS.double().softmax(dim=0).numpy()
    ranked = np.argsort(-whole)
    kept = list(ranked[: top_k or None])
    mass, wanted = 0.0, top_p * whole[kept].sum()
    for number, token in enumerate(kept):
        if mass >= wanted and top_p < 1:
            kept = kept[:number]
            break
        mass += whole[token]
    kept = kept or [ranked[0]]
    assert set(tokens) == {token for token in kept if whole[token] * 20_000 / whole[kept].sum() > 20} | set(tokens)
    assert set(tokens) <= set(kept)
    restricted = np.zeros(VOCAB_SIZE)
    restricted[kept] = whole[kept] / whole[kept].sum()
    if len(kept) > 1:
        assert chi_square(tokens, restricted) < 4
    np.testing.assert_allclose(logprobs, np.log(whole)[tokens], atol=1e-5)  # of the whole distribution


def test_a_wide_nucleus_is_found_whole() -> None:
    """Wider than the candidates that are looked at first."""
    size = 5000
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 0.5, size).astype(np.float32))
    sampler = Sampler(SamplingOptions(top_p=0.9), columns=size, vocab_size=size, tp_group=dist.group.WORLD)
    shares = logits.double().softmax(dim=0).sort(descending=True)
    width = int((shares.values.cumsum(0) < 0.9).sum()) + 1
    assert width > 1000
    threshold = sampler._threshold(logits[None])[0]
    assert int((logits >= threshold).sum()) == width


def test_no_stop_token_before_the_minimum_length() -> None:
    options = SamplingOptions(min_response_length=3, stop_ids=(int(LOGITS.argmax()),))
    for temperature in (0.0, 1.0):
        sampler = Sampler(
            SamplingOptions(temperature=temperature, min_response_length=3, stop_ids=options.stop_ids),
            columns=VOCAB_SIZE, vocab_size=VOCAB_SIZE, tp_group=dist.group.WORLD,
        )  # fmt: skip
        certain = LOGITS.repeat(100, 1)
        certain[:, options.stop_ids[0]] = 500.0  # nothing else has a chance
        too_short = torch.arange(100) < 50
        found = sampler.sample(certain, keys=keys_of(100), too_short=too_short)
        stops = found[:, 0].int() == options.stop_ids[0]
        assert torch.equal(stops, ~too_short)
        if temperature:
            assert len(set(found[:50, 0].tolist())) > 5
