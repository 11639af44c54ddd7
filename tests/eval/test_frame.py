"""What stands around a context and its question: chat templates and the tokenizer's own start."""

from __future__ import annotations

import functools

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gguf_files import CHAT_TEMPLATE
from quest_attention import QuestValueError
from quest_attention.eval.excerpt import SOUTH
from quest_attention.eval.frame import NO_FRAME, Frame, chat_frame, plain_frame, start_tokens
from quest_attention.eval.tasks import TASKS, make_sample
from quest_attention.models import bundled_model_path

LENGTH = 1024
STRIPPING = CHAT_TEMPLATE.replace("message['content']", "message['content'].strip()")


@functools.cache
def tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(bundled_model_path())
    made.chat_template = template
    return made


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def test_a_start_token_that_the_tokenizer_never_writes_is_none() -> None:
    named = AutoTokenizer.from_pretrained(bundled_model_path())
    named.bos_token = "the"
    assert named.bos_token_id is not None and start_tokens(named) == ()
    assert plain_frame(named) == NO_FRAME


def test_a_start_that_is_also_the_end_stays_and_an_end_goes() -> None:
    class Ids:
        """As much of a tokenizer as matters."""

        def __init__(self, ids: list[int], bos: int | None, eos: int) -> None:
            self.input_ids, self.bos_token_id, self.eos_token_id = ids, bos, eos

        def __call__(self, _: str) -> Ids:
            return self

    assert start_tokens(Ids([7, 8], 7, 8)) == (7,)  # type: ignore[arg-type]
    assert start_tokens(Ids([8], None, 8)) == ()  # type: ignore[arg-type]
    assert start_tokens(Ids([8], 8, 8)) == (8,)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, STRIPPING])
def test_a_template_is_taken_apart_around_what_the_user_says(template: str) -> None:
    frame = chat_frame(tokenizer(template))
    assert frame.is_chat
    assert tokenizer().decode(frame.head) == "<|im_start|>user\n"
    assert tokenizer().decode(frame.tail) == "<|im_end|>\n<|im_start|>assistant\n"
    assert chat_frame(tokenizer(template), "no") == NO_FRAME


def test_without_a_template_only_a_chat_by_name_is_refused() -> None:
    assert not chat_frame(tokenizer()).is_chat
    with pytest.raises(QuestValueError, match="chat: got 'yes', expected auto or no"):
        chat_frame(tokenizer(), "yes")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content }}{{ messages[0].content }}",
        "nothing",
        "a{{ messages[0].content }}",
    ],
)
def test_a_template_that_changes_what_the_user_says_is_refused(template: str) -> None:
    with pytest.raises(QuestValueError, match="expected no: the chat template"):
        chat_frame(tokenizer(template))


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_in_a_chat_is_the_plain_one_in_turns(task: str) -> None:
    """The frame counts in the length; the lead begins the model's turn; what is hidden and asked stays the same."""
    haystack = encode(SOUTH.text()[:30_000])
    frame = Frame(tuple(encode("<user>")), tuple(encode("<assistant>")))
    plain = make_sample(task, encode, haystack, 2 * LENGTH, 3)
    chat = make_sample(task, encode, haystack, 2 * LENGTH, 3, frame=frame)
    assert (chat.answers, chat.facts, chat.question) == (plain.answers, plain.facts, plain.question)
    assert len(chat.context_ids) + len(chat.question_ids) + chat.max_new_tokens == 2 * LENGTH
    assert tokenizer().decode(chat.context_ids).startswith("<user>")
    asked, _, lead = tokenizer().decode(chat.question_ids).partition("<assistant>")
    assert f"{asked} {lead}" == plain.question
    for position, fact in zip(chat.fact_positions, chat.facts, strict=True):
        ids = encode(fact)
        assert list(chat.context_ids[position : position + len(ids)]) == ids
