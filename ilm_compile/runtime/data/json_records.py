"""One JSON object to the text of a document: a text, a conversation, or an Alpaca example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ilm_compile.runtime.data.chat import Chat, Message

TEXT = "text"
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
}
FORMS = (
    'an object with the string "text", with "messages" [{"role", "content"}], with '
    '"conversations" [{"from", "value"}] (ShareGPT), or with "instruction", "input" and "output" '
    "(Alpaca)"
)
# What would be lost: a text has no tools, pictures, second answers or weights.
_LOST_OF_RECORD = ("tools", "functions", "images", "chosen", "rejected")
_LOST_OF_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "weight", "train")


class WrongRecord(ValueError):
    """What was expected and what there was instead, in words.

    by_field: whether it helps to name the field that holds the document.
    """

    def __init__(self, expected: str, got: str, *, by_field: bool = False) -> None:
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got, self.by_field = expected, got, by_field


def is_record(value: Any) -> bool:
    """Whether `value` is an object, or a list that begins with one: data, and no text."""
    return isinstance(value[0] if isinstance(value, list) and value else value, dict)


def text_of(record: Any, field: str | None, chat: Chat) -> str:
    """The text of a document; field: where it is to be found, None for any of `FORMS`.

    Raises `WrongRecord`.
    """
    content = _content_of(record, field)
    return content if isinstance(content, str) else _render(content, chat)


def messages_of(record: Any) -> list[Message]:
    """The messages of a conversation or an Alpaca example. Raises `WrongRecord`."""
    content = _content_of(record, None)
    if isinstance(content, str):
        raise WrongRecord("a conversation, of which only the answers are learnt", "a text")
    return content


def _content_of(record: Any, field: str | None) -> str | list[Message]:
    if not isinstance(record, dict):
        raise WrongRecord(_expected(field), f"a {type(record).__name__}")
    if field is not None:
        return _of_field(record, field)
    found = [name for name in (TEXT, "messages", "conversations") if name in record]
    if len(found) > 1:
        raise WrongRecord("one text in each object", _words(found), by_field=True)
    if found:
        return _of_field(record, found[0])
    if "instruction" in record:
        return _of_texts(_alpaca(record), record)
    raise WrongRecord(FORMS, f"the fields {_fields(record)}", by_field=True)


def _of_field(record: dict[str, Any], field: str) -> str | list[Message]:
    value = record.get(field)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        messages = [_message(each, f"{field}[{i}]") for i, each in enumerate(value)]
        return _of_texts([*_system(record, messages), *messages], record)
    raise WrongRecord(
        _expected(None if field == TEXT else field),
        f"the fields {_fields(record)}",
        by_field=True,
    )


def _of_texts(messages: list[Message], record: dict[str, Any]) -> list[Message]:
    for name in _LOST_OF_RECORD:
        if record.get(name):
            raise WrongRecord("a conversation of texts alone", f"{name!r}; leave such objects out")
    return messages


def _render(messages: list[Message], chat: Chat) -> str:
    try:
        return chat.render(messages)
    except ValueError as error:
        raise WrongRecord("a conversation that the chat template can render", str(error)) from error


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise WrongRecord(
            f'an object {{"role", "content"}} as {place}', f"a {type(value).__name__}"
        )
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise WrongRecord(f"a role among {_words(ROLES)} in {place}", repr(role))
    for name in _LOST_OF_MESSAGE:
        if value.get(name) not in (None, "", [], 1):
            raise WrongRecord(f"a message of text alone as {place}", f"one with {name!r}")
    return {"role": ROLES[role], "content": _content(content, place)}


def _content(content: Any, place: str) -> str:
    """The text of a message; of parts, such as OpenAI's, all must be text."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [content]
    texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
    kinds = [p.get("type", "text") if isinstance(p, dict) else type(p).__name__ for p in parts]
    if not parts or len(texts) < len(parts):
        raise WrongRecord(f"text as the content of {place}", _words(kinds) or "nothing")
    return "".join(texts)


def _alpaca(record: dict[str, Any]) -> list[Message]:
    values = [record["instruction"], record.get("input") or "", record.get("output")]
    if not all(isinstance(value, str) for value in values):
        raise WrongRecord('strings as "instruction", "input" and "output"', _fields(record))
    question = "\n\n".join(value for value in values[:2] if value)
    turns = [*_history(record), ("user", question), ("assistant", values[2])]
    messages = [{"role": role, "content": content} for role, content in turns]
    return [*_system(record, messages), *messages]


def _history(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Earlier turns, pairs of a question and its answer."""
    turns: list[tuple[str, str]] = []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise WrongRecord('pairs of strings as "history"', repr(pair)[:60])
        turns += zip(("user", "assistant"), pair, strict=True)
    return turns


def _system(record: dict[str, Any], messages: Sequence[Message]) -> list[Message]:
    """The system message that stands beside the others."""
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise WrongRecord('a string as "system"', f"a {type(system).__name__}")
    if system and messages[0]["role"] == "system":
        raise WrongRecord("one system message", 'one in "system" and one among the messages')
    return [{"role": "system", "content": system}] if system else []


def _expected(field: str | None) -> str:
    return FORMS if field is None else f"an object with a text or messages in {field!r}"


def _fields(record: dict[str, Any]) -> str:
    return ", ".join(f"{key!r} ({type(record[key]).__name__})" for key in list(record)[:10])


def _words(names: Any) -> str:
    return ", ".join(map(str, names))
