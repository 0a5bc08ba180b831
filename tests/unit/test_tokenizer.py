"""Tokenizers: exact against the library they belong to, text never becomes a control id, fastokens only where exact."""

import hashlib
import io
import json
import random
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data.encoding.engines import TokenBatch
from megatron_xy.data.encoding.fast_engine import (
    CHECKED_SHARE,
    FastTokenizer,
    awkward_texts,
    chosen_texts,
    disagreement,
    unsuitable,
)
from megatron_xy.data.encoding.sentencepiece_json import inexact_reasons, parse_model, tokenizer_json
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import ConfigError, DataError
from tests.building import each_text

ASCII = " ".join(chr(code) for code in range(33, 127))  # a model of the world has pieces for all of them
LINES = ["the quick brown fox jumps over the lazy dog", "<s> and </s> are text", "aaaa    ----  ere there"] * 20
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


def trained(path, *, lines=(*LINES, ASCII), **options):
    """A SentencePiece model, written to `path`."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "character_coverage": 1.0,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings, **options}
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    trained(folder / "tokenizer.model")
    return folder


def test_properties_and_both_ways_to_name_it(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (400, 1, 2, None)
    assert tokenizer.sha256 == hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    assert tokenizer.file_name == "tokenizer.model"
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
    for text, ids in zip(TEXTS, each_text(tokenizer.encode_flat(TEXTS)), strict=True):
        assert not {0, 1, 2} & set(ids.tolist()), text
        assert tokenizer.decode(ids) == text
        assert ids.tolist() == tokenizer.encode(text).tolist()
    assert each_text(tokenizer.encode_flat([])) == []


@settings(deadline=None, derandomize=True, max_examples=100)
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_ids_are_sentencepiece_s_and_decode_to_the_text(folder, texts):
    tokenizer = load_tokenizer(folder)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = [ids.tolist() for ids in each_text(tokenizer.encode_flat(texts))]
    assert encoded == [plain.encode(text, out_type=int) for text in texts]
    # "▁" is SentencePiece's own mark for a blank: the one character that a model cannot give back.
    assert [tokenizer.decode(ids) for ids in encoded] == [text.replace("▁", " ") for text in texts]


def test_refusals_name_the_file_and_the_reason(folder, tmp_path):
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_bytes(b"\xff garbage")
    for name in ("empty.model", "empty.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.model and no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "none.model")
    for name in ("bad.model", "empty.model", "bad.json", "empty.json"):
        with pytest.raises(DataError, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match=r"outside 0\.\.400"):
        load_tokenizer(folder).decode([5, 400])


@pytest.mark.parametrize("depth", [200, 100_000])
def test_a_model_of_endless_nesting_is_refused_before_python_parses_it(folder, tmp_path, depth):
    start_of_group = b"\xfb\x3e"  # of an unknown field: what CVE-2025-4565 has pure-Python protobuf recurse over
    nested = (folder / "tokenizer.model").read_bytes() + depth * start_of_group
    (tmp_path / "nested.model").write_bytes(nested)
    with pytest.raises(DataError, match=r"nested\.model"):
        load_tokenizer(tmp_path / "nested.model")


def test_an_engine_that_lets_text_become_control_ids_is_caught(folder):
    tokenizer = load_tokenizer(folder)
    for ids, reason in (([5, 1, 7], "control id"), ([5, 400], "in the vocabulary")):
        with pytest.raises(AssertionError, match=reason):
            tokenizer.checked(TokenBatch(np.array(ids, dtype=np.int32), np.array([len(ids)])))


def json_contents(**changes):
    """A byte-level BPE tokenizer.json with special and ordinary added tokens, and settings that would cut texts."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    made.train_from_iterator(LINES, trainer)
    made.add_tokens(["<think>"])
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return {**json.loads(made.to_str()), **changes}


def write_json_tokenizer(folder, contents, config=None):
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_json_gives_whole_texts_without_control_ids(tmp_path):
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": None}
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path, json_contents(), config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.file_name == "tokenizer.json"
    assert tokenizer.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    texts = ["<|begin|>", "a<|end|>b", "the quick brown fox jumps over the lazy dog " * 9, "", "<think>", *TEXTS]
    encoded = each_text(tokenizer.encode_flat(texts))
    for text, ids in zip(texts, encoded, strict=True):
        assert not {0, 1} & set(ids.tolist())
        assert tokenizer.decode(ids) == text
    # An added token that is not special is a word of the vocabulary; its id is the last one.
    assert encoded[4].tolist() == [tokenizer.vocab_size - 1]
    assert tokenizer.decode([0, *encoded[2], 1]) == texts[2]
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(texts[2]).tolist() == encoded[2].tolist()


