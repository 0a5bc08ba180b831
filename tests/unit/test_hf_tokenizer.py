"""The exported tokenizer: AutoTokenizer gives the ids of sentencepiece itself, and the text back."""

import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from megatron_xy.config import ModelConfig
from megatron_xy.errors import DataError
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.tokenizer import check_tokenizers, write_hf_tokenizer
from tests.building import build_dataset
from tests.unit.small_corpus import train_tokenizer, write_rows
from tools.train_tokenizer import train

WORDS = [
    "def encode(self, text):",
    "    return [piece for piece in text]",
    "the interest rate 3.75% in 2024",
    "利率上升",
    "银行",
]
MODEL = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=400)
TEXTS = [
    "",
    " ",
    "   ",
    "text",
    " leading",
    "trailing ",
    "  two  inside  ",
    "line\nline\r\n\n\nline",
    "\ttab\t\t",
    "2024 0123456789",
    "利率上升3.75%、银行",
    "狐狸 🦊 👨‍👩‍👧",
    "é e\u0301 ﬁ Ω",
    "\u2581",
    "a\0b",
    "<0x41>",
    "def encode(self, text):\n    return [piece for piece in text]\n",
]
MARKED = ["<s>", "</s>", "<unk>", "a<s>b", " <s> ", "x</s>\n<unk>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "trained.model").write_bytes(
        train([f"{word} {other}" for word in WORDS for other in WORDS], vocab_size=400)
    )
    exported = folder / "exported"
    exported.mkdir()
    write_hf_tokenizer(folder / "trained.model", exported, model_max_length=2048)
    values = hf_config(MODEL, dtype="float32", token_ids={"bos_token_id": 1})
    (exported / "config.json").write_text(json.dumps(values))
    return exported


@pytest.fixture(scope="module")
def plain(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def exported(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_are_sentencepiece_s_after_bos_and_the_text_comes_back(exported, plain, text):
    ids = exported(text).input_ids
    assert ids == [1, *plain.encode(text)]
    assert exported(text, add_special_tokens=False).input_ids == plain.encode(text)
    assert exported.decode(ids, skip_special_tokens=True) == plain.decode(plain.encode(text))


@pytest.mark.parametrize("text", MARKED)
def test_control_pieces_in_a_text_stay_text_where_special_tokens_are_split(exported, plain, text):
    ids = exported(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == plain.encode(text) and not {0, 1, 2} & set(ids)


def test_without_the_split_they_are_ids_as_everywhere_in_transformers(exported):
    assert exported("</s>", add_special_tokens=False).input_ids == [2]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    text=st.one_of(
        st.text(alphabet="abe nrt\n0"), st.lists(st.sampled_from([*"s<>/ 利🦊", *WORDS])).map("".join), st.text()
    )
)
def test_any_text_has_the_same_ids_and_decodes_alike(exported, plain, text):
    ids = plain.encode(text)
    assert exported(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    assert exported.decode(ids) == plain.decode(ids)


def test_the_settings_load_in_both_versions_of_transformers(folder, exported):
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert list(exported("text")) == ["input_ids", "attention_mask"]
    assert (exported.bos_token_id, exported.eos_token_id, exported.unk_token_id) == (1, 2, 0)
    assert exported.pad_token is None and exported.model_max_length == 2048
    assert exported("one", "two").input_ids.count(1) == 2


def changed(folder, target, change):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def unigram(model):
    model.trainer_spec.model_type = 1


def no_byte_fallback(model):
    model.trainer_spec.byte_fallback = False


def user_defined(model):
    model.pieces[-1].type = 4


def squeezed(model):
    model.normalizer_spec.remove_extra_whitespaces = True


def character_missing(model):
    model.pieces[-1].piece = "zé"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (unigram, "not a BPE model"),
        (no_byte_fallback, "no byte fallback"),
        (user_defined, "user-defined pieces"),
        (squeezed, "removes extra whitespace"),
        (character_missing, "characters that are no pieces"),
    ],
)
def test_a_model_that_bpe_cannot_reproduce_is_refused(folder, tmp_path, change, text):
    model = changed(folder, tmp_path / "changed.model", change)
    with pytest.raises(DataError, match=text):
        write_hf_tokenizer(model, tmp_path, model_max_length=16)


def test_data_must_be_built_with_the_tokenizer_that_lies_with_the_model(folder, tmp_path):
    def built(name, tokenizer):
        corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": word} for word in WORDS])
        build_dataset([corpus], tokenizer=tokenizer, output=tmp_path / name, buckets=[128])
        return tmp_path / name

    said = []
    own = built("own", folder / "tokenizer.model")
    check_tokenizers(own, folder, say=said.append)
    (tmp_path / "json").mkdir()
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "json" / "tokenizer.json")
    check_tokenizers(own, tmp_path / "json", say=said.append)
    assert not said
    foreign = built("foreign", train_tokenizer(tmp_path / "other.model"))
    for model in (folder, tmp_path / "json"):
        with pytest.raises(DataError, match=r"foreign was built with another tokenizer than .*: token .* is '"):
            check_tokenizers(foreign, model, say=said.append)
    assert not said
    check_tokenizers(own, tmp_path, say=said.append)
    assert "is not known: " in said.pop() and not said
