"""Conversations as ids and masks: those of transformers, and exactly the ids behind each generation prompt."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_xy.data.chat.conversations import BadConversation
from megatron_xy.data.chat.encode import Chat
from megatron_xy.data.chat.template import BUILT_IN, ChatTemplate, load_chat_template
from megatron_xy.data.encoding.tokenizer import load_tokenizer
from megatron_xy.errors import ConfigError, DataError
from megatron_xy.hf.tokenizer import write_hf_tokenizer
from megatron_xy.inference.answers import Chats
from tests.unit.test_tokenizer import json_contents, trained

# As Qwen's: no {% generation %}, tools, and a date from a clock that is not there.
PLAIN = (
    "{%- if tools %}{{ '<|begin|>system\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|begin|>' + message.role + '\n' }}"
    "{%- if strftime_now is defined and false %}{{ strftime_now('%d') }}{% endif %}{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}<think>{{ call | tojson }}{% endfor %}{{ '<|end|>\n' }}"
    "{%- endfor %}{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "be a quick fox.\n"}
CONVERSATIONS = {
    "one turn": [user("the dog?"), assistant("lazy")],
    "system": [SYSTEM, user("the dog?"), assistant("lazy")],
    "many turns": [SYSTEM, *[turn for n in range(4) for turn in (user(f"{n} fox"), assistant(f"jumps {n}"))]],
    "empty answer": [user("a"), assistant(""), user("b"), assistant("the end")],
    "system only": [SYSTEM],
    "last by the user": [user("a"), assistant("over"), user("and?")],
    "blanks at the border": [user(" a "), assistant("  the  "), user("\n"), assistant("\n\nfox\n")],
    "unicode": [user("狐狸 🦊?"), assistant("é e\u0301 狐狸🦊"), user("\u0301a"), assistant("\u0301 \u200d x")],
    "special characters": [
        user("<0x41> [INST] <<SYS>> ▁"),
        assistant("Human: x Assistant: y"),
        user(""),
        assistant("z"),
    ],
}
# As Llama-3 has it, and a template that drops what was thought in turns before the last one, as Qwen-3's.
TRIMMED = (
    "{{- bos_token }}{% for message in messages %}"
    "{{ '<think>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<think>assistant\\n\\n' }}{% endif %}"
)
THOUGHT = "<think>well\n"
THINKING = (
    "{% for message in messages %}{{ '<|begin|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>well\\n' }}{% endif %}"
    "{{ message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\\n' }}{% endif %}"
)
CALLS = [
    user("the weather?"),
    assistant(None, tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"at": "北京"}}}]),
    {"role": "tool", "content": "the sun"},
    assistant("sunny"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HF folders: one of a SentencePiece model, one of a byte-level tokenizer.json."""
    base = tmp_path_factory.mktemp("chat")
    names = ["sentencepiece", "bytes"]
    for name in names:
        (base / name).mkdir()
    write_hf_tokenizer(trained(base / "tokenizer.model"), base / "sentencepiece", model_max_length=4096)
    contents = json_contents(truncation=None, padding=None)
    for token in ("<|im_start|>", "<|im_end|>"):
        added = contents["added_tokens"]
        added.append({**added[0], "id": added[-1]["id"] + 1, "content": token})
    (base / "bytes/tokenizer.json").write_text(json.dumps(contents))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    config["chat_template"] = [{"name": "rag", "template": "no"}, {"name": "default", "template": PLAIN}]
    (base / "bytes/tokenizer_config.json").write_text(json.dumps(config))
    return {name: base / name for name in names}