def test_without_its_config_a_tokenizer_json_has_no_control_tokens_to_add(tmp_path):
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path, json_contents()))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, None)
    assert not {0, 1} & set(tokenizer.encode("<|begin|>").tolist())


def test_a_tokenizer_json_is_refused_where_texts_could_forge_control_ids_or_change(tmp_path, monkeypatch):
    contents = json_contents()
    forging = json.loads(json.dumps(contents))
    word = next(token for token, index in forging["model"]["vocab"].items() if index > 256 and len(token) > 1)
    added = {**forging["added_tokens"][0], "content": word, "id": forging["model"]["vocab"][word]}
    forging["added_tokens"].append(added)
    forging["added_tokens"].sort(key=lambda token: token["id"])
    with pytest.raises(DataError, match="becomes control id"):
        load_tokenizer(write_json_tokenizer(tmp_path, forging))
    dropping = {**contents, "model": {**contents["model"], "dropout": 0.1}}
    with pytest.raises(DataError, match="dropout"):
        load_tokenizer(write_json_tokenizer(tmp_path, dropping))
    with pytest.raises(DataError, match=r"tokenizer_config\.json names the token '<eot>'"):
        load_tokenizer(write_json_tokenizer(tmp_path, contents, {"eos_token": "<eot>"}))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="no JSON object"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-xy\[hf\]'"):
        load_tokenizer(tmp_path)


# Fast: our conversion, and fastokens on it.


def awkward(folder):
    model = parse_model((folder / "tokenizer.model").read_bytes())
    return awkward_texts([piece.piece for piece in model.pieces], [p.piece for p in model.pieces if p.type == 1])


def test_the_conversion_is_exact_by_the_tokenizers_library_too(folder):
    tokenizers = pytest.importorskip("tokenizers")
    contents = tokenizer_json(parse_model((folder / "tokenizer.model").read_bytes()))
    converted = tokenizers.Tokenizer.from_str(json.dumps(contents))
    texts = [*TEXTS, *random.Random(1).sample(awkward(folder), 2000)]
    expected = each_text(load_tokenizer(folder).encode_flat(texts))
    assert [encoding.ids for encoding in converted.encode_batch(texts)] == [ids.tolist() for ids in expected]
    assert contents["added_tokens"] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 365}, "not a BPE model"),
        ({"byte_fallback": False, "vocab_size": 130}, "no byte fallback"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined pieces"),
        ({"normalization_rule_name": "nfkc"}, "character map"),
        ({"remove_extra_whitespaces": True}, "extra whitespace"),
        ({"treat_whitespace_as_suffix": True}, "whitespace as a suffix"),
        ({"control_symbols": ["§"]}, "control pieces of a single character"),
    ],
)
def test_models_that_no_tokenizer_json_reproduces_are_left_to_sentencepiece(tmp_path, options, reason):
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer(trained(tmp_path / "some.model", **options))
    assert any(reason in why for why in inexact_reasons(parse_model(tokenizer.engine.serialized)))
    assert reason in unsuitable(tokenizer)


def test_a_piece_with_a_blank_is_none_that_a_merge_can_name(folder):
    model = parse_model((folder / "tokenizer.model").read_bytes())
    assert inexact_reasons(model) == []
    next(piece for piece in reversed(model.pieces) if len(piece.piece) == 1).piece = " "
    assert "it has pieces with blanks" in inexact_reasons(model)


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}])
def test_the_gate_lets_an_exact_model_through(tmp_path, options):
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer(trained(tmp_path / "some.model", **options))
    assert unsuitable(tokenizer) is None
    fast = FastTokenizer(tokenizer)
    assert disagreement(fast, [LINES, TEXTS]) is None
    assert fast.name.startswith("fastokens ") and len(fast.conversion_sha256) == 64


