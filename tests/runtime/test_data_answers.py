"""Of conversations only the assistant's answers are learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import IGNORED_LABEL, chat_of, label_answers, read_conversations
from ilm_compile.runtime.data.chat import PLAIN, Chat

TALK = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Bye"},
]
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITHOUT_PROMPT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
COUNTING = "{{ messages | length }}" + WITHOUT_PROMPT
# Some models drop what was thought in earlier turns.
FORGETFUL = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }};{% endfor %}"


def letters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    return [ord(letter) for letter in text], [(i, i + 1) for i in range(len(text))]


def template(folder: Path, source: str) -> Chat:
    (folder / "chat_template.jinja").write_text(source)
    return chat_of(folder / "tokenizer.json")


def learnt(chat: Chat) -> list[str]:
    """The runs of letters that have a label."""
    tokens, labels = label_answers(TALK, chat, letters)
    assert "".join(map(chr, tokens)) == chat.render(TALK)
    assert all(y in (x, IGNORED_LABEL) for x, y in zip(tokens, labels, strict=True))
    return "".join(chr(y) if y != IGNORED_LABEL else "\0" for y in labels).split("\0")


def test_headings_and_questions_are_not_learnt() -> None:
    assert list(filter(None, learnt(PLAIN))) == ["Hello", "Bye"]


def test_an_answer_goes_to_the_end_of_its_turn_in_the_template(tmp_path: Path) -> None:
    found = learnt(template(tmp_path, CHATML))
    assert list(filter(None, found)) == ["Hello<end>\n", "Bye<end>\n"]


def test_a_template_without_a_prompt_has_the_heading_learnt(tmp_path: Path) -> None:
    found = learnt(template(tmp_path, WITHOUT_PROMPT))
    assert list(filter(None, found)) == ["[assistant]Hello", "[assistant]Bye"]


@pytest.mark.parametrize("source", [COUNTING, FORGETFUL], ids=["counting", "forgetful"])
def test_a_template_that_writes_earlier_messages_otherwise_is_refused(
    tmp_path: Path, source: str
) -> None:
    with pytest.raises(IlmCompileError, match="writes what comes before message 2 otherwise in"):
        learnt(template(tmp_path, source))


def test_what_a_template_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(IlmCompileError, match=r"chat_template.jinja refuses .*no systems"):
        learnt(template(tmp_path, "{{ raise_exception('no systems') }}"))


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(IlmCompileError, match="expected a message of the assistant to learn"):
        label_answers(TALK[:2], PLAIN, letters)


def test_a_token_that_begins_before_the_answer_is_not_learnt() -> None:
    start = PLAIN.render(TALK[:3]).index("Hello")
    spans = [(0, start - 1), (start - 1, start + 1), (start + 1, start + 3), (start + 3, start + 5)]
    _, labels = label_answers(TALK[:3], PLAIN, lambda text: ([7, 8, 9, 10], spans))
    assert labels == [IGNORED_LABEL, IGNORED_LABEL, 9, 10]


def test_every_token_of_one_letter_is_learnt_and_an_empty_one_is_not() -> None:
    start = PLAIN.render(TALK[:3]).index("Hello")
    spans = [(start, start), (start, start + 1), (start, start + 1)]
    _, labels = label_answers(TALK[:3], PLAIN, lambda text: ([7, 8, 9], spans))
    assert labels == [IGNORED_LABEL, 8, 9]


def test_conversations_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    alpaca = {"instruction": "Hi", "output": "Hello"}
    path.write_text(f"{json.dumps({'messages': TALK})}\n\n{json.dumps(alpaca)}\n")
    assert list(read_conversations([path])) == [(TALK, f"{path}:1"), (TALK[1:3], f"{path}:3")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "Hi"}, "expected a conversation, of which only the answers are learnt in"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "expected a role among"),
    ],
    ids=["text", "role"],
)
def test_what_is_no_conversation_is_refused_by_line(
    tmp_path: Path, record: dict[str, object], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'messages': TALK})}\n{json.dumps(record)}\n")
    with pytest.raises(IlmCompileError, match=rf"{message}.* .*a.jsonl:2, got "):
        list(read_conversations([tmp_path / "a.jsonl"]))
