"""Conversations through `data build`: what is learned on disk, in samples and in micro-batches; bad rows; overflow."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_xy.cli import app
from megatron_xy.config import DataConfig, RunConfig, TrainingConfig
from megatron_xy.data import run_data
from megatron_xy.data.building import build_folder, pack_shards, tokenize
from megatron_xy.data.building.options import Share
from megatron_xy.data.chat.conversations import BadConversation, parse_conversation
from megatron_xy.data.chat.encode import Chat
from megatron_xy.data.chat.template import load_chat_template
from megatron_xy.data.dataset import NO_LABEL, PackedDataset, collate
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.data.inspection.examine import verify_dataset
from megatron_xy.data.inspection.show import shown_samples
from megatron_xy.data.manifest import read_manifest
from megatron_xy.data.origins import read_mask
from megatron_xy.data.run_data import data_folders
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from tests.building import build_dataset
from tests.unit.small_corpus import content, texts, train_tokenizer, write_rows

BUCKETS = [64, 256]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def rows(count, *, seed=0):
    """Conversations in the three forms, in two sources, with texts as a third."""
    words = (" ".join(text.split()[:10]) for text in texts(4 * count, seed=seed, median=4))
    made = []
    for number in range(count):
        ask, answer, more, last = (next(words) for _ in range(4))
        source = {"source": ("general", "finance")[number % 5 == 0]}
        if number % 3 == 0:
            turns = [("user", ask), ("assistant", answer), ("user", more), ("assistant", last)]
            made.append({"messages": [{"role": role, "content": text} for role, text in turns], **source})
        elif number % 3 == 1:
            turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
            made.append({"conversations": turns, "system": "a fox.\n", **source})
        else:
            made.append({"instruction": ask, "input": more if number % 2 else "", "output": answer, **source})
        if number % 4 == 0:
            made.append({"text": next(iter(texts(1, seed=number))), "source": "plain"})
    return made


def built(folder, given, tokenizer, **options):
    write_rows(folder / "corpus.jsonl", given)
    settings = {"buckets": BUCKETS, "source_field": "source", "chat_template": "xuanyuan", "append_eod": True}
    build_dataset([folder / "corpus.jsonl"], tokenizer=tokenizer, output=folder / "data", **{**settings, **options})
    return folder / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return built(tmp_path_factory.mktemp("chat"), rows(200), tokenizer, held_out=0.1)


def all_samples(dataset):
    for stream in dataset.streams:
        for index in range(stream.num_samples):
            yield stream, index, dataset.sample(SampleId(stream.source, stream.bucket, index))


def test_every_conversation_lies_in_the_samples_with_its_mask(folder, tokenizer):
    loaded = load_tokenizer(tokenizer)
    chat = Chat(loaded, load_chat_template("xuanyuan", loaded))
    given = dict(enumerate(rows(200), start=1))
    dataset, seen = PackedDataset([folder]), {}
    assert dataset.sources == ["finance", "general", "plain"]
    assert dataset.conversation_sources == ["finance", "general"]
    assert dataset.chat_template == chat.template.source
    for stream, index, sample in all_samples(dataset):
        places = dataset.documents(SampleId(stream.source, stream.bucket, index))
        start = 0
        for place in places:
            part = slice(start, start + place["length"])
            start += place["length"]
            row = given[place["line"]]
            seen[place["line"]] = stream.source
            if stream.source == "plain":
                assert sample.learned is None
                whole = [*loaded.encode(row["text"]).tolist(), loaded.eos_id]
                assert sample.tokens[part].tolist() == whole[place["start"] :][: place["length"]]
                continue
            expected = chat.conversation(parse_conversation(row).messages)
            assert sample.tokens[part].tolist() == expected.ids.tolist()
            assert sample.learned[part].tolist() == expected.learned.tolist()
            assert sample.tokens[part][-1] == loaded.eos_id and sample.learned[part][-1]
    held_out = read_manifest(folder / "held_out")
    assert len(seen) + held_out.statistics.documents == len(given)
    assert {line: given[line]["source"] for line in seen} == seen
    verify_dataset(folder)
    verify_dataset(folder / "held_out")


def test_the_manifest_and_stats_say_how_much_is_learned(folder):
    manifest = read_manifest(folder)
    assert (manifest.chat.name, manifest.chat.overflow, manifest.chat.last_turn_only) == ("xuanyuan", "refuse", False)
    learned = {}
    for name, source in manifest.sources.items():
        shards = [shard for bucket in source.buckets.values() for shard in bucket.shards]
        assert all((shard.mask is None) == (name == "plain") for shard in shards)
        learned[name] = sum(
            int(read_mask(folder / shard.name, num_tokens=shard.tokens).sum()) for shard in shards if shard.mask
        )
    assert {name: source.tokens_learned for name, source in manifest.sources.items()} == {**learned, "plain": None}
    assert 0.2 < learned["general"] / manifest.sources["general"].tokens < 0.8
    answer = json.loads(CliRunner().invoke(app, ["data", "stats", str(folder), "--json"]).stdout)
    assert answer["sources"]["general"]["tokens_learned"] == learned["general"]
    assert answer["sources"]["plain"]["tokens_learned"] == manifest.sources["plain"].tokens


def test_a_micro_batch_has_labels_for_what_is_learned_alone(folder):
    dataset = PackedDataset([folder])
    samples = [sample for stream, _, sample in all_samples(dataset) if stream.bucket == 64 and stream.source != "plain"]
    for split in (True, False):
        batch = collate(
            samples[:4],
            source_indices=[0, 1, 0, 1],
            bucket=64,
            micro_batch_tokens=256,
            split_documents=split,
        )
        for number, sample in enumerate(samples[:4]):
            row = slice(64 * number, 64 * number + len(sample.tokens))
            labels, mask = batch.labels[row], batch.loss_mask[row]
            ends = np.cumsum(sample.piece_lengths)
            starts = np.concatenate([[0], ends[:-1]])
            wanted = sample.learned.copy()
            wanted[starts] = False
            assert mask[:-1].tolist() == wanted[1:].astype(float).tolist() and mask[-1] == 0
            assert labels[mask > 0].tolist() == sample.tokens[wanted].tolist()
            assert set(labels[mask == 0].tolist()) == {NO_LABEL}
        assert batch.loss_mask.sum() > 0


def test_the_same_bytes_for_any_number_of_workers_and_shards_of_work(tmp_path, tokenizer, monkeypatch):
    given = rows(150, seed=1)
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 3000)
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr("megatron_xy.data.building.build_folder.WINDOW_DOCUMENTS", 40)
    monkeypatch.setattr(pack_shards, "SHARD_TOKENS", 500)
    one = built(tmp_path / "one", given, tokenizer, deduplicate=True)
    assert len(list(one.glob("general/*/*.mask"))) > 2, "otherwise this shows little"
    write_rows(tmp_path / "two/corpus.jsonl", given)
    corpus = [tmp_path / "two/corpus.jsonl"]
    options = {"source_field": "source", "chat_template": "xuanyuan", "append_eod": True, "deduplicate": True}
    for index in range(2):
        build_dataset(
            corpus,
            tokenizer=tokenizer,
            output=tmp_path / "two/data",
            buckets=BUCKETS,
            shard=Share(index, 2),
            **options,
        )
    two = content(tmp_path / "two/data")
    other = content(one)
    paths = {name: made.pop("manifest.json").replace(b"/two/", b"/one/") for name, made in (("1", other), ("2", two))}
    assert two == other and paths["1"] == paths["2"]


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path):
    contents = bytearray(path.read_bytes())
    contents[3] ^= 1
    path.write_bytes(contents)


def damage_remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_remove])
def test_a_damaged_mask_is_found(tmp_path, tokenizer, damage):
    data = built(tmp_path, rows(30), tokenizer)
    path = next(data.glob("general/bucket_00064/*.mask"))
    damage(path)
    with pytest.raises(DataError, match=r"shard_00000\.mask"):
        verify_dataset(data)
    if damage is not damage_flip:  # a size costs nothing to look at
        with pytest.raises(DataError, match=r"shard_00000\.mask"):
            PackedDataset([data])


def long_conversation(turns):
    words = [" ".join(text.split()[:10]) for text in texts(2 * turns, seed=5, median=6)]
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": word} for n, word in enumerate(words)], "source": "long"}


def test_a_conversation_too_long_is_refused_cut_from_the_left_or_split(tmp_path, tokenizer):
    loaded = load_tokenizer(tokenizer)
    chat = Chat(loaded, load_chat_template("xuanyuan", loaded))
    row = long_conversation(10)
    whole = chat.conversation(row["messages"])
    assert 256 < len(whole.ids) < 900
    given = [row, *({**short, "source": "short"} for short in rows(10) if "text" not in short)]
    with pytest.raises(
        DataError, match=rf"corpus\.jsonl:1: a conversation of {len(whole.ids)} tokens.*truncate_left or sp"
    ):
        built(tmp_path / "refuse", given, tokenizer)

    cut = built(tmp_path / "cut", given, tokenizer, chat_overflow="truncate_left")
    (found,) = [
        (sample, index) for stream, index, sample in all_samples(PackedDataset([cut])) if stream.source == "long"
    ]
    assert found[0].tokens.tolist() == whole.ids[-256:].tolist()
    assert found[0].learned.tolist() == whole.learned[-256:].tolist()
    (place,) = PackedDataset([cut]).documents(SampleId("long", 256, 0))
    assert (place["line"], place["start"], place["length"]) == (1, len(whole.ids) - 256, 256)
    entry = read_manifest(cut).sources["long"]
    assert (entry.truncated_documents, entry.tokens_lost) == (1, len(whole.ids) - 256)
    assert entry.tokens_learned == whole.learned[-256:].sum()

    split = built(tmp_path / "split", given, tokenizer, chat_overflow="split")
    pieces = {}
    for stream, index, sample in all_samples(PackedDataset([split])):
        if stream.source == "long":
            (place,) = PackedDataset([split]).documents(SampleId("long", stream.bucket, index))
            pieces[place["start"]] = sample
    joined = [pieces[start] for start in sorted(pieces)]
    assert np.concatenate([sample.tokens for sample in joined]).tolist() == whole.ids.tolist()
    assert np.concatenate([sample.learned for sample in joined]).tolist() == whole.learned.tolist()


def test_a_conversation_with_one_answer_to_learn_is_one():
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    assert [message.get("weight") for message in parse_conversation({"messages": turns}).messages] == [None, 0, None, 1]


def test_instruction_and_input_are_asked_as_lines_of_one_turn_behind_the_history():
    row = {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]}
    asked = [
        [message["content"] for message in parse_conversation({**row, "input": more}).messages]
        for more in ("b", "", None)
    ]
    assert asked == [["d", "e", "a\nb", "c"], ["d", "e", "a", "c"], ["d", "e", "a", "c"]]


BAD_ROWS = {
    "no turn of the assistant": {"messages": [{"role": "user", "content": "a"}]},
    "message 2 is an empty answer": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}]
    },
    "message 1: unknown role 'wizard'": {"messages": [{"role": "wizard", "content": "a"}]},
    "message 2: its content is a number": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]
    },
    "the messages are a string": {"messages": "hello"},
    "there are no messages": {"messages": []},
    "message 1 is a list": {"messages": [["user", "a"]]},
    "output: its content is missing": {"instruction": "a", "input": "b"},
    "message 2 is an empty": {"instruction": "a", "output": ""},
    "no place for a message of role tool": {
        "messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "message 1 has a lone|a message has a lone surrogate": {
        "messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]
    },
    "begin with a system turn, and there is a system beside them; keep one": {
        "messages": [{"role": role, "content": "a"} for role in ("system", "user", "assistant")],
        "system": "b",
    },
    "every answer has weight 0": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    },
    "neither a conversation .messages. nor a field 'text'": {"prompt": "a", "response": "b"},
    "no field 'source'": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "source": None,
    },
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_are_named_with_file_and_line(tmp_path, tokenizer, reason):
    row = {"source": "general", **BAD_ROWS[reason]}
    if row["source"] is None:
        del row["source"]
    good = [row for row in rows(6) if "text" not in row]
    with pytest.raises(DataError, match=rf"corpus\.jsonl:{len(good) + 1}: .*({reason})") as caught:
        built(tmp_path, [*good, row], tokenizer)
    assert "or leave them out with `data build --bad-lines skip`" in str(caught.value)


def test_skipped_bad_rows_are_counted(tmp_path, tokenizer):
    data = built(tmp_path, [*rows(6), {"messages": [], "source": "x"}], tokenizer, bad_lines="skip")
    assert read_manifest(data).statistics.bad_lines == 1
    assert "there are no messages" in (data / "bad_lines.txt").read_text()


def test_a_source_holds_texts_or_conversations(tmp_path, tokenizer, monkeypatch):
    mixed = [{**row, "source": "one"} for row in rows(20)]
    with pytest.raises(DataError, match="source one holds texts and conversations; give them sources of their own"):
        built(tmp_path / "near", mixed, tokenizer)
    monkeypatch.setattr("megatron_xy.data.corpus.inputs.PART_BYTES", 1000)
    apart = sorted(mixed, key=lambda row: "text" in row)
    with pytest.raises(DataError, match="source one holds texts and conversations"):
        built(tmp_path / "apart", apart, tokenizer)


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_a_system_beside_the_messages_is_their_first(form):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = parse_conversation({form: turns, "system": "be brief"})
    assert made.messages == [{"role": "system", "content": "be brief"}, *turns]
    assert parse_conversation({form: made.messages, "system": ""}) == made
    with pytest.raises(BadConversation, match="system: its content is a number"):
        parse_conversation({form: turns, "system": 3})


def test_a_run_takes_the_source_of_its_rows_one_by_one(tmp_path, tokenizer):
    data = DataConfig(tokenizer=tokenizer, chat_template="xuanyuan")
    config = RunConfig(data=data, training=TrainingConfig(micro_batch_tokens=256))
    given = [row for row in rows(9) if "text" not in row]
    bare = [{name: value for name, value in row.items() if name != "source"} for row in given]
    files = {
        "bare first": ("", [bare[0], *given], {"default": 1, "finance": 2, "general": 7}),
        "bare last": ("", [*given, {**bare[0], "source": None}], {"default": 1, "finance": 2, "general": 7}),
        "blank first": ("\n", given, {"finance": 2, "general": 7}),
        "none": ("", bare, {"default": 9}),
    }
    for name, (before, lines, counts) in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(before + "".join(json.dumps(row) + "\n" for row in lines))
        (folder,) = data_folders(config, [path], into=tmp_path)
        found = {source: entry.documents for source, entry in read_manifest(folder).sources.items()}
        assert found == counts, name
    path.write_text(json.dumps({**bare[0], "source": 3}))
    with pytest.raises(DataError, match=r"none\.jsonl:1: field 'source' is a number"):
        data_folders(config, [path], into=tmp_path)


def test_what_makes_a_run_s_file_other_data_gives_it_another_folder(tmp_path, tokenizer, monkeypatch):
    write_hf_tokenizer(tokenizer, tmp_path, model_max_length=256)
    beside = tmp_path / "tokenizer_config.json"
    path = write_rows(tmp_path / "chats.jsonl", [row for row in rows(3) if "text" not in row])
    template = tmp_path / "own"
    template.write_text(load_chat_template("xuanyuan", load_tokenizer(tokenizer)).source)

    def folder(name="xuanyuan"):
        data = DataConfig(tokenizer=tmp_path / "tokenizer.json", chat_template=name)
        config = RunConfig(data=data, training=TrainingConfig(micro_batch_tokens=256))
        return data_folders(config, [path], into=tmp_path / "data")[0]

    made = [folder(), folder(str(template))]
    beside.write_text(beside.read_text() + "\n")
    made.append(folder())
    for module in (build_folder, run_data):
        monkeypatch.setattr(module, "WORK_FORMAT", build_folder.WORK_FORMAT + 1)
    made.append(folder())
    assert len(set(made)) == 4


def test_without_a_template_a_conversation_is_a_bad_line_that_says_what_to_do(tmp_path, tokenizer):
    with pytest.raises(DataError, match="a conversation needs a chat template: give --chat-template"):
        built(tmp_path, rows(3), tokenizer, chat_template=None)
    with pytest.raises(ConfigError, match="neither a file nor one of"):
        built(tmp_path, rows(3), tokenizer, chat_template="none")


def test_folders_of_other_templates_are_not_joined(tmp_path, tokenizer):
    conversations = [row for row in rows(6) if "text" not in row and "system" not in row]
    one = built(tmp_path / "one", conversations, tokenizer)
    two = built(tmp_path / "two", conversations, tokenizer, chat_template="llama-2")
    plain = built(tmp_path / "plain", [{"text": "the fox", "source": "plain"}], tokenizer, chat_template=None)
    with pytest.raises(DataError, match="different chat templates"):
        PackedDataset([one, two])
    joined = PackedDataset([plain, one])
    assert joined.conversation_sources == ["finance", "general"] and joined.chat_template is not None


def test_only_the_last_turn(tmp_path, tokenizer):
    data = built(tmp_path, rows(12), tokenizer, last_turn_only=True)
    for sample in shown_samples(data, source="general", bucket=None, index=0, count=100):
        assert all(len(piece) == 1 for piece in sample.learned)


def test_show_tells_what_is_learned(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "the fox?"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "a lazy dog"},
    ]
    data = built(tmp_path, [{"messages": messages, "source": "s"}], tokenizer)
    (sample,) = shown_samples(data, source=None, bucket=None, index=0, count=1)
    assert sample.plain == "<s> Human: the fox? Assistant: jumps</s>Human: why Assistant: a lazy dog</s>"
    assert sample.learned == [[" jumps</s>", " a lazy dog</s>"]]
    dim = [sample.coloured.plain[span.start : span.end] for span in sample.coloured.spans if "dim" in str(span.style)]
    assert dim == ["<s> Human: the fox? Assistant:", "Human: why Assistant:"]
    answer = CliRunner().invoke(app, ["data", "show", str(data), "--json"])
    (shown,) = json.loads(answer.stdout)
    assert shown["learned"] == sample.learned and shown["sample"].endswith(" learned")
