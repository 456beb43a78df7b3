"""Labels for conversations of which only the assistant's answers are learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.chat import Chat, Message
from ilm_compile.runtime.data.dataset import IGNORED_LABEL
from ilm_compile.runtime.data.tokenizer import Span


def label_answers(
    messages: list[Message],
    chat: Chat,
    encode: Callable[[str], tuple[Sequence[int], Sequence[Span]]],
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation and their labels, as Hugging Face's models shift them.

    A label is its own token where that belongs to an answer of the assistant, up to the end of its
    turn as the template writes it, and IGNORED_LABEL elsewhere: headings and questions are read
    and not learnt. encode: a text to its tokens and what of the text each of them spans, no special
    tokens added. Raises `IlmCompileError` if there is no answer, or if the template writes an
    earlier message otherwise once others follow it, for then nobody can say where answers lie.
    """
    text, answers = _answers(messages, chat)
    tokens, spans = encode(text)
    labels = [
        token if any(a <= start < b and start < end for a, b in answers) else IGNORED_LABEL
        for token, (start, end) in zip(tokens, spans, strict=True)
    ]
    return list(tokens), labels


def _answers(messages: list[Message], chat: Chat) -> tuple[str, list[Span]]:
    """The whole text and the spans of the answers in it."""
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not places:
        raise IlmCompileError("answers: expected a message of the assistant to learn, got none")
    try:
        text = chat.render(messages)
        pairs = [(chat.ask(messages[:i]), chat.render(messages[: i + 1])) for i in places]
    except ValueError as error:
        raise IlmCompileError(f"answers: {chat.name} refuses a conversation: {error}") from error
    for place, (before, after) in zip(places, pairs, strict=True):
        if not (text.startswith(before) and text.startswith(after)):
            raise IlmCompileError(
                f"answers: {chat.name} writes what comes before message {place} otherwise in the "
                "whole conversation, so its answers cannot be told apart; cut the conversation "
                "there, or use another template"
            )
    return text, [(len(before), len(after)) for before, after in pairs]
