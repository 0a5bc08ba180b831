"""`compare`: the table of a model's forms, for people and in their model cards, and arguments that do not fit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.errors import ConfigError, DataError, UsageError
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.quantisation import compare as comparing
from megatron_xy.quantisation.compare import Document, _measured, _uneven_layers, compare, rows_of, write_cards
from tests.building import build_dataset
from tests.end_to_end.random_model import write_random_model
from tests.unit.small_corpus import WORDS, texts, train_tokenizer, write_rows
from tools.train_tokenizer import train


def row(perplexity: float, *, accuracy: float) -> dict[str, Any]:
    """A form's measures."""
    return {
        "bytes_on_disk": 2_000_000,
        "bytes_in_memory": 1_500_000,
        "perplexity": perplexity,
        "perplexity_by_bucket": {"128": perplexity, "1024": 2.0},
        "perplexity_by_source": {"code": 3.0},
        "kl": 0.0,
        "benchmarks": {"mmlu": {"acc": accuracy, "acc_stderr": 0.1}, "mmlu_law": {"acc": 0.0}},
    }


def test_the_table_stands_once_in_every_model_card_however_often_it_is_written(tmp_path: Path) -> None:
    for name in ("bf16", "int8"):
        (tmp_path / name).mkdir()
    card = tmp_path / "bf16" / "README.md"
    card.write_text("---\nlibrary_name: transformers\n---\n\n# Model card\n\nA model.\n")
    table = {f"hf:{tmp_path / 'bf16'}": row(5.0, accuracy=0.5), f"hf:{tmp_path / 'int8'}": row(5.25, accuracy=0.25)}
    said: list[str] = []
    for perplexity in (9.0, 5.0):
        first = {name: {**it, "perplexity": perplexity} for name, it in table.items()}
        write_cards(first, data=tmp_path / "data", num_samples=4, tasks={"mmlu": "mmlu 5-shot"}, say=said.append)
    text = card.read_text()
    assert text.startswith("---\nlibrary_name: transformers\n---\n\n# Model card\n\nA model.\n\n")
    assert text.count("## Forms of this model") == 1 and "9.000" not in text
    for line in ("| form | bf16 | int8 |", "| perplexity | 5.000 | 5.000 |", "| mmlu 5-shot acc | 0.5000 | 0.2500 |"):
        assert line in text.splitlines()
    assert "mmlu_law" not in text and str(tmp_path) not in text
    assert (tmp_path / "int8" / "README.md").read_text().startswith("# Model card\n\n")
    write_cards(
        {name: {**it, "perplexity": 5.0} for name, it in table.items()},
        data=tmp_path / "data",
        num_samples=4,
        tasks={"mmlu": "mmlu 5-shot"},
        say=said.append,
    )
    assert card.read_text() == text
    assert sorted(path.name for path in card.parent.iterdir()) == ["README.md"] and not said
    less = {name: {**it, "benchmarks": {}} for name, it in table.items()}
    write_cards(less, data=tmp_path / "data", num_samples=4, tasks={}, say=said.append)
    assert all("also told mmlu 5-shot acc; ask again" in line for line in said) and len(said) == 2


def test_people_see_a_line_a_form() -> None:
    head, first, second = rows_of(
        {"hf:a": row(5.0, accuracy=0.5), "hf:b": row(6.0, accuracy=0.25)}, tasks={"mmlu": "mmlu 5-shot"}
    )
    assert head.split("  ")[0] == "form" and head.index("bucket 128") < head.index("bucket 1024")
    assert first.split()[:4] == ["hf:a", "2.0", "1.5", "5.000"] and second.split()[-1] == "0.2500"


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    def compared(name: str, config: str | None) -> None:
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(config)
        compare([f"hf:{tmp_path / name}"], tmp_path, num_samples=1, ask=None, say=print)

    with pytest.raises(UsageError, match="must be hf:DIR"):
        compare([f"ckpt:{tmp_path}"], tmp_path, num_samples=1, ask=None, say=print)
    with pytest.raises(ConfigError, match=r"has no config.json"):
        compared("empty", None)
    with pytest.raises(DataError, match="damaged"):
        compared("damaged", "{")
    with pytest.raises(DataError, match="transformers cannot open it"):
        compared("unknown", '{"model_type": "none"}')
    with pytest.raises(ConfigError, match="reward model"):
        compared("reward", '{"architectures": ["LlamaForSequenceClassification"]}')
    with pytest.raises(ConfigError, match="one of them must be the form that is not quantised"):
        compared("int8", '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}')
    for vocab_size in (8, 9):
        (tmp_path / str(vocab_size)).mkdir()
        (tmp_path / str(vocab_size) / "config.json").write_text(
            f'{{"model_type": "llama", "vocab_size": {vocab_size}}}'
        )
    with pytest.raises(ConfigError, match=r"8 has a vocabulary of 8, hf:.*9 one of 9"):
        compare([f"hf:{tmp_path / name}" for name in "89"], tmp_path, num_samples=1, ask=None, say=print)


