"""`Frame`: what stands around a context and its question: the tokenizer's start tokens, or a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from quest_attention.errors import QuestValueError

__all__ = ["NO_FRAME", "Chat", "Frame", "chat_frame", "plain_frame", "start_tokens", "turn_end"]

Chat = Literal["auto", "yes", "no"]
"""Whether questions go through the chat template: where there is one, always, never."""
_MARK = "\N{LEFT WHITE SQUARE BRACKET}what the user says\N{RIGHT WHITE SQUARE BRACKET}"
"""Stands for the user's turn while a template is taken apart; without spaces at its ends, which templates may strip."""

_ANSWER = "quest"
"""Written into the template, to see what follows it."""


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
    # Some tokenizers end every text, and some start one with what ends it.
    ends = {tokenizer.eos_token_id} - {tokenizer.bos_token_id}
    return tuple(token for token in ids if token not in ends)


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


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes after an answer; None where there is no such token.

    A model trained on the template ends its answers with it. Neither its configuration nor the tokenizer need know:
    their end of text is often another, and a model that is not stopped goes on with both roles.
    """
    turns = [{"role": "user", "content": _ANSWER}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # noqa: BLE001 - a template is a program: one that takes no answers may raise anything
        return None
    _, answer, after = text.rpartition(_ANSWER)
    following = tokenizer(after.lstrip(), add_special_tokens=False).input_ids
    is_token = bool(answer and following) and following[0] in tokenizer.added_tokens_decoder
    return int(following[0]) if is_token else None
