"""Small things to build from: a tokenizer trained in a moment, rows of words, and what a folder holds."""

import io
import json

import numpy as np
import sentencepiece

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def train_tokenizer(path, *, remove_extra_whitespaces=False):
    """A SentencePiece BPE model of 300 pieces with bytes, written to `path`; tokenizer.json knows no removing."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=remove_extra_whitespaces,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def texts(count, *, seed=0, median=8):
    """`count` texts of a few to some hundred words."""
    random = np.random.default_rng(seed)
    sizes = random.lognormal(np.log(median), 1.2, size=count).astype(int) + 1
    return [" ".join(random.choice(WORDS, size=size)) for size in sizes]


def write_rows(path, rows):
    """Rows as jsonl; one given as bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def content(folder):
    """{name: bytes} of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
