"""The tools that make the demo's corpus and tokenizer: what they take and refuse, and that they repeat themselves."""

import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron_xy.errors import ConfigError, DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import collect_corpus
import train_tokenizer

FULL = {"code": 20.0, "prose": 12.0}
SENTENCE = "The quick brown fox jumps over the lazy dog and goes home to sleep until the morning. "
DOCSTRINGS = [f"{head} {SENTENCE}".strip() for head in ("Module.", "Function f.", "Class C.")]


def write_installation(root):
    files = {
        "package/module.py": f'# a comment\n"""{DOCSTRINGS[0]}"""\n\ndef f(a,\n      b):\n    """{DOCSTRINGS[1]}"""\n'
        f"    return {{'key': '''no docstring, as it stands in a dict. {SENTENCE}'''}}\n\n\n"
        f"def g():\n    '''Tiny.'''\n\n\nclass C:\n    '''{DOCSTRINGS[2]}'''\n"
        f"\n    def again(self):\n        '''{DOCSTRINGS[0]}'''\n",
        "package/copy.py": SENTENCE * 2,
        "package/same_copy.py": SENTENCE * 2,
        "package/tiny.py": "x = 1\n",
        "package/giant.py": "# generated\n" * 100_000,
        "package/numbers.txt": "1.25 3.5 7.75 0.125 9.5 2.25\n" * 50,
        "package/README.md": "# Title\n\n" + SENTENCE,
        "package/CMakeLists.txt": SENTENCE * 3,
        "package/__pycache__/cached.py": SENTENCE * 4,
        "package-1.0.dist-info/METADATA": "Name: package\nVersion: 1.0\n\nDescription. " + SENTENCE,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "package" / "latin1.py").write_bytes(("# caf\xe9 " + SENTENCE).encode("latin-1"))
    return root


def rows_of(file):
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def test_the_corpus_holds_what_is_text_once_and_in_order(tmp_path):
    root = write_installation(tmp_path / "lib")
    summary = collect_corpus.collect({"lib": root}, output=tmp_path / "out", max_megabytes=FULL)
    code, prose = (rows_of(tmp_path / "out" / f"{source}.jsonl") for source in ("code", "prose"))

    code_paths = [row["path"] for row in code]
    assert code_paths in (
        ["lib/package/copy.py", "lib/package/module.py"],
        ["lib/package/module.py", "lib/package/same_copy.py"],
    )
    assert all(set(row) == {"text", "source", "path"} and row["source"] == "code" for row in code)
    assert [row["path"] for row in prose] == sorted(row["path"] for row in prose)
    texts = {row["path"]: row["text"] for row in prose}
    assert texts["lib/package-1.0.dist-info/METADATA"] == "Description. " + SENTENCE
    assert texts["lib/package/README.md"].startswith("# Title")
    assert any(path.startswith("stdlib/pydoc_data/topics/") for path in texts)
    docstrings = {path: text for path, text in texts.items() if path.startswith("lib/package/module.py/")}
    assert docstrings == {  # each a document of its own; number 2 is tiny, number 4 stands once already
        "lib/package/module.py/docstrings/0000": DOCSTRINGS[0],
        "lib/package/module.py/docstrings/0001": DOCSTRINGS[1],
        "lib/package/module.py/docstrings/0003": DOCSTRINGS[2],
    }
    taken_of_lib = {path.removeprefix("lib/") for path in texts if path.startswith("lib/")}
    assert taken_of_lib - {path.removeprefix("lib/") for path in docstrings} == {
        "package-1.0.dist-info/METADATA",
        "package/README.md",
    }
    assert summary["code"]["num_documents"] == len(code)


def test_the_same_installation_gives_the_same_bytes_wherever_it_lies(tmp_path):
    outputs = []
    for place in ("here", "there/deeper"):
        root = write_installation(tmp_path / place)
        collect_corpus.collect({"lib": root}, output=tmp_path / place / "out", max_megabytes=FULL)
        outputs.append([(tmp_path / place / "out" / f"{source}.jsonl").read_bytes() for source in FULL])
    assert outputs[0] == outputs[1]


