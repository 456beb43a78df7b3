"""JSON is data: its texts and conversations are learnt, or it is refused; never its quotes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ilm_compile.cli import main
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import (
    ByteTokenizer,
    TokenShard,
    chat_of,
    documents_from_files,
    read_documents,
)

TURNS = "### User:\nHi\n\n### Assistant:\nHello"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARE_GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
RECORDS: dict[str, tuple[Any, str]] = {
    "text": ({"text": "Hi"}, "Hi"),
    "messages": ({"messages": MESSAGES}, TURNS),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
              "### User:\nHi"),
    "sharegpt": ({"conversations": SHARE_GPT}, TURNS),
    "sharegpt with system": (
        {"system": "Be brief", "conversations": SHARE_GPT}, f"### System:\nBe brief\n\n{TURNS}"),
    "alpaca": ({"instruction": "Hi", "output": "Hello"}, TURNS),
    "alpaca with input": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        "### User:\nAdd\n\n1 2\n\n### Assistant:\n3",
    ),
    "alpaca with history": (
        {"instruction": "Hi", "output": "Hello", "history": [["a", "b"]]},
        f"### User:\na\n\n### Assistant:\nb\n\n{TURNS}",
    ),
    "alpaca with its own text": ({"instruction": "Hi", "output": "Hello", "text": "all"}, "all"),
}  # fmt: skip
FILES = {
    "json lines": ("a.jsonl", lambda records: "".join(f"{json.dumps(r)}\n" for r in records)),
    "json lines as json": ("a.json", lambda records: "\n".join(map(json.dumps, records))),
    "a list": ("a.json", lambda records: json.dumps(records, indent=1)),
    "a list on one line": ("a.json", json.dumps),
    "with a mark": ("a.json", lambda records: f"\ufeff{json.dumps(records)}"),
}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("file", FILES)
def test_every_form_of_record_and_file_is_read(tmp_path: Path, file: str, record: str) -> None:
    name, written = FILES[file]
    value, expected = RECORDS[record]
    (tmp_path / name).write_text(written([value, {"text": "another"}]))
    assert documents_from_files([tmp_path / name]) == [expected, "another"]


def test_one_object_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS["alpaca"][0], indent=2))
    (document,) = read_documents([tmp_path / "a.json"])
    assert (document.text, document.source) == (TURNS, str(tmp_path / "a.json"))


@pytest.mark.parametrize("field", ["dialog", "body"])
def test_a_named_field_holds_messages_or_text(tmp_path: Path, field: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"dialog": MESSAGES, "body": "b", "text": "no"}))
    (document,) = read_documents([tmp_path / "a.jsonl"], field=field)
    assert document.text == {"dialog": TURNS, "body": "b"}[field]


REFUSED: dict[str, tuple[Any, str]] = {
    "other fields": ({"prompt": "a", "completion": "b"}, r"\(Alpaca\) in .*a\.json\[0\], got the "
                     r"fields 'prompt' \(str\), 'completion' \(str\); choose one with field="),
    "columns": ({"text": {"0": "a"}}, r"the fields 'text' \(dict\)"),
    "no record": ("only a string", r"got a str"),
    "two texts": ({"text": "a", "messages": MESSAGES}, "got text, messages; choose one with f"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "1"}]},
                        r"a role among system, user, human.* in messages\[0\].*got 'tool'"),
    "a message of text": ({"conversations": ["Hi"]}, r"as conversations\[0\] in .*got a str"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                  r"text as the content of messages\[0\].*got image"),
    "no content": ({"messages": [{"role": "assistant", "content": None}]}, "got NoneType"),
    "a call": ({"messages": [{**MESSAGES[1], "tool_calls": [{}]}]}, "one with 'tool_calls'"),
    "a weight": ({"messages": [{**MESSAGES[1], "weight": 0}]}, "one with 'weight'"),
    "preferences": ({"conversations": SHARE_GPT, "chosen": {}, "rejected": {"a": 1}}, "'rejected'"),
    "two systems": ({"system": "a", "messages": [{"role": "system", "content": "b"}]},
                    "one system message"),
    "no answer": ({"instruction": "Hi"}, 'strings as "instruction", "input" and "output"'),
    "a broken history": ({"instruction": "a", "output": "b", "history": ["c"]}, "pairs of strings"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_document_is_refused(tmp_path: Path, case: str) -> None:
    record, message = REFUSED[case]
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(IlmCompileError, match=message):
        documents_from_files([tmp_path / "a.json"])


@pytest.mark.parametrize(
    "content",
    ['{"text": "a"}\n{"text": "b"}\n', '\n{"text": "a"}', '[\n {"text": "a"}\n]', '{\n "a": 1\n}'],
)
def test_json_in_a_text_file_is_never_learnt_unasked(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(IlmCompileError, match=r"got JSON, whose quotes .* name it \.json or"):
        documents_from_files([path])
    (document,) = read_documents([path], as_text=True)
    assert document.text == content


@pytest.mark.parametrize("content", ["[1] A list of references\n", "{ braces }", "[1, 2]", "[]"])
def test_text_that_looks_like_json_at_first_is_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert documents_from_files([tmp_path / "a.txt"]) == [content]


def prepared(folder: Path, *options: str | Path) -> list[list[int]]:
    assert main(["prepare-data", *map(str, options), "--out", str(folder)]) == 0
    shard = TokenShard(folder / "00000.bin")
    return [shard.tokens(i, vocab_size=10**6).tolist() for i in range(len(shard))]


def test_json_is_learnt_as_it_is_only_if_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}')
    end = ByteTokenizer.end_of_document
    assert prepared(tmp_path / "texts", path) == [[*b"a", end]]
    assert prepared(tmp_path / "all", path, "--as-text") == [[*b'{"text": "a"}', end]]


# chat templates

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{% generation %}"
    "<|{{ m['role'] }}|> {{ m['content'] }}{% endgeneration %}\n{% endfor %}{{ eos_token }}"
)
RENDERED = "<s><|user|> Hi<|assistant|> Hello</s>"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One that has truncation, padding and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "Hi", "Hello"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(words[1:5])
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path / "tokenizer.json"


def test_truncation_and_padding_of_a_tokenizer_are_left_out(
    tmp_path: Path, tokenizer: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Hi Hello Hi Hello"}\n{"text": "Hi"}')
    options = ("--tokenizer", tokenizer)
    tokens = prepared(tmp_path / "out", tmp_path / "a.jsonl", *options)
    assert tokens == [[5, 6, 5, 6, 2], [5, 2]]


def test_a_chat_template_renders_conversations(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"messages": MESSAGES}, {"text": "Hi"}]))
    options = ("--tokenizer", tokenizer, "--begin-of-document", "<s>")
    tokens = prepared(tmp_path / "out", tmp_path / "a.json", *options)
    assert tokens == [[1, 3, 5, 4, 6, 2], [1, 5, 2]]
    said = "1 of them are conversations, rendered by the chat template of tokenizer_config.json\n"
    assert capsys.readouterr().out.endswith(said)


def test_the_template_beside_is_found_where_it_is(tmp_path: Path, tokenizer: Path) -> None:
    def render() -> str:
        return chat_of(tokenizer).render(MESSAGES).replace("\n", "")

    assert render() == RENDERED
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }} of a file")
    assert render() == "2 of a file"
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert render() == "named"
    (tmp_path / "tokenizer_config.json").unlink()
    assert render() == TURNS.replace("\n", "")
    assert chat_of("bytes").render(MESSAGES) == TURNS


def test_what_a_template_refuses_is_refused_by_line(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"system": "a", "messages": MESSAGES}))
    with pytest.raises(IlmCompileError, match=r"in .*a\.jsonl:1, got .*template: no system"):
        documents_from_files([path], chat=chat_of(tokenizer))


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"], ids=["cut", "code"]
)
def test_a_template_runs_no_code(tmp_path: Path, tokenizer: Path, template: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises((IlmCompileError, ValueError), match="chat template"):
        chat_of(tokenizer).render(MESSAGES)
