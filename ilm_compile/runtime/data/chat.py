"""Conversations as text: by the chat template beside a tokenizer.json, or plainly.

Plainly is, for every message, a line ``### System:``, ``### User:`` or ``### Assistant:`` and its
content, with an empty line between messages. A template is a program of whoever made the tokenizer:
it runs in Jinja's sandbox, with what Hugging Face's templates may expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ilm_compile.errors import IlmCompileError

Message = dict[str, str]  # role: system, user or assistant; content
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Chat:
    """render: messages to the text of a document, raising ValueError. name: what renders.

    ask: the same, and then what comes before the assistant's next answer. end: the piece that ends
    a text, None where nothing beside the tokenizer names one.
    """

    name: str
    render: Callable[[list[Message]], str]
    ask: Callable[[list[Message]], str]
    end: str | None = None


def _plain(messages: list[Message]) -> str:
    return "\n\n".join(f"### {m['role'].capitalize()}:\n{m['content']}" for m in messages)


def _plain_ask(messages: list[Message]) -> str:
    return _plain([*messages, {"role": "assistant", "content": ""}])


PLAIN = Chat("headings (### User:)", _plain, _plain_ask)


def chat_of(tokenizer: str | Path) -> Chat:
    """The rendering for a tokenizer: the template in the folder of a tokenizer.json, else `PLAIN`.

    Raises `IlmCompileError` for a template that cannot be read.
    """
    path = Path(tokenizer)
    if path.suffix != ".json":
        return PLAIN  # SentencePiece would spell a template's special tokens letter by letter
    config = _read_config(path.with_name(CONFIG))
    alone = path.with_name(TEMPLATE)
    end = None if config.get("eos_token") is None else _content(config["eos_token"])
    source = alone.read_text(encoding="utf-8") if alone.is_file() else config.get("chat_template")
    origin = alone if alone.is_file() else path.with_name(CONFIG)
    if source is None:
        return replace(PLAIN, end=end)
    if isinstance(source, list):
        named = {each.get("name"): each.get("template") for each in source}
        source = named.get("default")
    if not isinstance(source, str):
        raise IlmCompileError(
            f"chat template: expected a text, or a list with one named default, in {origin}"
        )
    try:
        template = _environment().from_string(source)
    except TemplateError as error:
        raise IlmCompileError(f"chat template: cannot read that of {origin}: {error}") from error
    render = _renderer(template, config)
    name = f"the chat template of {origin.name}"
    return Chat(name, partial(render, is_asked=False), partial(render, is_asked=True), end)


def _renderer(template: Template, config: dict[str, Any]) -> Callable[..., str]:
    tokens = {name: _content(config[name]) for name in _TOKENS if config.get(name) is not None}

    def render(messages: list[Message], *, is_asked: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=is_asked, **tokens)
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"an error of the chat template: {error}") from error

    return render


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IlmCompileError(f"chat template: {path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Not Jinja's, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)