@pytest.mark.skipif(find_spec("accelerate") is None, reason="the extra int8 is not installed")
def test_a_form_that_cannot_be_measured_does_not_lose_the_others(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(4)])
    build_dataset([corpus], tokenizer=tokenizer, output=tmp_path / "data", buckets=[64])
    forms = [f"hf:{write_random_model(tmp_path / name)}" for name in ("first", "damaged", "third")]
    write_hf_tokenizer(tokenizer, tmp_path / "third", model_max_length=128)
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"none")
    said: list[str] = []

    def ask(model: Any, folder: Path) -> dict[str, dict[str, Any]]:
        if folder.name == "third":
            raise AssertionError("a library's own")
        return {"mmlu": {"acc": 0.5}}

    table, failed = compare(forms, tmp_path / "data", num_samples=1, ask=ask, say=said.append)
    assert list(table) == forms[:1] and table[forms[0]]["kl"] == 0 and failed == forms[1:]
    assert f"{forms[0]}: all are compared with it, the first of 3 that are not quantised" in said
    assert [line for line in said if line.startswith("warning: whether")][1:] == said[2:3], "two have no tokenizer"
    (damaged, third) = (line for line in said if line.startswith("error: "))
    assert "damaged: transformers cannot open it" in damaged and damaged.endswith("; write it again")
    assert third.endswith(
        "third: it opens, and cannot be computed on this machine: a library's own; compare on another one"
    )
    with pytest.raises(DataError, match="damaged: transformers cannot open it"):
        compare(forms[1:2], tmp_path / "data", num_samples=1, ask=None, say=said.append)
    (tmp_path / "other").mkdir()
    foreign = train(WORDS * 9, vocab_size=300)
    (tmp_path / "other" / "tokenizer.model").write_bytes(foreign)
    build_dataset([corpus], tokenizer=tmp_path / "other", output=tmp_path / "foreign", buckets=[64])
    with pytest.raises(DataError, match=r"foreign was built with another tokenizer than .*third"):
        compare(forms, tmp_path / "foreign", num_samples=1, ask=None, say=said.append)


def test_the_positions_of_a_document_are_compared_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)

    class Bigrams:
        device = torch.device("cpu")

        def __init__(self) -> None:
            self.table = torch.randn(9, 9, generator=generator)

        def __call__(self, ids: torch.Tensor) -> Any:
            return SimpleNamespace(logits=self.table[ids])

    one, other = Bigrams(), Bigrams()
    tokens = torch.randint(9, (50,), generator=generator).tolist()
    documents = [Document("default", 64, tokens, list(range(0, 49, 2)))]
    whole = _measured(one, other, documents, show=lambda *_: None)
    rows, softmax = list[int](), torch.Tensor.log_softmax

    def counted(logits: torch.Tensor, dim: int) -> torch.Tensor:
        rows.append(len(logits))
        return softmax(logits, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", counted)
    monkeypatch.setattr(comparing, "POSITIONS", 10)
    pieces = _measured(one, other, documents, show=lambda *_: None)
    assert [pieces["perplexity"], pieces["kl"]] == pytest.approx([whole["perplexity"], whole["kl"]], rel=1e-9)
    assert rows == [10, 10, 10, 10, 5, 5]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="the extra int8 is not installed")
def test_the_layer_that_four_bits_do_not_fit_is_named() -> None:
    from bitsandbytes.nn import Linear4bit

    even, uneven = torch.nn.Sequential(Linear4bit(64, 32)), torch.nn.Sequential(Linear4bit(64, 32), Linear4bit(48, 32))
    assert _uneven_layers(even) == ""
    assert _uneven_layers(uneven).endswith("rows are a multiple of 32 and columns of 64, and 1 has 32 and 48; ")


@pytest.mark.parametrize("option", [["--limit", "3"], ["--num-fewshot", "0"], ["--apply-chat-template"]])
def test_how_benchmarks_are_put_needs_their_names(option: list[str]) -> None:
    with pytest.raises(UsageError, match=f"{option[0]}: .*name them with --tasks"):
        CliRunner().invoke(app, ["compare", "hf:none", "--data", "none", *option], catch_exceptions=False)
