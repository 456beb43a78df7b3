"""Text to token ids: bytes, or the tokenizer of a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from ilm_compile.errors import IlmCompileError

BYTES = "bytes"
Span = tuple[int, int]  # in characters, the end is the first one after it


class Tokenizer(Protocol):
    """What packing and prepare-data ask of a tokenizer.

    end_of_document and padding are token ids below `vocab_size`.
    """

    end_of_document: int
    padding: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """The tokens and the characters of `text` that each of them is a part of."""
        ...


class ByteTokenizer:
    """Tokens are the bytes of the text in UTF-8; two more mark a document's end and padding."""

    end_of_document = 256
    padding = 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        sizes = [len(character.encode("utf-8")) for character in text]
        return self.encode(text), [(i, i + 1) for i, size in enumerate(sizes) for _ in range(size)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the byte tokens; other tokens are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face ``tokenizer.json`` or a SentencePiece ``*.model``.

    Documents are encoded without special tokens. end: the piece that ends a document; None takes
    the first of `END_PIECES` that the vocabulary has. Padding is the same token, never a target.
    Raises `IlmCompileError` if the file is not a tokenizer, its library is not installed, or the
    vocabulary has no such piece.
    """

    def __init__(self, path: str | Path, *, end: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise IlmCompileError(
                f"tokenizer: expected a file at {self.path}, found none; give {BYTES!r}, a "
                "tokenizer.json or a SentencePiece .model"
            )
        reader = _READERS.get(self.path.suffix)
        if reader is None:
            raise IlmCompileError(
                f"tokenizer: expected {BYTES!r} or a file that ends in one of "
                f"{', '.join(_READERS)}, got {self.path}"
            )
        self._model = reader(self.path)
        self.vocab_size = self._model.vocab_size
        self.end_of_document = self.padding = self._find_end(end)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """As the protocol says. Raises `IlmCompileError` for a SentencePiece file."""
        if not isinstance(self._model, _HuggingFace):
            raise IlmCompileError(
                f"tokenizer: {self.path} does not tell where its tokens lie in a text, which "
                "conversations need; give a tokenizer.json, or convert it with transformers"
            )
        return self._model.encode_spans(text)

    def token_id(self, piece: str) -> int:
        """The token of a piece such as "<s>". Raises `IlmCompileError` for an unknown one."""
        token = self._model.token_id(piece)
        if token is None:
            raise IlmCompileError(f"tokenizer: {self.path} has no piece {piece!r}")
        return token

    def _find_end(self, end: str | None) -> int:
        wanted = END_PIECES if end is None else (end,)
        for piece in wanted:
            token = self._model.token_id(piece)
            if token is not None:
                return token
        raise IlmCompileError(
            f"tokenizer: {self.path} has none of the pieces {', '.join(wanted)} to end a document "
            "with; name the right one (prepare-data --end-of-document)"
        )


# The end-of-document pieces of InternLM and Llama, GPT-2, Llama 3 and Qwen, in this order.
END_PIECES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>")


def load_tokenizer(name: str | Path, *, end: str | None = None) -> Tokenizer:
    """The byte tokenizer for "bytes", else that of a file; errors as `FileTokenizer`."""
    if str(name) == BYTES:
        if end is not None:
            raise IlmCompileError(
                f"tokenizer: bytes end a document with token {ByteTokenizer.end_of_document}; "
                f"leave the piece {end!r} out"
            )
        return ByteTokenizer()
    return FileTokenizer(name, end=end)


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError as error:
            raise _not_installed(path, "tokenizers") from error
        try:
            self._fast: Any = Fast.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise IlmCompileError(f"tokenizer: cannot read {path}: {error}") from error
        # A file may carry those of the model it was made for; documents are packed whole here.
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size: int = self._fast.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.encode_spans(text)[0]

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        found = self._fast.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def token_id(self, piece: str) -> int | None:
        found: int | None = self._fast.token_to_id(piece)
        return found


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise _not_installed(path, "sentencepiece") from error
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise IlmCompileError(
                f"tokenizer: {path} is not a SentencePiece model: {error}"
            ) from error
        self.vocab_size: int = self._model.get_piece_size()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def token_id(self, piece: str) -> int | None:
        found: int = self._model.piece_to_id(piece)
        return None if found == self._model.unk_id() else found


_READERS: dict[str, type[_HuggingFace] | type[_SentencePiece]] = {
    ".json": _HuggingFace,
    ".model": _SentencePiece,
}


def _not_installed(path: Path, package: str) -> IlmCompileError:
    return IlmCompileError(
        f"tokenizer: {path} needs the package {package}, which is not installed; "
        f"pip install {package}, or use the tokenizer {BYTES!r}"
    )