@pytest.fixture(scope="module")
def chats(folders):
    """{(folder, template): Chat} of every pair that goes together."""
    made = {}
    for name, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        for template in BUILT_IN:
            if (name, template) == ("sentencepiece", "chatml"):  # it has none of its tokens
                continue
            made[name, template] = Chat(tokenizer, load_chat_template(template, tokenizer))
        unmarked = BUILT_IN["xuanyuan"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
        made[name, "unmarked"] = Chat(tokenizer, ChatTemplate(unmarked, name="unmarked", tokenizer=tokenizer))
    tokenizer = load_tokenizer(folders["bytes"])
    made["bytes", "its own"] = Chat(tokenizer, load_chat_template("tokenizer", tokenizer))
    for template, source in (("trimmed", TRIMMED), ("thinking", THINKING)):
        made["bytes", template] = Chat(tokenizer, ChatTemplate(source, name=template, tokenizer=tokenizer))
    return made


def of_transformers(folders, chats, cases):
    """[ids, mask] of each (folder, template, messages, tools, prompt)."""
    rows = [
        {
            "folder": str(folders[folder]),
            "template": None if template == "its own" else chats[folder, template].template.source,
            "messages": messages,
            "tools": tools,
            "prompt": prompt,
        }
        for folder, template, messages, tools, prompt in cases
    ]
    command = [sys.executable, "-m", "tests.unit.render_with_transformers"]
    made = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, timeout=100, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return json.loads(made.stdout)


def test_ids_and_masks_are_those_of_apply_chat_template(folders, chats):
    cases = [
        (folder, template, messages, None, prompt)
        for folder, template in chats
        for messages in CONVERSATIONS.values()
        for prompt in (False, True)
    ]
    cases += [("bytes", "its own", CALLS, [{"name": "weather", "狐": 1}], prompt) for prompt in (False, True)]
    expected = of_transformers(folders, chats, cases)
    num_marked = 0
    for (folder, template, messages, tools, prompt), (ids, mask) in zip(cases, expected, strict=True):
        chat = chats[folder, template]
        where = f"{folder} {template} {messages}"
        if prompt:
            assert chat.prompt(messages, tools=tools).tolist() == ids, where
            continue
        made = chat.conversation(messages, tools=tools)
        assert made.ids.tolist() == ids, where
        if chat.template.marks_answers:
            assert made.learned.astype(int).tolist() == mask, where
            num_marked += sum(mask)
    assert num_marked > 500


def behind_prompts(chat, messages, **options):
    """The mask by its definition: of each turn, the ids behind its prompt, up to its last control token."""
    whole = chat.conversation(messages, **options).ids.tolist()
    controls = set(chat.tokenizer.control_tokens.values())
    mask = np.zeros(len(whole), dtype=bool)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = chat.prompt(messages[:number], **options).tolist()
            until = chat.conversation(messages[: number + 1], **options).ids.tolist()
            last = max((place for place, index in enumerate(until) if index in controls), default=len(until) - 1)
            last = last if last >= len(prompt) else len(until) - 1
            assert whole[: len(prompt)] == prompt and whole[: last + 1] == until[: last + 1]
            mask[len(prompt) : last + 1] = True
    return mask


@pytest.mark.parametrize("name", ["one turn", "system", "many turns", "last by the user", "unicode", "empty answer"])
def test_exactly_the_ids_behind_each_generation_prompt_are_learned(chats, name):
    for (folder, template), chat in chats.items():
        if template == "thinking":  # an answer that is rendered anew by what follows
            continue
        made = chat.conversation(CONVERSATIONS[name])
        assert made.learned.tolist() == behind_prompts(chat, CONVERSATIONS[name]).tolist(), (folder, template)


def test_the_leading_space_is_the_model_s_own_and_so_is_the_end_token(folders, chats):
    chat = chats["sentencepiece", "xuanyuan"]
    made = chat.conversation([SYSTEM, user("dog"), assistant("lazy"), user("fox"), assistant("quick")])
    pieces = [chat.tokenizer.engine.spelling(index) for index in made.ids[made.learned].tolist()]
    assert "".join(pieces) == "▁lazy</s>▁quick</s>"
    assert chat.tokenizer.decode_runs(made.ids, made.learned) == [
        ("<s>be a quick fox.\n Human: dog Assistant:", False), (" lazy</s>", True),
        ("Human: fox Assistant:", False), (" quick</s>", True),
    ]  # fmt: skip
    without = chat.prompt([user("dog")])
    assert without.tolist() == [1, *chat.tokenizer.encode(" Human: dog Assistant:").tolist()]
    assert chat.prompt(" Human: dog Assistant:").tolist() == without.tolist()
    assert chat.stop_ids == [2] and chats["bytes", "its own"].stop_ids == [1]
    with_text = chats["sentencepiece", "xuanyuan-70b"]
    assert with_text.tokenizer.decode(with_text.prompt([user("dog")])).startswith(
        "以下是用户和人工智能助手之间的对话。"
    )
    assert with_text.prompt([SYSTEM, user("dog")]).tolist() == chat.prompt([SYSTEM, user("dog")]).tolist()


def test_a_template_that_renders_earlier_turns_otherwise_still_shows_where_each_answer_ends(chats):
    chat = chats["bytes", "thinking"]
    made = chat.conversation([user("dog"), assistant("lazy"), user("fox"), assistant("quick")])
    learned = [text for text, is_learned in chat.tokenizer.decode_runs(made.ids, made.learned) if is_learned]
    assert learned == ["lazy<|end|>", "<think>well\nquick<|end|>"]


def test_tool_results_are_not_learned_and_calls_are(chats):
    chat = chats["bytes", "its own"]
    made = chat.conversation(CALLS, tools=[{"name": "weather"}])
    learned = [text for text, is_learned in chat.tokenizer.decode_runs(made.ids, made.learned) if is_learned]
    assert learned[1] == "sunny<|end|>" and len(learned) == 2
    assert learned[0].startswith("<think>{") and "北京" in learned[0] and learned[0].endswith("<|end|>")
    assert made.learned.tolist() == behind_prompts(chat, CALLS, tools=[{"name": "weather"}]).tolist()


def test_only_the_last_turn_or_those_with_weight(chats):
    messages = [user("a"), assistant("fox", weight=0), user("b"), assistant("dog", weight=1), user("c"), assistant("x")]
    for (folder, template), chat in chats.items():
        spans = [
            [text.strip() for text, learned in chat.tokenizer.decode_runs(made.ids, made.learned) if learned]
            for made in (chat.conversation(messages), chat.conversation(messages, last_turn_only=True))
        ]
        words = [[span.removeprefix(THOUGHT).replace(" ", "").split("<")[0] for span in learned] for learned in spans]
        assert words == [["dog", "x"], ["x"]], (folder, template)


def test_a_control_token_in_a_message_stays_text(chats):
    said = "a</s><s>b <|end|> <|begin|>"
    for (folder, template), chat in chats.items():
        plain = chat.conversation([user("q"), assistant("r")])
        made = chat.conversation([user(said), assistant(said)])
        controls = list(chat.tokenizer.control_tokens.values())
        assert np.isin(made.ids, controls).sum() == np.isin(plain.ids, controls).sum(), (folder, template)
        decoded = "".join(text for text, _ in chat.tokenizer.decode_runs(made.ids, made.learned))
        assert decoded.count(said) == 2, (folder, template)
        learned = [text for text, known in chat.tokenizer.decode_runs(made.ids, made.learned) if known]
        assert len(learned) == 1 and learned[0].removeprefix(THOUGHT).strip().startswith(said), (folder, template)


def test_what_merges_across_the_border_is_as_in_transformers_where_marked_else_prompt(folders):
    """Behind "...\\n" an answer that begins with a line break may share a token with its prompt."""
    tokenizer = load_tokenizer(folders["bytes"])
    marked = "{{ messages[0].content }}{% generation %}{{ messages[1].content }}<|end|>{% endgeneration %}"
    plain = "{{ messages[0].content }}{% if messages[1:] %}{{ messages[1].content }}<|end|>{% endif %}"
    messages = [user("the qui"), assistant("ck fox")]
    whole = tokenizer.encode("the quick fox").tolist()
    prompt = tokenizer.encode("the qui").tolist()
    assert whole[: len(prompt)] != prompt, "otherwise nothing merges here"
    learned = {}
    for name, source in (("marked", marked), ("plain", plain)):
        made = Chat(tokenizer, ChatTemplate(source, name=name, tokenizer=tokenizer)).conversation(messages)
        assert made.ids.tolist() == [*whole, tokenizer.eos_id]
        learned[name] = "".join(text for text, known in tokenizer.decode_runs(made.ids, made.learned) if known)
    assert learned["plain"] == " fox<|end|>" and learned["marked"].endswith("ck fox<|end|>")
    assert len(learned["marked"]) > len("ck fox<|end|>")


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2"))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(texts=st.lists(st.one_of(st.text(alphabet="ab \n狐é"), ANY_TEXT), min_size=2, max_size=6))
def test_any_texts_give_the_answers_back(chats, texts):
    messages = [(user, assistant)[number % 2](text) for number, text in enumerate(texts)]
    for key in (
        ("sentencepiece", "xuanyuan"),
        ("sentencepiece", "unmarked"),
        ("bytes", "its own"),
        ("bytes", "xuanyuan"),
    ):
        chat = chats[key]
        made = chat.conversation(messages)
        runs = chat.tokenizer.decode_runs(made.ids, made.learned)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        learned = [text for text, is_learned in runs if is_learned]
        end = "</s>" if key[0] == "sentencepiece" else "<|end|>"
        blank = "" if key[1] == "its own" else " "
        assert learned == [f"{blank}{answer}{end}".replace("▁", " ") for answer in answers] or any(
            "\ufffd" in text for text, _ in runs
        )


def test_what_a_template_cannot_render_is_refused(folders, chats):
    tokenizer = load_tokenizer(folders["sentencepiece"])
    with pytest.raises(BadConversation, match="no place for a message of role tool"):
        chats["sentencepiece", "xuanyuan"].conversation([user("a"), {"role": "tool", "content": "b"}, assistant("c")])
    with pytest.raises(BadConversation, match="user and assistant in turn"):
        chats["sentencepiece", "llama-2"].conversation([assistant("c")])
    with pytest.raises(ConfigError, match=r"chat_template \(alpaca\) is neither a file nor one of xuanyuan"):
        load_chat_template("alpaca", tokenizer)
    with pytest.raises(ConfigError, match=r"\(chatml\) needs the control token <\|im_start\|>, and .* has none; name"):
        load_chat_template("chatml", tokenizer)
    with pytest.raises(ConfigError, match="came without a chat_template"):
        load_chat_template("tokenizer", tokenizer)
    with pytest.raises(ConfigError, match="or a file, with --chat-template"):
        Chats("hf:none", tokenizer, given=None).needed()
    with pytest.raises(DataError, match="line 1"):
        ChatTemplate("{% if %}", name="x", tokenizer=tokenizer)
    changing = "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(BadConversation, match=r"otherwise than as its prompt; mark the answers .* \{% generation %\}"):
        Chat(tokenizer, ChatTemplate(changing, name="x", tokenizer=tokenizer)).conversation([user("a"), assistant("b")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__'))|attr('__mro__') }}",
        "{{ ('{0.__class__}'|attr('format'))(messages) }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_a_template_stays_in_its_sandbox(folders, source):
    tokenizer = load_tokenizer(folders["sentencepiece"])
    template = ChatTemplate(source, name="x", tokenizer=tokenizer)
    messages = [user("a")]
    with contextlib.suppress(BadConversation):
        assert template.render(messages) == "", "what is unsafe is undefined at best"
    assert messages == [user("a")]
