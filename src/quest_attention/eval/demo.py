"""The demonstration: one fact hidden in a real book, one question, and what each method reads to answer it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError, UnsupportedModelError
from quest_attention.eval.context import read_context
from quest_attention.eval.decode import Decoded, decode_answer
from quest_attention.eval.dense_layers import check_dense_layers
from quest_attention.eval.excerpt import SOUTH, Excerpt
from quest_attention.eval.frame import plain_frame
from quest_attention.eval.lossless import LosslessAnswer, answer_losslessly
from quest_attention.eval.methods import Full, LayerReads, Method, Quest, SlidingWindow
from quest_attention.eval.page_reads import PageReads
from quest_attention.eval.tasks import Sample, is_correct, make_sample

__all__ = [
    "TASK",
    "WARMUP_STEPS",
    "Demo",
    "DemoCase",
    "MethodResult",
    "check_case",
    "check_fits",
    "make_case",
    "run_demo",
]

TASK = "passkey"
"""The task of the Quest paper's first table, in a book instead of noise."""
WARMUP_STEPS = 1
"""First decode steps of a method left out of its timing: they allocate."""


@dataclass(frozen=True)
class DemoCase:
    """A fact hidden in a book, and a question about it.

    Attributes:
        book: Where the text is from.
        sample: The context, the question and the right answer, as token ids and text.
        length: Context, question and answer together [tokens].
        fact_stop: Index in the context after the last token of the fact.
    """

    book: Excerpt
    sample: Sample
    length: int
    fact_stop: int

    @property
    def fact_start(self) -> int:
        """Index in the context of the first token of the fact."""
        return self.sample.fact_positions[0]

    @property
    def fact_tokens(self) -> range:
        """Indices in the context of the tokens of the fact."""
        return range(self.fact_start, self.fact_stop)

    def fact_pages(self, page_size: int) -> range:
        """Pages that hold a token of the fact."""
        return range(self.fact_start // page_size, (self.fact_stop - 1) // page_size + 1)


@dataclass(frozen=True)
class MethodResult:
    """How one method answered. Every number was measured.

    Attributes:
        method: Its name.
        answer: What the model wrote.
        is_right: Whether that is the expected answer.
        tokens_per_step: Read by a decode step in a layer where the method may choose, per KV head, mean [tokens]. Of
            lossless decoding for a token of the answer, by drafts and checks together.
        share_read: Share of the KV cache read in those layers, 0 to 1.
        share_read_all_layers: The same over all layers, the dense ones included.
        ms_per_token: Median time of a decode step [ms]; of lossless decoding the time of the answer over its tokens.
        timed_steps: Decode steps that median is of [steps].
        sparse_layer_steps: Steps in which a layer could read less than everything, summed over layers [layer steps].
    """

    method: str
    answer: str
    is_right: bool
    tokens_per_step: float
    share_read: float
    share_read_all_layers: float
    ms_per_token: float
    timed_steps: int
    sparse_layer_steps: int


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes:
        case: What was asked.
        config: What Quest read.
        results: One per method: full, quest, sliding window; and lossless, where the model can take drafts back.
        pages: How much of which pages Quest read while it wrote the answer.
        without_lossless: Why there is no result of lossless decoding; None where there is one.
    """

    case: DemoCase
    config: QuestConfig
    results: tuple[MethodResult, ...]
    pages: PageReads
    without_lossless: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, ready for JSON."""
        case, fact_pages = self.case, list(self.case.fact_pages(self.config.page_size))
        return {
            "book": str(case.book),
            "length": case.length,
            "fact": {
                "text": case.sample.facts[0].strip(),
                "tokens": [case.fact_start, case.fact_stop],
                "pages": fact_pages,
                "answer_steps_that_read_it": self.pages.steps_reading(case.fact_tokens),
            },
            "question": case.sample.question.strip(),
            "expected": case.sample.answers[0],
            "config": asdict(self.config),
            "results": [asdict(result) for result in self.results],
            "without_lossless": self.without_lossless,
            "page_reads": self.pages.to_dict(),
        }


def make_case(
    tokenizer: PreTrainedTokenizerBase, *, length: int, depth: float, seed: int, book: Excerpt = SOUTH
) -> DemoCase:
    """Hide a pass key in a book.

    Args:
        tokenizer: Of the model that will be asked.
        length: Context, question and answer together [tokens].
        depth: Where to hide the fact, from 0, the start, to 100, the end [%].
        seed: Chooses the key.
        book: The text to hide it in.

    Raises:
        QuestValueError: The depth is out of range, or the length too short for the fact or longer than the text.
    """
    _check_depth(depth)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    haystack = encode(book.text())
    if length > len(haystack):
        raise QuestValueError("length", length, f"at most {len(haystack)}: the text from {book} ends there")
    frame = plain_frame(tokenizer)
    sample = make_sample(TASK, encode, haystack, length, seed, depth=depth / 100, frame=frame)
    return DemoCase(book, sample, length, sample.fact_positions[0] + len(encode(sample.facts[0])))


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: DemoCase,
    config: QuestConfig,
    *,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Demo:
    """Prefill the context once, then let each method answer the question from a copy of the cache.

    Args:
        model: Loaded with `attn_implementation="sdpa"`.
        tokenizer: Its tokenizer.
        case: From `make_case`.
        config: What Quest reads; the sliding window reads as many tokens, with as many dense layers. Metadata "auto"
            is resolved for the model's device, and the result's `config` says what it is.
        on_progress: Called with what is being done, how much is done and how much there is.

    Raises:
        QuestValueError: The question is longer than the model's positions, or leaves Quest nothing to leave out.
        UnsupportedModelError: Quest cannot serve the model.
    """
    config = config.resolved(model.device.type)
    check_fits(model, case.length, config)
    pages = PageReads(config.page_size)
    methods: list[Method] = [
        Full(),
        Quest(config, on_select=pages.record),
        SlidingWindow(config.token_budget, config.num_dense_layers),
    ]
    tokens = case.sample.context_ids
    context = read_context(model, tokens, on_progress=lambda done: on_progress("reading the book", done, len(tokens)))
    results = []
    for number, method in enumerate(methods):
        on_progress(f"answering: {method.name}", number, len(methods))
        with method.session(model, case.length) as session:
            session.load(context)
            decoded = decode_answer(
                model,
                session.cache,
                case.sample.question_ids,
                case.sample.max_new_tokens,
                context=tokens,
                stop_tokens=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
                on_answer=pages.clear if isinstance(method, Quest) else None,  # the others record none
            )
            results.append(_result(method.name, tokenizer, case, decoded, session.reads()))
    on_progress("answering: lossless", len(methods), len(methods) + 1)
    stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    try:
        answer = answer_losslessly(
            model, context, tokens, case.sample.question_ids, config, case.sample.max_new_tokens, stop_tokens=stop
        )
    except UnsupportedModelError as error:
        return Demo(case, config, tuple(results), pages, str(error))
    return Demo(case, config, (*results, _lossless_result(tokenizer, case, answer)), pages)


def check_case(length: int, depth: float, config: QuestConfig) -> None:
    """Refuse what is wrong for every model, before there is one.

    Raises:
        QuestValueError: The length is not positive, the depth no percentage, or the budget holds the whole length.
    """
    _check_depth(depth)
    _check_length(length, config)


def _check_length(length: int, config: QuestConfig) -> None:
    if length < 1:
        raise QuestValueError("length", length, "a positive integer")
    if config.token_budget >= length:
        raise QuestValueError("token_budget", config.token_budget, f"less than the length, {length}: else all is read")


def _check_depth(depth: float) -> None:
    if not 0 <= depth <= 100:
        raise QuestValueError("depth", depth, "a percentage from 0 to 100")


def check_fits(model: PreTrainedModel, length: int, config: QuestConfig) -> None:
    """Refuse a length that the model has no positions for, and settings under which Quest would read everything.

    Raises:
        QuestValueError: As said.
    """
    _check_length(length, config)
    text = model.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise QuestValueError("length", length, f"at most {positions}, the model's positions")
    check_dense_layers(model, config)


def _result(
    name: str, tokenizer: PreTrainedTokenizerBase, case: DemoCase, decoded: Decoded, reads: list[LayerReads]
) -> MethodResult:
    text = str(tokenizer.decode(decoded.tokens))
    sparse = [layer for layer in reads if layer.is_sparse]
    choosing = sparse or reads
    timed = decoded.step_seconds[WARMUP_STEPS:]
    return MethodResult(
        method=name,
        answer=_first_sentence(text),
        is_right=is_correct(case.sample, text),
        tokens_per_step=_total(choosing, "tokens_read") / max(1, _total(choosing, "steps")),
        share_read=_total(choosing, "tokens_read") / max(1, _total(choosing, "tokens_held")),
        share_read_all_layers=_total(reads, "tokens_read") / max(1, _total(reads, "tokens_held")),
        ms_per_token=statistics.median(timed) * 1e3,
        timed_steps=len(timed),
        sparse_layer_steps=_total(sparse, "steps"),
    )


def _lossless_result(tokenizer: PreTrainedTokenizerBase, case: DemoCase, answer: LosslessAnswer) -> MethodResult:
    text = str(tokenizer.decode(answer.tokens))
    layers = answer.counters.layers
    choosing = [layer for layer in layers if layer.kind == "quest"]
    # The first token comes from the question's last, by a dense pass that is counted with the others.
    held = case.length * answer.new_tokens
    read = sum(layer.tokens_read for layer in choosing)
    return MethodResult(
        method="lossless",
        answer=_first_sentence(text),
        is_right=is_correct(case.sample, text),
        tokens_per_step=read / (len(choosing) * answer.new_tokens),
        share_read=read / (len(choosing) * held),
        share_read_all_layers=answer.counters.tokens_read / (len(layers) * held),
        ms_per_token=answer.seconds / answer.new_tokens * 1e3,
        timed_steps=answer.new_tokens,
        sparse_layer_steps=sum(layer.sparse_steps for layer in choosing),
    )


def _total(reads: list[LayerReads], name: str) -> int:
    return sum(getattr(layer, name) for layer in reads)


def _first_sentence(text: str) -> str:
    """What a person would take for the answer: a model goes on writing after it."""
    return re.split(r"[.\n]", text.strip(), maxsplit=1)[0]


# Longer than 250 lines: the case, how it runs and what its numbers mean are read together.
