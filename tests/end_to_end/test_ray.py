"""`data build` by the tasks of a real Ray cluster on this machine."""

import pytest

from megatron_xy.errors import ConfigError, DataError
from tests.building import build_dataset
from tests.unit.small_corpus import content, texts, train_tokenizer, write_rows

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs; gone afterwards."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 5000)
    monkeypatch.setattr("megatron_xy.data.building.build_folder.WINDOW_DOCUMENTS", 100)
    rows = [{"text": text, "src": "ab"[number % 2]} for number, text in enumerate(texts(400))]
    return write_rows(tmp_path / "corpus/a.jsonl", rows), train_tokenizer(tmp_path / "tokenizer.model")


def run(corpus, output, **options):
    inputs, tokenizer = [corpus[0]], corpus[1]
    options = {"buckets": (64, 256), "source_field": "src", "deduplicate": True, **options}
    return build_dataset(inputs, tokenizer=tokenizer, output=output, **options)


def test_the_same_bytes_from_ray_with_relative_paths(cluster, corpus, tmp_path, monkeypatch):
    run(corpus, tmp_path / "local")
    seen = []
    monkeypatch.chdir(tmp_path)
    stats = run(corpus, "from_ray", executor="ray", workers=2, progress=lambda *report: seen.append(report))
    assert stats["finished"] and content(tmp_path / "from_ray") == content(tmp_path / "local")
    assert {phase for phase, *_ in seen} >= {"scan", "hash", "tokenize", "pack"}
    assert ray.is_initialized(), "the cluster is left as it was"


def test_an_error_in_a_task_of_rays_is_the_errors_own(cluster, corpus, tmp_path):
    with corpus[0].open("ab") as stream:
        stream.write(b"{\n")
    with pytest.raises(DataError, match=r"a\.jsonl:401: invalid JSON"):
        run(corpus, tmp_path / "out", executor="ray", workers=2, bad_lines="fail")


def test_without_a_cluster_it_is_said_how_to_start_one(corpus, tmp_path):
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(ConfigError, match="no Ray cluster is running; start one with `ray start --head`"):
        run(corpus, tmp_path / "out", executor="ray")
