"""`Frame`: what stands around a context and its question: the tokenizer's start tokens, or a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from quest_attention.errors import QuestValueError

__all__ = ["NO_FRAME", "Chat", "Frame", "chat_frame", "plain_frame", "start_tokens"]

Chat = Literal["auto", "yes", "no"]
"""Whether questions go through the chat template: where there is one, always, never."""
_MARK = "\N{LEFT WHITE SQUARE BRACKET}what the user says\N{RIGHT WHITE SQUARE BRACKET}"
"""Stands for the user's turn while a template is taken apart; without spaces at its ends, which templates may strip."""


@dataclass(frozen=True)
class Frame:
    """Token ids around a text.

    Attributes:
        head: Before the context.
        tail: Between the question and the words that the answer begins with; empty for plain text.
    """

    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether the context and the question are a user's turn."""
        return bool(self.tail)


NO_FRAME = Frame()
"""Nothing around a text."""


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that the tokenizer itself puts before a text: none for many models that have a start token."""
    ids: list[int] = tokenizer("").input_ids
    return tuple(token for token in ids if token != tokenizer.eos_token_id)


def plain_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame of plain text."""
    return Frame(start_tokens(tokenizer))


def chat_frame(tokenizer: PreTrainedTokenizerBase, chat: Chat = "auto") -> Frame:
    """The frame of a user's turn and the start of the model's, or that of plain text.

    Args:
        tokenizer: Of the model that is asked.
        chat: `"auto"` takes the template where there is one.

    Raises:
        QuestValueError: `"yes"`, and the tokenizer has no template, or one that changes what the user says.
    """
    if chat == "no" or (chat == "auto" and tokenizer.chat_template is None):
        return plain_frame(tokenizer)
    if tokenizer.chat_template is None:
        raise QuestValueError("chat", chat, "auto or no: this model's tokenizer has no chat template")
    turn = [{"role": "user", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    parts = text.split(_MARK)
    if len(parts) != 2 or not parts[1]:
        raise QuestValueError("chat", chat, "no: the chat template does not say once what the user says")
    head, tail = (tuple(tokenizer(part, add_special_tokens=False).input_ids) for part in parts)
    return Frame(head, tail)
