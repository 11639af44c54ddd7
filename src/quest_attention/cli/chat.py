"""Where a turn of a chat ends."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

__all__ = ["turn_end"]

ANSWER = "quest"
"""Written into the template, to see what follows it."""


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes after an answer; None where there is no such token.

    A model trained on the template ends its answers with it. Neither its configuration nor the tokenizer need know:
    their end of text is often another, and a model that is not stopped goes on with both roles.
    """
    turns = [{"role": "user", "content": ANSWER}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # noqa: BLE001 - a template is a program: one that takes no answers may raise anything
        return None
    _, answer, after = text.rpartition(ANSWER)
    following = tokenizer(after.lstrip(), add_special_tokens=False).input_ids
    is_token = bool(answer and following) and following[0] in tokenizer.added_tokens_decoder
    return int(following[0]) if is_token else None
