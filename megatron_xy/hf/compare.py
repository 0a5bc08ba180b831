"""`megatron-xy compare`: released forms of one model -> one table: sizes, perplexity by bucket and source, divergence.

Each form is opened by transformers as its users do, on the same held-out documents of a `data build` folder.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.sampler import SampleId
from megatron_xy.errors import ConfigError
from megatron_xy.hf.config import read_hf_config
from megatron_xy.hf.folder import read_object
from megatron_xy.hf.verb import place

Say = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """A document, or what of it lies in a sample, as token ids [length], and where it lies."""

    source: str
    bucket: int
    tokens: list[int]


def compare(forms: Sequence[str], data: Path, *, num_samples: int, say: Say) -> dict[str, dict[str, Any]]:
    """{hf:DIR: {bytes_on_disk, bytes_in_memory, perplexity, perplexity_by_bucket, perplexity_by_source, kl}}.

    kl: mean over tokens of the divergence of a form's next-token distribution from that of the first one that is not
    quantised. num_samples: of each source and bucket. Raises ConfigError, DataError.
    """
    folders = [_folder(form) for form in forms]
    shapes = [read_hf_config(folder) for folder in folders]
    plain = [folder for folder in folders if not (read_object(folder, "config.json") or {}).get("quantization_config")]
    if not plain:
        raise ConfigError(f"{', '.join(forms)}: one of them must be the form that is not quantised, to compare with")
    dataset = PackedDataset([data])
    if (known := min(shape.vocab_size or 0 for shape in shapes)) < dataset.vocab_size:
        raise ConfigError(f"--data ({data}): has a vocabulary of {dataset.vocab_size}, more than the models' {known}")
    documents = list(_documents(dataset, num_samples=num_samples))
    reference = _opened(plain[0])
    table: dict[str, dict[str, Any]] = {}
    for form, folder in zip(forms, folders, strict=True):
        say(f"{folder}: {len(documents):,} documents, {sum(len(it.tokens) for it in documents):,} tokens")
        model = reference if folder == plain[0] else _opened(folder)
        table[form] = {
            "bytes_on_disk": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
            "bytes_in_memory": int(model.get_memory_footprint()),
            **_measured(model, reference, documents),
        }
    return table


def rows_of(table: dict[str, dict[str, Any]]) -> list[str]:
    """The table for people, its numbers by part in further columns."""
    columns: list[list[str]] = [["form", *table]]
    columns.append(["MB on disk", *(f"{row['bytes_on_disk'] / 1e6:,.1f}" for row in table.values())])
    columns.append(["MB at load", *(f"{row['bytes_in_memory'] / 1e6:,.1f}" for row in table.values())])
    columns.append(["perplexity", *(f"{row['perplexity']:.3f}" for row in table.values())])
    for by in ("perplexity_by_bucket", "perplexity_by_source"):
        for part in next(iter(table.values()))[by]:
            columns.append([part, *(f"{row[by][part]:.3f}" for row in table.values())])
    columns.append(["KL", *(f"{row['kl']:.2e}" for row in table.values())])
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{column[line]:<{width}}" for column, width in zip(columns, widths, strict=True)).rstrip()
        for line in range(len(table) + 1)
    ]


@torch.inference_mode()
def _measured(model: Any, reference: Any, documents: Sequence[Document]) -> dict[str, Any]:
    losses: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    divergence = 0.0
    for document in documents:
        ids = torch.tensor([document.tokens], device=model.device)
        logprobs = model(ids).logits[0, :-1].float().log_softmax(dim=-1)
        loss = -float(logprobs.gather(1, ids[0, 1:, None]).double().sum())
        if model is not reference:
            expected = reference(ids.to(reference.device)).logits[0, :-1].float().log_softmax(dim=-1)
            expected = expected.to(logprobs.device)
            divergence += float((expected.exp() * (expected - logprobs)).sum(dim=-1).double().sum())
        for part in (("all", ""), ("bucket", str(document.bucket)), ("source", document.source)):
            losses[part] += loss
            counts[part] += len(document.tokens) - 1
    perplexities = {part: math.exp(min(losses[part] / counts[part], 700.0)) for part in losses}
    return {
        "perplexity": perplexities["all", ""],
        "perplexity_by_bucket": {name: value for (kind, name), value in perplexities.items() if kind == "bucket"},
        "perplexity_by_source": {name: value for (kind, name), value in perplexities.items() if kind == "source"},
        "kl": divergence / counts["all", ""],
    }


def _documents(dataset: PackedDataset, *, num_samples: int) -> Iterator[Document]:
    """Of the first samples of each source and bucket; a single token has nothing to predict."""
    for stream in dataset.streams:
        for index in range(min(num_samples, stream.num_samples)):
            sample = dataset.sample(SampleId(stream.source, stream.bucket, index))
            begin = 0
            for length in sample.piece_lengths.tolist():
                if length > 1:
                    yield Document(stream.source, stream.bucket, sample.tokens[begin : begin + length].tolist())
                begin += length


def _opened(folder: Path) -> Any:
    where = "auto" if torch.accelerator.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=where).eval()


def _folder(form: str) -> Path:
    kind, folder = place(form, "compare")
    if kind != "hf":
        raise ConfigError(f"compare {form}: must be hf:DIR; `convert` and `quantize` write such folders")
    return folder
