"""Trains a Llama-style SentencePiece tokenizer (BPE with byte fallback) on a sample of jsonl files.

From rows with a `text` to one tokenizer.model. As in Llama: text is taken as it stands, every digit is a token of its
own, runs of spaces have pieces, what has no piece becomes bytes, and <unk>, <s>, </s> are 0, 1, 2. The same files,
seed and options give the same tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_xy.errors import ConfigError, DataError, with_exit_code
from megatron_xy.storage import storage_errors, write_bytes

HEARTBEAT_SECONDS = 3.0
HELD_OUT_SHARE = 0.05  # of the sample, to count bytes per token on text that the tokenizer has not seen
LONGEST_LINE_BYTES = 16384
NUM_THREADS = 4  # the model file records it: the same on every machine


@dataclass(frozen=True)
class Sample:
    """Whole texts, in the order of the files."""

    training: list[str]
    held_out: list[str]


@with_exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="jsonl files, or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer.model to write")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sample-megabytes", type=float, default=4.0, help="of text to train on")
    parser.add_argument("--seed", type=int, default=1234, help="which texts the sample takes")
    options = parser.parse_args(arguments)
    sample = draw_sample(options.input, megabytes=options.sample_megabytes, seed=options.seed)
    num_bytes = sum(len(text.encode()) for text in sample.training)
    print(f"training a vocabulary of {options.vocab_size} on {num_bytes / 1e6:.1f} MB", flush=True)
    start = time.monotonic()
    with _heartbeat():
        model = train(sample.training, vocab_size=options.vocab_size)
    with storage_errors(options.output.parent):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.output, model)
    print(f"wrote {options.output} after {time.monotonic() - start:.1f} s")
    print(f"{bytes_per_token(model, sample.held_out):.2f} bytes per token on held-out text")


def draw_sample(inputs: Sequence[Path], *, megabytes: float, seed: int) -> Sample:
    """About `megabytes` of whole texts from all files alike, chosen by a hash of seed, file name and line number.

    Raises ConfigError where a path is not there or holds no jsonl file, DataError where a row has no text.
    """
    files = _jsonl_files(inputs)
    share = megabytes * 1e6 / max(1, sum(file.stat().st_size for file in files))
    training: list[str] = []
    held_out: list[str] = []
    for file in files:
        with file.open("rb") as stream:  # bytes: only \n ends a line
            for number, line in enumerate(stream, start=1):
                digest = hashlib.sha256(f"{seed} {file.name} {number}".encode()).digest()
                if int.from_bytes(digest[:8]) < share * 2**64:
                    part = held_out if int.from_bytes(digest[8:16]) < HELD_OUT_SHARE * 2**64 else training
                    part.append(_text_of(line, where=f"{file}:{number}"))
    if not any(training):
        raise DataError(f"the sample of {megabytes:g} MB holds no text; raise --sample-megabytes or name more files")
    return Sample(training=training, held_out=held_out or training[-1:])


def train(texts: Sequence[str], *, vocab_size: int) -> bytes:
    """The trained model as SentencePiece writes it. Raises DataError where the texts don't carry `vocab_size`."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in _lines(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_digits=True,
            required_chars="0123456789",
            allow_whitespace_only_pieces=True,
            max_sentence_length=LONGEST_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"vocab_size ({vocab_size}) does not fit this sample; choose another --vocab-size (above 260 and the "
            f"sample's characters) or raise --sample-megabytes; SentencePiece says: {str(error).rpartition('] ')[2]}"
        ) from error
    return model.getvalue()


def bytes_per_token(model: bytes, texts: Sequence[str]) -> float:
    """UTF-8 bytes of the texts by their number of tokens."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return sum(len(text.encode()) for text in texts) / max(1, sum(len(processor.encode(text)) for text in texts))


def _jsonl_files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(path.glob("*.jsonl"))
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: there is no such file or folder; name jsonl files, or a folder of them")
    if not files:
        raise ConfigError(f"{', '.join(map(str, inputs))}: no .jsonl file in it; name jsonl files, or a folder of them")
    return files


def _text_of(line: bytes, *, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}; every line must be an object with a text") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: no text in this row; every line must be an object such as {{"text": "..."}}')
    return text


def _lines(text: str) -> Iterator[str]:
    """The lines of a text with their indentation; a line's end has no piece and becomes the byte token <0x0A>."""
    return (line for line in text.replace("\0", " ").split("\n") if line)


@contextmanager
def _heartbeat() -> Iterator[None]:
    """Says every few seconds that training goes on: the trainer itself is silent."""
    done = threading.Event()
    start = time.monotonic()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            print(f"training ... {time.monotonic() - start:.0f} s", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
