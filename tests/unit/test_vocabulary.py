"""A vocabulary with more pieces: old ids and encodings stay, new pieces are found, and tokenizer.json agrees."""

import json
import tracemalloc

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_xy.data.encoding import vocabulary
from megatron_xy.data.encoding.sentencepiece_json import SPACE, parse_model, tokenizer_json
from megatron_xy.errors import ConfigError, DataError
from tools.train_tokenizer import train

WORDS = ["def encode(self, text):", "the interest rate 3.75%", "利率上升", "  银行  ", "    return 1"]
NEW = [*"贷款利息金融龘", "贷款", "利息", "贷款利息", "金融"]
ALPHABET = "".join(WORDS) + "".join(NEW) + "🦊é\n"


@pytest.fixture(scope="module")
def model():
    return parse_model(train([f"{word} {other}" for word in WORDS for other in WORDS], vocab_size=360))


@pytest.fixture(scope="module")
def extended(model):
    chosen, impossible = vocabulary.choose_pieces(model, NEW, size=370)
    assert impossible == []
    return vocabulary.extended_model(model, chosen)


def processor(serialized):
    return sentencepiece.SentencePieceProcessor(model_proto=serialized)


def test_new_pieces_stand_behind_the_old_ones_and_are_found(model, extended):
    old, new = model.pieces, parse_model(extended).pieces
    assert [(piece.piece, piece.score, piece.type) for piece in new[: len(old)]] == [
        (piece.piece, piece.score, piece.type) for piece in old
    ]
    added = [piece.piece for piece in new[len(old) :]]
    assert added == [piece for piece in NEW if piece != "利"]  # which is there already
    encoder = processor(extended)
    # Behind a byte: what no piece joins from the left.
    assert all(encoder.encode(f"\n{piece}")[2:] == [encoder.piece_to_id(piece)] for piece in added)
    assert not any(encoder.is_byte(index) for index in encoder.encode("贷款利息金融龘"))
    assert parse_model(extended).trainer_spec.vocab_size == encoder.get_piece_size() == 370


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(st.sampled_from(list(ALPHABET)), max_size=30).map("".join))
def test_text_stays_the_same_and_tokenizer_json_agrees(model, extended, text):
    old, new = processor(model.SerializeToString()), processor(extended)
    if not set(text) & set("".join(NEW)):
        assert new.encode(text) == old.encode(text)
    assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    fast = Tokenizer.from_str(json.dumps(tokenizer_json(parse_model(extended))))
    assert fast.encode(text, add_special_tokens=False).ids == new.encode(text)


def test_a_piece_is_spelt_by_the_old_pieces_of_each_of_its_characters(model):
    index = {piece.piece: number for number, piece in enumerate(model.pieces)}
    of_bytes = {character: [index[f"<0x{byte:02X}>"] for byte in character.encode()] for character in "贷款"}
    assert vocabulary.spellings(model, ["贷", "利", "利贷款", f"{SPACE}贷"]) == [
        of_bytes["贷"],
        [index["利"]],
        [index["利"], *of_bytes["贷"], *of_bytes["款"]],
        [index[SPACE], *of_bytes["贷"]],
    ]


def test_pieces_come_with_what_they_are_built_of_up_to_the_size(model):
    assert vocabulary.choose_pieces(model, ["贷款", "款项", "金"], size=363) == (["贷", "款", "贷款"], [])
    assert vocabulary.choose_pieces(model, ["贷款", "金", "融"], size=362) == (["金", "融"], [])
    assert vocabulary.choose_pieces(model, ["贷款项目", "贷", "利"], size=361) == (["贷"], ["贷款项目"])
    with pytest.raises(ConfigError, match=r"--size \(365\): only 2 new pieces were found for 5 places.*--size 362"):
        vocabulary.choose_pieces(model, ["贷", "款", "贷", "利"], size=365)
    with pytest.raises(ConfigError, match=r"--size \(360\): the tokenizer has 360 pieces already"):
        vocabulary.choose_pieces(model, ["贷"], size=360)


def test_lists_are_read_in_their_order(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("\ufeff贷款 利\n息贷\r\n", encoding="utf-8")
    assert vocabulary.listed_characters(file) == list("贷款利息")
    assert vocabulary.listed_pieces(file) == [f"贷款{SPACE}利", "息贷"]
    with pytest.raises(ConfigError, match="there is no such file"):
        vocabulary.listed_pieces(tmp_path / "none.txt")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        vocabulary.listed_characters(file)


def test_the_corpus_that_pieces_are_learned_from_is_never_held(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    row = json.dumps({"text": "金融机构的贷款利率," * 1000}, ensure_ascii=False) + "\n"
    corpus.write_text(row * 50, encoding="utf-8")

    def train(*, sentence_iterator, **_):
        assert sum(map(len, sentence_iterator)) == 9 * 50_000
        raise KeyboardInterrupt

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    tracemalloc.start()
    with pytest.raises(KeyboardInterrupt):
        vocabulary.frequent_pieces(str(corpus), number=4, say=print)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_corpus_gives_its_most_frequent_characters_and_pieces(tmp_path, model):
    corpus = tmp_path / "corpus.jsonl"
    texts = ["金融机构的贷款利率与金融机构", "贷款利率 abc", "the 贷款利率 rate", "plain English"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert vocabulary.frequent_characters(str(corpus), say=print)[:4] == list("利款率贷")
    pieces = vocabulary.frequent_pieces(str(corpus), number=4, say=print)
    assert {"贷款", "利率", "贷款利率"} <= set(pieces) and not any(len(piece) == 1 for piece in pieces)
    chosen, _ = vocabulary.choose_pieces(model, pieces, size=364)
    extended = vocabulary.extended_model(model, chosen)
    tallies = vocabulary.compare(model.SerializeToString(), extended, str(corpus), say=print)
    every, chinese = tallies["all documents"], tallies["Chinese documents"]
    assert every.characters == sum(map(len, texts)) and chinese.characters == sum(map(len, texts[:2])) + len(texts[2])
    count = processor(extended)
    assert every.after == sum(len(count.encode(text)) for text in texts) < every.before
    assert str(every).startswith(f"{every.before:,} -> {every.after:,} tokens (0.")