def test_a_limit_takes_a_part_of_the_files_with_long_and_short_ones(tmp_path):
    root = tmp_path / "lib"
    root.mkdir()
    draw = random.Random(0)
    for number in range(300):
        (root / f"f{number:03}.py").write_text(f"# {number} " + SENTENCE * draw.choice([1, 2, 4, 8, 64]))
    limits = {"code": 0.1, "prose": 0.05}
    summary = collect_corpus.collect({"lib": root}, output=tmp_path / "out", max_megabytes=limits)
    rows = rows_of(tmp_path / "out" / "code.jsonl")
    size = sum(len(row["text"].encode()) for row in rows)
    assert 0.09e6 < size <= 0.1e6
    assert summary["code"]["megabytes"] == pytest.approx(size / 1e6)
    lengths = [len(row["text"]) for row in rows]
    assert min(lengths) < 100 and max(lengths) > 5000
    assert int(rows[-1]["path"][5:8]) > 200  # not the first files, a sample of all


def test_an_empty_installation_is_refused_and_nothing_is_written(tmp_path):
    (tmp_path / "lib").mkdir()
    with pytest.raises(DataError, match="found no code"):
        collect_corpus.collect({"lib": tmp_path / "lib"}, output=tmp_path / "out", max_megabytes=FULL)
    assert not (tmp_path / "out").exists()


def test_this_interpreter_has_a_standard_library():
    assert (collect_corpus.installation_roots()["stdlib"] / "json" / "decoder.py").is_file()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(300)]
    with (folder / "code.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(400):
            lines = [f"def {draw.choice(words)}({draw.choice(words)}):"]
            lines += ["    " * draw.randint(1, 3) + " ".join(draw.choices(words, k=6)) for _ in range(20)]
            stream.write(json.dumps({"text": "\n".join([*lines, f"value = {number}"])}) + "\n")
    return folder


def test_the_tokenizer_is_llama_like_and_loses_nothing(tmp_path, corpus, capsys):
    file = tmp_path / "new" / "tokenizer.model"
    arguments = ["--input", str(corpus), "--vocab-size", "600", "--sample-megabytes", "0.3"]
    assert train_tokenizer.main([*arguments, "--output", str(file)]) == 0
    assert "bytes per token on held-out text" in capsys.readouterr().out
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert tokenizer.vocab_size() == 600
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    for text in (
        "def f():\n        return  x\n\n\tend ",
        "  leading",
        "é 世界 \U0001f600",
        "\ufb01 \uff21 e\u0301",
        "a\r\nb",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = tokenizer.encode("def f():\n            abc", out_type=str)
    assert max(len(piece) for piece in pieces if not piece.strip("▁")) >= 4  # indentation has pieces of its own
    assert tokenizer.encode("2024", out_type=str)[-4:] == ["2", "0", "2", "4"]
    assert "<0x0A>" in tokenizer.encode("a\nb", out_type=str)

    again = tmp_path / "again.model"
    assert train_tokenizer.main([*arguments, "--output", str(again)]) == 0
    assert again.read_bytes() == file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["tokenizer.model"]


def test_the_sample_is_as_large_as_asked_and_goes_by_the_seed(corpus):
    total = sum(len(row["text"]) for row in rows_of(corpus / "code.jsonl")) / 1e6
    sample = train_tokenizer.draw_sample([corpus], megabytes=total / 2, seed=1)
    taken = sum(map(len, sample.training + sample.held_out)) / 1e6
    assert 0.35 * total < taken < 0.65 * total
    assert not set(sample.training) & set(sample.held_out)
    assert sample == train_tokenizer.draw_sample([corpus / "code.jsonl"], megabytes=total / 2, seed=1)
    assert sample != train_tokenizer.draw_sample([corpus], megabytes=total / 2, seed=2)


def test_what_cannot_be_trained_on_is_refused(tmp_path, corpus, capsys):
    output = tmp_path / "tokenizer.model"
    with pytest.raises(ConfigError, match="no such file"):
        train_tokenizer.draw_sample([tmp_path / "absent"], megabytes=1, seed=1)
    with pytest.raises(ConfigError, match=r"no \.jsonl file"):
        train_tokenizer.draw_sample([tmp_path], megabytes=1, seed=1)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no text"):
        train_tokenizer.draw_sample([bad], megabytes=1, seed=1)
    arguments = ["--input", str(corpus), "--output", str(output), "--vocab-size", "100000", "--sample-megabytes", "1"]
    assert train_tokenizer.main(arguments) == 65
    assert "vocab_size (100000) does not fit" in capsys.readouterr().err
    assert not output.exists()
