"""The batches of a run with phases: weights, batch size, consumed tokens and shares follow them at their steps."""

from pathlib import Path

import pytest

from megatron_xy.config import RunConfig
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.phase_draws import total_tokens
from megatron_xy.data.draws.phases import sampler_phases
from megatron_xy.data.loader import StepLoader
from tests.building import build_dataset
from tests.unit import small_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": text, "source": "ab"[number % 2]} for number, text in enumerate(small_corpus.texts(400))]
    corpus = small_corpus.write_rows(folder / "corpus.jsonl", rows)
    tokenizer = small_corpus.train_tokenizer(folder / "tokenizer.model")
    build_dataset([corpus], tokenizer=tokenizer, output=folder / "built", buckets=(16, 32, 64), source_field="source")
    return folder / "built"


PHASES = [{"from_iter": 6, "weights": {"a": 9, "b": 1}}, {"from_iter": 10, "global_batch_tokens": 512}]


def test_the_tokens_of_a_run_follow_its_phases():
    phases = sampler_phases(RunConfig.model_validate({"training": {"global_batch_tokens": 256, "phases": PHASES}}))
    for train_iters in (1, 6, 10, 11, 40):
        want = sum(256 if step < 10 else 512 for step in range(train_iters))
        assert total_tokens(phases, num_steps=train_iters) == want


def test_batches_shares_and_tokens_follow_the_phases(data):
    config = RunConfig.model_validate(
        {
            "data": {"path": str(data), "weights": {"a": 1, "b": 1}},
            "training": {"global_batch_tokens": 256, "micro_batch_tokens": 64, "phases": PHASES},
        }
    )
    dataset = PackedDataset(config.data.paths)
    ranks = [StepLoader(config, dataset=dataset, dp_size=2, dp_rank=rank) for rank in range(2)]
    drawn = {"a": 0, "b": 0}
    tokens = 0
    at: dict[int, dict[str, int]] = {}
    for step in range(24):
        prepared = [loader.get(step)[0] for loader in ranks]
        assert prepared[0].samples == prepared[1].samples and prepared[0].bucket == prepared[1].bucket
        tokens += prepared[0].num_tokens
        assert prepared[0].num_tokens == (512 if step >= 10 else 256)
        assert [len(part.micro_batches) for part in prepared] == [prepared[0].num_tokens // (64 * 2)] * 2
        for source, indices in prepared[0].samples.items():
            drawn[source] += len(indices) * prepared[0].bucket
        at[step + 1] = dict(drawn)
        assert ranks[0].sampler.consumed_tokens(step + 1) == tokens
        total = sum(drawn.values())
        want = {source: part / total for source, part in drawn.items()}
        assert ranks[0].consumed_shares(step + 1) == pytest.approx(want, rel=1e-12)
    before = at[6]["a"] / (at[6]["a"] + at[6]["b"])
    after = (at[24]["a"] - at[6]["a"]) / (sum(at[24].values()) - sum(at[6].values()))
    assert before == pytest.approx(0.5, abs=0.1) and after == pytest.approx(0.9, abs=0.04)
    for loader in ranks:
        loader.close()


def test_epochs_are_counted_and_told_at_the_step_that_begins_them(data):
    config = RunConfig.model_validate(
        {
            "data": {"path": str(data), "weights": {"a": 5, "b": 1}},
            "training": {"global_batch_tokens": 1024, "micro_batch_tokens": 64},
        }
    )
    dataset = PackedDataset(config.data.paths)
    loader = StepLoader(config, dataset=dataset, dp_size=1, dp_rank=0)
    sizes = {(stream.source, stream.bucket): stream.num_samples for stream in dataset.streams}
    drawn = dict.fromkeys(sizes, 0)
    told = 0
    for step in range(200):
        begun = {}  # the last one, where a step goes through few samples several times
        for source, bucket, _ in loader.sampler.batch(step).samples:
            drawn[source, bucket] += 1
            if drawn[source, bucket] > 1 and drawn[source, bucket] % sizes[source, bucket] == 1 % sizes[source, bucket]:
                begun[source, bucket] = -(-drawn[source, bucket] // sizes[source, bucket])
        assert {(source, bucket): number for source, bucket, number in loader.begun_epochs(step)} == begun
        told += len(begun)
        for (source, bucket), count in drawn.items():
            epochs = loader.epochs_by_source(step + 1)[source][str(bucket)]
            assert epochs == pytest.approx(count / sizes[source, bucket], rel=1e-12)
    assert told > 5
    loader.close()
