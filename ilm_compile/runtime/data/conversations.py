"""Conversations as rows, one a row, of which only the assistant's answers are learnt."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.answers import label_answers
from ilm_compile.runtime.data.chat import Chat
from ilm_compile.runtime.data.dataset import IGNORED_LABEL, Identity, identity_of
from ilm_compile.runtime.data.text_files import read_conversations
from ilm_compile.runtime.data.tokenizer import Tokenizer


class Conversations:
    """The conversations of JSON files as a `RowDataset`, padded at their end.

    A text ends with the tokenizer's end of a document, which is learnt too. too_long: "refuse", or
    "truncate" what goes beyond `seq_len`. A conversation with no answer in its row is left out.
    num_cut, num_left_out: how many those are. vocab_size: of the model. Raises `IlmCompileError`
    naming the file and line of a conversation that cannot be used, or if none is left.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        tokenizer: Tokenizer,
        chat: Chat,
        seq_len: int,
        vocab_size: int,
        too_long: str = "refuse",
    ) -> None:
        self.num_cut = self.num_left_out = 0
        self._seq_len, self._padding = seq_len, tokenizer.padding
        self._tokens, self._labels, self._starts = array("i"), array("i"), [0]
        for messages, source in read_conversations(paths):
            try:
                tokens, labels = label_answers(messages, chat, tokenizer.encode_spans)
            except IlmCompileError as error:
                raise IlmCompileError(f"{source}: {error}") from error
            end = tokenizer.end_of_document
            if end not in tokens[-2:]:  # a template ends a turn with it, and maybe a line
                tokens, labels = [*tokens, end], [*labels, end]
            if max(tokens) >= vocab_size:
                raise IlmCompileError(
                    f"{source}: the tokenizer gives {max(tokens)}, expected tokens below the "
                    f"model's {vocab_size}; give the tokenizer that the model was made with"
                )
            if len(tokens) > seq_len and too_long == "refuse":
                raise IlmCompileError(
                    f"{source}: the conversation has {len(tokens)} tokens, a row {seq_len}; raise "
                    "data.seq_len, or cut such ones by data.long_documents = 'truncate'"
                )
            self._add(tokens, labels)
        if not len(self):
            raise IlmCompileError(
                f"conversations: expected one with an answer in its first {seq_len} tokens in "
                f"{', '.join(map(str, paths))[:200]}, got none of {self.num_left_out}; raise "
                "data.seq_len or give more"
            )

    def _add(self, tokens: list[int], labels: list[int]) -> None:
        following = [*labels[1:], IGNORED_LABEL][: self._seq_len]
        if all(label == IGNORED_LABEL for label in following):
            self.num_left_out += 1
            return
        self.num_cut += len(tokens) > self._seq_len
        self._tokens.extend(tokens[: self._seq_len])
        self._labels.extend(following)
        self._starts.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        num_rows = len(rows)
        return {
            "input_ids": self._stacked(self._tokens, rows, self._padding),
            "labels": self._stacked(self._labels, rows, IGNORED_LABEL),
            "position_ids": torch.arange(self._seq_len).repeat(num_rows, 1),
            "cu_seqlens": torch.tensor([[0, self._seq_len]] * num_rows, dtype=torch.int32),
        }

    def _stacked(self, values: array[int], rows: Tensor, filling: int) -> Tensor:
        stacked = torch.full((len(rows), self._seq_len), filling)
        for index, row in enumerate(rows.tolist()):
            start, stop = self._starts[row : row + 2]
            stacked[index, : stop - start] = torch.tensor(values[start:stop])
        return stacked

    def identity(self) -> Identity:
        digest = hashlib.sha256(np.array(self._starts).tobytes())
        for values in (self._tokens, self._labels):
            digest.update(values)
        return identity_of("conversations", self, self._seq_len, digest.hexdigest())
