"""Chat templates: messages -> one text, by Jinja in a sandbox, as transformers renders them.

Built in are XuanYuan's own, Llama-2's and ChatML; a file or the tokenizer's own template does as well. What stands
between {% generation %} and {% endgeneration %} is what the model is to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_xy.data.chat.conversations import BadConversation, Message
from megatron_xy.data.encoding.engines import TOKENIZER_CONFIG
from megatron_xy.data.encoding.tokenizer import Tokenizer
from megatron_xy.errors import ConfigError, DataError

OF_TOKENIZER = "tokenizer"  # the name of the template that came with the tokenizer
ANSWER_BEGINS, ANSWER_ENDS = "\ufdd0", "\ufdd1"  # around what a template marks with {% generation %}
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

# FastChat's ADD_COLON_TWO with " " and "</s>"; the system message ends in a newline of its own.
_XUANYUAN = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set turns = messages[1:] %}"
    "{% else %}{{ SYSTEM }}{% set turns = messages %}{% endif %}{{ ' ' }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:' }}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('this template has no place for a message of role ' + message['role'] + ' there') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_XUANYUAN_SYSTEM = (  # what XuanYuan-70B-Chat and XuanYuan2-70B-Chat were published with
    "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，会对人类提出的问题给出有帮助、"  # noqa: RUF001
    "高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问题和指示。\\n"  # noqa: RUF001
)
_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('after a system message, this template wants user and assistant in turn') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BUILT_IN = {
    "xuanyuan": _XUANYUAN.replace("SYSTEM", "''"),
    "xuanyuan-70b": _XUANYUAN.replace("SYSTEM", f"'{_XUANYUAN_SYSTEM}'"),
    "llama-2": _LLAMA_2,
    "chatml": _CHATML,
}


class ChatTemplate:
    """A Jinja template and the special tokens that it may name.

    Attributes: source, the template's text, which transformers renders to the same; name; marks_answers: whether it
    says with {% generation %} what the model is to say.
    """

    def __init__(self, source: str, *, name: str, tokenizer: Tokenizer) -> None:
        """Raises DataError where the text is no template, ConfigError where one of BUILT_IN lacks a token it needs."""
        self.source, self.name = source, name
        self.marks_answers = _MARKED.search(source) is not None
        self._tokens = tokenizer.special_tokens
        if name in BUILT_IN and (missing := _missing_tokens(source, tokenizer)):
            raise ConfigError(
                f"chat_template ({name}) needs {missing[0]}, and the tokenizer {tokenizer.path} has none; name another"
            )
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise DataError(f"chat_template ({name}) is no Jinja template: line {error.lineno}: {error}") from error

    def render(
        self, messages: list[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation, or of a prompt; answers stand between ANSWER_BEGINS and ANSWER_ENDS where the
        template marks them. Raises BadConversation where the template has no form for these messages.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except Exception as error:  # a template is a program: it may fail in any way, and is not ours
            raise BadConversation(f"the chat template {self.name} cannot render it: {error}") from error


def _missing_tokens(source: str, tokenizer: Tokenizer) -> list[str]:
    """What the tokenizer lacks of the tokens that a template of BUILT_IN names or spells."""
    names = [name for name in ("bos_token", "eos_token") if re.search(rf"\b{name}\b", source)]
    # As text they would end no answer, and any message could forge them.
    spelt = [token for token in ("<|im_start|>", "<|im_end|>") if token in source]
    return [
        *(f"a {name}" for name in names if name not in tokenizer.special_tokens),
        *(f"the control token {token}" for token in spelt if token not in tokenizer.control_tokens),
    ]


def load_chat_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of that name: one of BUILT_IN, OF_TOKENIZER, or a file. Raises ConfigError, DataError."""
    if name == OF_TOKENIZER:
        return ChatTemplate(_source_of(tokenizer), name=name, tokenizer=tokenizer)
    if name in BUILT_IN:
        return ChatTemplate(BUILT_IN[name], name=name, tokenizer=tokenizer)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"chat_template ({name}) is neither a file nor one of {', '.join((*BUILT_IN, OF_TOKENIZER))}; name one"
        )
    return ChatTemplate(_read(path), name=path.name, tokenizer=tokenizer)


def template_of_run(state: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the conversations that a checkpoint has learned, from its manifest's state; None: of none."""
    source = state.get("chat_template")
    return None if source is None else ChatTemplate(source, name="of the checkpoint's run", tokenizer=tokenizer)


def template_of_tokenizer(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's own, for verbs with --chat-template; where there is none, the ConfigError names that option."""
    try:
        return load_chat_template(OF_TOKENIZER, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{error}, with --chat-template") from None


def _source_of(tokenizer: Tokenizer) -> str:
    """The template beside the tokenizer: chat_template.jinja, or what tokenizer_config.json has under that name."""
    path = tokenizer.path.with_name("chat_template.jinja")
    if path.is_file():
        return _read(path)
    config = tokenizer.path.with_name(TOKENIZER_CONFIG)
    try:
        found = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    except ValueError as error:
        raise DataError(f"{config} is no JSON: {error}; copy it again") from error
    if isinstance(found, list):  # several, each with a name
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get("default")
    if not isinstance(found, str):
        raise ConfigError(
            f"chat_template ({OF_TOKENIZER}): the tokenizer {tokenizer.path} came without a chat_template; name one of "
            f"{', '.join(BUILT_IN)}, or a file"
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"chat_template ({path}) is no UTF-8 text; convert it") from error


class _Answers(Extension):
    """{% generation %} ... {% endgeneration %}: what stands in it, between two marks."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{ANSWER_BEGINS}{caller()}{ANSWER_ENDS}"


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, but without a clock: the same rows give the same tokens on every day."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    raise TemplateError(message)
