"""prepare-data: text, JSON Lines and tokenizers to token files, all of it or nothing."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ilm_compile.cli import main
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import ByteTokenizer, FileTokenizer, TokenShard, load_tokenizer
from ilm_compile.runtime.data.prepare import prepare
from ilm_compile.runtime.data.text_files import Document

END = ByteTokenizer.end_of_document
TEXTS = ["hello world", "gr\u00fc\u00df dich", "", "a b a"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in TEXTS))
    return path


@pytest.fixture(scope="module")
def fast_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer.json of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "hello", "world", "a", "b"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("fast") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("sp") / "sp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "a b a b", "good day"] * 20),
        model_prefix=str(prefix),
        vocab_size=17,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def run(*arguments: str | Path) -> int:
    return main(["prepare-data", *map(str, arguments)])


def read(folder: Path) -> list[list[int]]:
    shards = [TokenShard(path) for path in sorted(folder.glob("*.bin"))]
    return [s.tokens(i, vocab_size=10**6).tolist() for s in shards for i in range(len(s))]


def test_json_lines_become_documents_of_bytes(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lines, "--out", tmp_path / "data" / "en") == 0
    assert read(tmp_path / "data" / "en") == [[*text.encode(), END] for text in TEXTS]
    out = capsys.readouterr().out
    assert out == (
        "wrote 4 documents, 31 tokens below 258 (0.87 bytes of text each), in 1 files to "
        f"{tmp_path / 'data' / 'en'}\n"
    )


def test_every_other_file_is_one_document(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(f"line\n{name}")
    assert run(tmp_path / "b.txt", tmp_path / "a.md", "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out") == [[*f"line\n{n}".encode(), END] for n in ("b.txt", "a.md")]


def test_another_field_may_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    assert run(tmp_path / "a.jsonl", "--field", "body", "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out") == [[*b"yes", END]]


def test_documents_are_spread_over_files(tmp_path: Path, lines: Path) -> None:
    assert run(lines, "--shard-tokens", "13", "--out", tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    files = [f"{i:05d}.bin{s}" for i in range(2) for s in ("", ".meta")]
    assert names == [".ilm_compile-summary", *files]
    assert len(TokenShard(tmp_path / "out" / "00000.bin")) == 2
    assert read(tmp_path / "out") == [[*text.encode(), END] for text in TEXTS]


def test_a_tokenizer_of_hugging_face(tmp_path: Path, lines: Path, fast_tokenizer: Path) -> None:
    assert run(lines, "--tokenizer", fast_tokenizer, "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out") == [[3, 4, 2], [0, 0, 2], [2], [5, 6, 5, 2]]


def test_pieces_around_a_document(tmp_path: Path, lines: Path, fast_tokenizer: Path) -> None:
    pieces = ["--begin-of-document", "<s>", "--end-of-document", "b"]
    assert run(lines, "--tokenizer", fast_tokenizer, *pieces, "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out")[0] == [1, 3, 4, 6]


def test_a_sentencepiece_model(tmp_path: Path, lines: Path, sentencepiece_model: Path) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert run(lines, "--tokenizer", sentencepiece_model, "--out", tmp_path / "out") == 0
    expected = [[*processor.encode(text), processor.eos_id()] for text in TEXTS]
    assert read(tmp_path / "out") == expected
    assert FileTokenizer(sentencepiece_model).vocab_size == 17


# refusals


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


WRONG_LINES = {
    "no JSON": (b'{"text": "a"', "in {path}:2, got Expecting"),
    "not UTF-8": (b'{"text": "\xff"}', "in {path}:2, got 'utf-8' codec can't decode"),
    "a list": (b'["text"]', "(Alpaca) in {path}:2, got a list"),
    "no text": (
        b'{"txt": "a"}',
        "in {path}:2, got the fields 'txt' (str); choose one with --field",
    ),
    "a number": (b'{"text": 1}', "in {path}:2, got the fields 'text' (int)"),
    "half a pair": (b'{"text": "\\ud800"}', "text that UTF-8 can write in {path}:2"),
    "nested": (b"[" * 100_000, "in {path}:2, got JSON nested too deeply"),
}


@pytest.mark.parametrize(("line", "message"), WRONG_LINES.values(), ids=WRONG_LINES)
def test_a_wrong_line_is_named_and_nothing_is_left(
    tmp_path: Path, line: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    assert message.format(path=path) in error_of(capsys, path, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_overwritten(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lines, "--out", tmp_path / "out") == 0
    before = read(tmp_path / "out")
    capsys.readouterr()
    assert "out exists; remove it" in error_of(capsys, lines, "--out", tmp_path / "out")
    assert read(tmp_path / "out") == before
    assert "a.jsonl exists; remove it" in error_of(capsys, lines, "--out", lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.txt", "--out", "out"], "expected a readable text file at absent.txt"),
        (["absent.jsonl", "--out", "out"], "expected a readable file at absent.jsonl"),
        (["a.jsonl", "--out", "out", "--tokenizer", "absent.json"], "a file at absent.json, found"),
        (
            ["a.jsonl", "--out", "out", "--tokenizer", "a.jsonl"],
            "one of .json, .model, got a.jsonl",
        ),
        (["a.jsonl", "--out", "out", "--shard-tokens", "0"], "got shard_tokens=0"),
        (["a.jsonl", "--out", "out", "--begin-of-document", "<s>"], "needs a --tokenizer file"),
        (["a.jsonl", "--out", "out", "--end-of-document", "x"], "leave the piece 'x' out"),
        (["empty.jsonl", "--out", "out"], "expected at least one document, got none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path,
    lines: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"no tokenizer")
    with pytest.raises(IlmCompileError, match=f"broken{suffix}"):
        load_tokenizer(path)


def test_an_unknown_piece_is_named(fast_tokenizer: Path) -> None:
    with pytest.raises(IlmCompileError, match=r"has none of the pieces <end> to end a document"):
        load_tokenizer(fast_tokenizer, end="<end>")
    with pytest.raises(IlmCompileError, match="has no piece '<begin>'"):
        FileTokenizer(fast_tokenizer).token_id("<begin>")


@pytest.mark.parametrize(
    ("suffix", "package"), [(".json", "tokenizers"), (".model", "sentencepiece")]
)
def test_a_library_that_is_not_installed_is_named(
    tmp_path: Path, suffix: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    path = tmp_path / f"a{suffix}"
    path.touch()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(IlmCompileError, match=f"needs the package {package}, which is not inst"):
        load_tokenizer(path)


def test_an_interrupted_run_leaves_no_folder(tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        yield Document("a", 1, "a")
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(documents(), tmp_path / "out", tokenizer=ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told_of_every_document(tmp_path: Path) -> None:
    told = []
    documents = [Document(text, len(text), text) for text in "abc"]
    prepare(
        documents,
        tmp_path / "out",
        tokenizer=ByteTokenizer(),
        report=lambda document, summary: told.append((document.text, summary.tokens)),
    )
    assert told == [("a", 2), ("b", 4), ("c", 6)]
