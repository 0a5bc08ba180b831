"""`vocab extend`: an HF folder with a larger vocabulary is the old model on old text, and opens in transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_xy.config import ModelConfig
from megatron_xy.errors import ConfigError, DataError, UsageError
from megatron_xy.hf.config import hf_config
from megatron_xy.hf.extend import extend
from megatron_xy.hf.names import global_names, hf_shards
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.hf.verify import transformers_logits
from tools.train_tokenizer import train

WORDS = ["def encode(self, text):", "the interest rate 3.75%", "利率上升", "银行"]
VOCAB_SIZE, SIZE = 330, 341
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, vocab_size=VOCAB_SIZE
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def hf_folder(folder: Path, *, tied: bool = False, sharded: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    model = MODEL.model_copy(update={"untie_embeddings_and_output_weights": not tied})
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (torch.randn(shard.local_shape, generator=generator) * 0.15).to(dtype)
        for global_name in global_names(model)
        for name, shard in hf_shards(global_name, model).items()
    }
    if sharded:
        parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
        for name, tensor in tensors.items():
            parts[f"model-0000{1 + ('layers.1' in name or name == HEAD)}-of-00002.safetensors"][name] = tensor
        for file, held in parts.items():
            save_file(held, folder / file, metadata={"format": "pt"})
        weight_map = {name: file for file, held in parts.items() for name in held}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = {**hf_config(model, dtype=str(dtype).removeprefix("torch."), token_ids=ids), "note": "kept"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"top_p": 0.9}')
    trained = folder / "trained.model"
    trained.write_bytes(train([f"{word} {other}" for word in WORDS for other in WORDS], vocab_size=VOCAB_SIZE))
    write_hf_tokenizer(trained, folder, model_max_length=2048)
    trained.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": TEMPLATE, "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def characters(folder: Path, text: str = "贷款利息金融机构合同账户") -> str:
    file = folder / "characters.txt"
    file.write_text(text, encoding="utf-8")
    return str(file)


def extended(source: Path, target: Path, **options: Any) -> list[str]:
    said: list[str] = []
    given: dict[str, Any] = {"characters": None, "pieces": None, "size": SIZE, "corpus": None, **options}
    extend(f"hf:{source}", f"hf:{target}", **given, say=said.append)
    return said


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_old_rows_stay_and_new_ones_are_means(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    source = hf_folder(tmp_path / "old", tied=tied, sharded=dtype == torch.bfloat16, dtype=dtype)
    extended(source, tmp_path / "new", characters=characters(tmp_path))
    before, after = weights(source), weights(tmp_path / "new")
    assert before.keys() == after.keys() and (HEAD in after) == (not tied)
    old = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    new = sentencepiece.SentencePieceProcessor(str(tmp_path / "new" / "tokenizer.model"))
    for name, tensor in before.items():
        rows = after[name][: len(tensor)] if name in (EMBEDDING, HEAD) else after[name]
        assert torch.equal(rows, tensor) and after[name].dtype == dtype, name
    for name in {EMBEDDING, HEAD} & set(after):
        assert after[name].shape == (SIZE, 32)
        for index in range(VOCAB_SIZE, SIZE):
            spelt = [old.piece_to_id(f"<0x{byte:02X}>") for byte in new.id_to_piece(index).encode()]
            assert torch.equal(after[name][index], before[name][spelt].float().mean(0).to(dtype))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "vocab_size": SIZE}
    assert (tmp_path / "new" / "generation_config.json").read_text() == '{"top_p": 0.9}'


def test_the_command_gives_a_folder_that_is_the_old_model_on_old_text(tmp_path: Path) -> None:
    source, target = hf_folder(tmp_path / "old"), tmp_path / "new"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "贷款利率和金融机构"}) + "\n" + json.dumps({"text": "the rate"}) + "\n")
    command = [sys.executable, "-m", "megatron_xy", "vocab", "extend", "--from", f"hf:{source}", "--to", f"hf:{target}"]
    command += ["--size", str(SIZE), "--characters", characters(tmp_path), "--corpus", str(corpus)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert f"{VOCAB_SIZE} -> {SIZE} pieces" in answer.stderr and "Chinese documents: " in answer.stderr

    theirs, ours = (
        AutoTokenizer.from_pretrained(target),
        sentencepiece.SentencePieceProcessor(str(target / "tokenizer.model")),
    )
    assert len(theirs) == SIZE and theirs.pad_token == "</s>" and theirs.chat_template == TEMPLATE
    for text in ("贷款利率上升", "the interest 利息 rate", "狐狸 🦊"):
        assert theirs(text).input_ids == [1, *ours.encode(text)]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text

    rows = [ours.encode(text, add_bos=True) for text in ("the interest rate 3.75%", "利率上升 银行")]
    assert max(map(max, rows)) < VOCAB_SIZE
    for old, new in zip(transformers_logits(source, rows), transformers_logits(target, rows), strict=True):
        assert new.shape[1] == SIZE
        assert (new[:, :VOCAB_SIZE] - old).abs().max() < 1e-5


def test_what_cannot_be_extended_is_refused(tmp_path: Path) -> None:
    source, listed = hf_folder(tmp_path / "old"), characters(tmp_path)

    def refused(kind: type[Exception], text: str, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            extended(source, tmp_path / "new", **{"characters": listed, **options})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["characters.txt", "old"]

    refused(UsageError, "name what to add", characters=None)
    refused(ConfigError, r"--size \(900\): only \d+ new pieces were found for 570 places", size=900)
    refused(ConfigError, r"--size \(329\) must not be below the model's vocab_size \(330\)", size=329)
    settings = source / "tokenizer_config.json"
    original = settings.read_text()
    decoder = {"added_tokens_decoder": {"330": {"content": "[PAD]"}}}
    settings.write_text(json.dumps({**json.loads(original), **decoder}))
    refused(DataError, r"the added token \[PAD\] \(330\) lies behind the 330 pieces of tokenizer.model")
    settings.write_text(original)
    (source / "tokenizer.model").unlink()
    refused(DataError, "holds no tokenizer.model")
