"""`megatron-xy compare`: released forms of one model -> one table: sizes, perplexity, divergence, benchmarks.

Each form is opened by transformers as its users do, whatever its architecture, on the same held-out documents of a
`data build` folder. The table goes to the terminal and, where wanted, into each form's model card.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_xy import __version__
from megatron_xy.data.building.workers import Progress
from megatron_xy.data.dataset import PackedDataset
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.inspection.progress import showing_progress
from megatron_xy.errors import ConfigError, DataError, MegatronXYError, UsageError
from megatron_xy.hf.folder import file_inside, read_object
from megatron_xy.hf.release import MODEL_CARD
from megatron_xy.hf.tokenizer import check_tokenizers
from megatron_xy.hf.verb import place
from megatron_xy.quantisation import nf4
from megatron_xy.storage import write_text

CARD_BEGINS, CARD_ENDS = "<!-- megatron-xy compare: begins -->", "<!-- megatron-xy compare: ends -->"
# What a form is opened with, and the extra that brings it, by its quant_method.
QUANTISERS = {"bitsandbytes": ("bitsandbytes", "int8"), "compressed-tensors": ("compressed_tensors", "quantize")}
POSITIONS = 1024  # of a document that are compared at a time: each holds a few copies of the vocabulary in fp32
Say = Callable[[str], None]
Ask = Callable[[Any, Path], dict[str, dict[str, Any]]]  # an opened model and its folder -> {task: {metric: value}}


@dataclass(frozen=True)
class Form:
    """A released form: as it was named, its folder, and how it is quantised, None where it is not."""

    name: str
    folder: Path
    quantised_by: str | None
    vocab_size: int


@dataclass(frozen=True)
class Document:
    """A document, or what of it lies in a sample, and where it lies: token ids [length].

    asked [length - 1]: the places of `tokens` whose next token counts; of conversations, those before the answers'.
    """

    source: str
    bucket: int
    tokens: list[int]
    asked: list[int]


def compare(
    names: Sequence[str], data: Path, *, num_samples: int, ask: Ask | None, say: Say
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """{hf:DIR: {bytes_on_disk, bytes_in_memory, perplexity, perplexity_by_bucket, perplexity_by_source, kl, ...}}.

    And the forms of which there is nothing to tell, said why. kl: mean over tokens of the divergence of a form's
    next-token distribution from that of the first one that is not quantised. num_samples: of each source and bucket.
    ask: gives `benchmarks` of each. Raises UsageError, ConfigError, DataError: for what does not go together, before
    anything is measured, and where no form can be.
    """
    forms = [_form(name) for name in dict.fromkeys(names)]
    plain = _reference(forms, say=say)
    dataset = PackedDataset([data])
    if plain.vocab_size < dataset.vocab_size:
        raise ConfigError(
            f"--data ({data}): has a vocabulary of {dataset.vocab_size}, more than the models' {plain.vocab_size}; "
            f"name data of their tokenizer"
        )
    for form in forms:
        check_tokenizers(data, form.folder, say=say)
    documents = list(_documents(dataset, num_samples=num_samples))
    if not documents:
        raise DataError(f"--data ({data}): holds no token that follows another; build it from longer documents")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says in each layer that it casts
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    reference = _opened(plain)
    table: dict[str, dict[str, Any]] = {}
    failures: dict[str, MegatronXYError] = {}
    for form in forms:
        say(f"{form.folder}: {len(documents):,} documents, {sum(len(it.asked) for it in documents):,} tokens")
        try:
            model = reference if form is plain else _opened(form)
            table[form.name] = _row(form, model, reference, documents, ask=ask)
        except MegatronXYError as error:  # the others' hours are not to be lost
            say(f"error: {error}")
            failures[form.name] = error
    if not table:
        raise failures[forms[0].name]
    return table, list(failures)


def rows_of(table: dict[str, dict[str, Any]], *, tasks: Mapping[str, str]) -> list[str]:
    """The table for people, a line a form, its numbers by part in further columns; tasks: {asked for: as told}."""
    columns = _columns(table, names=list(table), tasks=tasks)
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(f"{column[line]:<{width}}" for column, width in zip(columns, widths, strict=True)).rstrip()
        for line in range(len(table) + 1)
    ]


def write_cards(
    table: dict[str, dict[str, Any]], *, data: Path, num_samples: int, tasks: Mapping[str, str], say: Say
) -> None:
    """The table at the end of each form's README.md, instead of an earlier one; says what only that one told.

    Raises DataError, StorageError.
    """
    folders = {name: place(name, "compare")[1] for name in table}
    short = [folder.resolve().name for folder in folders.values()]
    names = short if len(set(short)) == len(short) else list(table)
    head, *lines = _columns(table, names=names, tasks=tasks)
    markdown = [head, ["---"] * len(head), *lines]
    section = "\n".join(
        [
            CARD_BEGINS,
            "## Forms of this model",
            "",
            f"Measured by megatron_xy {__version__} on {data.resolve().name}, up to {num_samples} samples of each "
            "source and bucket: perplexity in all, by bucket and by source; KL, the mean divergence of the next-token "
            "distribution from the form that is not quantised.",
            "",
            *(f"| {' | '.join(cells)} |" for cells in markdown),
            CARD_ENDS,
        ]
    )
    for folder in folders.values():
        path = file_inside(folder, MODEL_CARD)
        try:
            card = "# Model card" if path is None else path.read_text(encoding="utf-8")
        except ValueError as error:
            raise DataError(f"{path} is no text: {error}; remove it") from None
        pattern = f"{re.escape(CARD_BEGINS)}.*?{re.escape(CARD_ENDS)}"
        earlier = "\n".join(re.findall(pattern, card, flags=re.DOTALL))
        measures = re.findall(r"^\| (.+?) \|", earlier, flags=re.MULTILINE)
        if gone := [name for name in measures if name not in ("---", *(row[0] for row in markdown))]:
            say(f"warning: {path}: the table that is replaced also told {', '.join(gone)}; ask again to have it there")
        rest = re.sub(pattern, "", card, flags=re.DOTALL).rstrip()
        write_text(folder / MODEL_CARD, f"{rest}\n\n{section}\n")


def _columns(table: dict[str, dict[str, Any]], *, names: Sequence[str], tasks: Mapping[str, str]) -> list[list[str]]:
    """What there is to tell of each form, its name before: a measure, then one cell a form."""
    rows = list(table.values())
    columns = [["form", *names]]
    columns.append(["MB on disk", *(f"{row['bytes_on_disk'] / 1e6:,.1f}" for row in rows)])
    columns.append(["MB at load", *(f"{row['bytes_in_memory'] / 1e6:,.1f}" for row in rows)])
    columns.append(["perplexity", *(f"{row['perplexity']:.3f}" for row in rows)])
    for kind in ("bucket", "source"):
        for part in rows[0][f"perplexity_by_{kind}"]:
            columns.append([f"{kind} {part}", *(f"{row[f'perplexity_by_{kind}'][part]:.3f}" for row in rows)])
    columns.append(["KL", *(f"{row['kl']:.2e}" for row in rows)])
    found = rows[0].get("benchmarks", {})
    for task in [task for task in tasks if task in found] or found:  # a tag's tasks have no mean
        metric = "acc" if "acc" in found[task] else next(iter(found[task]))
        columns.append(
            [f"{tasks.get(task, task)} {metric}", *(f"{row['benchmarks'][task][metric]:.4f}" for row in rows)]
        )
    return columns


def _reference(forms: Sequence[Form], *, say: Say) -> Form:
    """The form that the others are compared with. Raises ConfigError where they cannot be forms of one model."""
    plain = [form for form in forms if form.quantised_by is None]
    if not plain:
        names = ", ".join(form.name for form in forms)
        raise ConfigError(f"{names}: one of them must be the form that is not quantised, to compare with")
    first = plain[0]
    if other := next((form for form in forms if form.vocab_size != first.vocab_size), None):
        raise ConfigError(
            f"{first.name} has a vocabulary of {first.vocab_size}, {other.name} one of {other.vocab_size}; forms of "
            f"one model have the same: name those"
        )
    if len(plain) > 1:
        say(f"{first.name}: all are compared with it, the first of {len(plain)} that are not quantised")
    return first


def _row(form: Form, model: Any, reference: Any, documents: Sequence[Document], *, ask: Ask | None) -> dict[str, Any]:
    """What there is to tell of one form, opened. Raises ConfigError, DataError."""
    at_load = int(model.get_memory_footprint())  # compressed-tensors unpacks a form when it is first computed
    with _compute_errors(form, model), showing_progress() as show:
        measured = _measured(model, reference, documents, show=show)
    with _compute_errors(form, model):
        benchmarks = {} if ask is None else {"benchmarks": ask(model, form.folder)}
    files = [path for path in form.folder.iterdir() if path.is_file() and path.name != MODEL_CARD]
    return {
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "bytes_in_memory": at_load,
        **measured,
        **benchmarks,
    }


@torch.inference_mode()
def _measured(model: Any, reference: Any, documents: Sequence[Document], *, show: Progress) -> dict[str, Any]:
    losses: dict[tuple[str, int | str], float] = defaultdict(float)
    counts: dict[tuple[str, int | str], int] = defaultdict(int)
    divergence = 0.0
    for number, document in enumerate(documents, start=1):
        tokens, loss = torch.tensor(document.tokens), 0.0
        logits = model(tokens[None].to(model.device)).logits[0]
        expected_logits = None if model is reference else reference(tokens[None].to(reference.device)).logits[0]
        for places in torch.split(torch.tensor(document.asked), POSITIONS):
            logprobs = logits[places].float().log_softmax(dim=-1)
            loss -= float(logprobs[range(len(places)), tokens[places + 1]].double().sum())
            if expected_logits is not None:
                expected = expected_logits[places].float().log_softmax(dim=-1).to(logprobs.device)
                divergence += float((expected.exp() * (expected - logprobs)).sum(dim=-1).double().sum())
        for part in (("all", ""), ("bucket", document.bucket), ("source", document.source)):
            losses[part] += loss
            counts[part] += len(document.asked)
        show("compare", number, len(documents), "documents")

    def perplexities(kind: str) -> dict[str, float]:
        parts = sorted(part for part in losses if part[0] == kind)
        return {str(part[1]): math.exp(min(losses[part] / counts[part], 700.0)) for part in parts}

    return {
        "perplexity": perplexities("all")[""],
        "perplexity_by_bucket": perplexities("bucket"),
        "perplexity_by_source": perplexities("source"),
        "kl": divergence / counts["all", ""],
    }


def _documents(dataset: PackedDataset, *, num_samples: int) -> Iterator[Document]:
    """Of the first samples of each source and bucket, those in which there is something to predict."""
    for stream in dataset.streams:
        for index in range(min(num_samples, stream.num_samples)):
            sample = dataset.sample(SampleId(stream.source, stream.bucket, index))
            learned = np.ones(len(sample.tokens), dtype=bool) if sample.learned is None else sample.learned
            begin = 0
            for length in sample.piece_lengths.tolist():
                asked = np.flatnonzero(learned[begin + 1 : begin + length]).tolist()
                if asked:
                    tokens = sample.tokens[begin : begin + length].tolist()
                    yield Document(stream.source, stream.bucket, tokens, asked)
                begin += length


def _form(name: str) -> Form:
    kind, folder = place(name, "compare")
    if kind != "hf":
        raise UsageError(f"compare {name}: must be hf:DIR; `convert` and `quantize` write such folders")
    values = read_object(folder, "config.json")
    if values is None:
        raise ConfigError(f"{folder} has no config.json; name a folder that `convert` or `quantize` wrote")
    if any("SequenceClassification" in str(kind) for kind in values.get("architectures") or ()):
        raise ConfigError(f"{folder} holds a reward model; only language models are compared")
    quantised_by = (values.get("quantization_config") or {}).get("quant_method")
    package, extra = QUANTISERS.get(str(quantised_by), ("transformers", "hf"))
    if find_spec(package) is None:
        raise ConfigError(f"{folder} needs {package}, of the extra {extra}: pip install 'megatron-xy[{extra}]'")
    with _opening_errors(folder):
        vocab_size = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    return Form(name, folder, quantised_by, int(vocab_size))


def _opened(form: Form) -> Any:
    where = "auto" if torch.accelerator.is_available() else "cpu"
    with _opening_errors(form.folder):
        return AutoModelForCausalLM.from_pretrained(form.folder, dtype="auto", device_map=where).eval()


@contextmanager
def _opening_errors(folder: Path) -> Iterator[None]:
    """Turns what transformers says of a folder that it cannot open into a DataError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_large(folder, error) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        remedy = "; write it again" if isinstance(error, OSError | SafetensorError) else ""  # others are no damage
        raise DataError(f"{folder}: transformers cannot open it: {error}{remedy}") from error


@contextmanager
def _compute_errors(form: Form, model: Any) -> Iterator[None]:
    """Turns what libraries say of a form that they cannot compute on this machine into a DataError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_large(form.folder, error) from error
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        why = "" if model.device.type != "cpu" else _uneven_layers(model)
        raise DataError(
            f"{form.folder}: it opens, and cannot be computed on this machine: {error}; {why}compare on another one"
        ) from error


def _too_large(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{folder}: does not fit beside the form it is compared with: {error}")


def _uneven_layers(model: Any) -> str:
    """Of 4 bits: which layer bitsandbytes does not compute on a CPU with AVX512-BF16."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and nf4.is_uneven(module):
            return (
                f"bitsandbytes computes 4 bits on such a CPU where rows are a multiple of {nf4.ROWS} and columns of "
                f"{nf4.COLUMNS}, and {name} has {module.out_features} and {module.in_features}; "
            )
    return ""
