"""The tokenizer: exact against sentencepiece itself, and text never becomes a control id."""

import hashlib
import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data.tokenizer import load_tokenizer
from megatron_xy.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "<s> and </s> are text"] * 20),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def test_properties_and_both_ways_to_name_it(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (330, 1, 2, None)
    assert tokenizer.sha256 == hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    assert load_tokenizer(folder / "tokenizer.model").encode("the fox").tolist() == tokenizer.encode("the fox").tolist()


TEXTS = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    " <s>",
    "a<s>b</s>",
    "<0x41>",
    "\0",
    "a\0b",
    "",
    " ",
    "\n\n",
    "狐狸 🦊",
    "\ufeff",
]


def test_control_looking_text_stays_text_and_comes_back(folder):
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert not {0, 1, 2} & set(ids.tolist()), text
        assert tokenizer.decode(ids) == text
        assert ids.tolist() == tokenizer.encode(text).tolist()


@settings(deadline=None, derandomize=True, max_examples=100)
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=5))
def test_ids_are_sentencepiece_s_and_decode_to_the_text(folder, texts):
    tokenizer = load_tokenizer(folder)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert encoded == [plain.encode(text, out_type=int) for text in texts]
    # "▁" is SentencePiece's own mark for a blank: the one character that a model cannot give back.
    assert [tokenizer.decode(ids) for ids in encoded] == [text.replace("▁", " ") for text in texts]


def test_refusals_name_the_file_and_what_is_supported(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "bad.model").write_bytes(b"\xff garbage")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not supported yet, only SentencePiece"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "none.model")
    for name in ("bad.model", "empty.model"):
        with pytest.raises(DataError, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match=r"outside 0\.\.330"):
        load_tokenizer(folder).decode([5, 330])