@settings(deadline=None, derandomize=True, max_examples=100)
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_fastokens_gives_sentencepiece_s_ids(folder, texts):
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer(folder)
    batch = FastTokenizer(tokenizer).encode_flat(texts)
    expected = tokenizer.encode_flat(texts)
    assert batch.lengths.tolist() == expected.lengths.tolist()
    assert batch.ids.tolist() == expected.ids.tolist()


def test_the_gate_stops_a_model_that_fastokens_reads_otherwise(tmp_path):
    """Equal scores: sentencepiece joins what is leftmost, a list of merges what is first in it."""
    pytest.importorskip("fastokens")
    model = parse_model(trained(tmp_path / "distinct.model").read_bytes())
    for piece in model.pieces:
        piece.score = -1.0 if piece.type == 1 else piece.score
    (tmp_path / "tied.model").write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(tmp_path / "tied.model")
    assert unsuitable(tokenizer) is None
    reason = disagreement(FastTokenizer(tokenizer), [])
    assert reason is not None and "differs from sentencepiece" in reason and "on a text awkward" in reason


def test_the_corpus_s_own_texts_are_compared_too(folder):
    pytest.importorskip("fastokens")
    asked = []

    def batches():
        for batch in (["the fox"], ["a dog", "over"]):
            asked.append(batch)
            yield batch

    assert disagreement(FastTokenizer(load_tokenizer(folder)), batches()) is None
    assert asked == [["the fox"], ["a dog", "over"]]


def test_names_of_control_pieces_are_never_found_in_a_text_by_fastokens(tmp_path):
    """fastokens finds by its name a piece whose characters are no pieces, such as "<" in this model."""
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer(trained(tmp_path / "few.model", lines=LINES[:1] * 20, vocab_size=300))
    assert "no pieces for the characters" in unsuitable(tokenizer)
    texts = ["<s>", "a</s>b", "the <unk>", " <s>"]
    batch = FastTokenizer(tokenizer).encode_flat(texts)
    assert batch.ids.tolist() == tokenizer.encode_flat(texts).ids.tolist()


def test_what_a_model_says_beyond_the_vocabulary_is_no_text(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the fox").tolist()
    assert tokenizer.decode_answer([tokenizer.vocab_size + 3, *ids, tokenizer.vocab_size]) == tokenizer.decode(ids)
    with pytest.raises(DataError, match="are outside"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_model_without_its_token_for_unknown_words_is_told_at_the_first(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"fox": 0}, unk_token="[UNK]"))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("fox").tolist() == [0]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_parts([(text, False)])):
        with pytest.raises(DataError, match=r"cannot encode every text: .*its model needs an unk_token"):
            encode("dog")


def test_fastokens_is_not_needed(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert "not installed (pip install 'megatron-xy[fast]')" in unsuitable(load_tokenizer(folder))
    write_json_tokenizer(tmp_path, json_contents())
    assert "SentencePiece models only" in unsuitable(load_tokenizer(tmp_path / "tokenizer.json"))


def test_a_difference_is_found_in_the_text_that_has_it_and_only_where_it_is_looked_for(folder):
    pytest.importorskip("fastokens")
    fast = FastTokenizer(load_tokenizer(folder))
    texts = ["the fox", "", "a dog", "over"]
    good = fast.encode_flat(texts)
    everything = range(len(texts))
    assert fast.first_difference(texts, good, everything) is None
    assert fast.first_difference([], fast.encode_flat([]), []) is None
    ends = np.cumsum(good.lengths)
    changed = good.ids.copy()
    changed[ends[2] - 1] += 1
    wrong = TokenBatch(changed, good.lengths)
    assert fast.first_difference(texts, wrong, everything) == 2
    assert fast.first_difference(texts, wrong, [0, 1, 3]) is None
    moved = TokenBatch(good.ids, good.lengths + np.array([0, 0, 1, -1]))
    assert fast.first_difference(texts, moved, [1, 2]) == 2


def test_one_text_in_a_hundred_is_compared_always_the_same_ones():
    texts = [f"text {number}" for number in range(20_000)]
    chosen = chosen_texts(texts)
    assert len(chosen) == pytest.approx(len(texts) / CHECKED_SHARE, rel=0.3)
    assert [texts[index] for index in chosen] == [text for text in texts if chosen_texts([text])]
