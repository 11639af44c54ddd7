"""Measure samples of a plan with every arm: `measure` gives a row for each, ready for JSON."""

from __future__ import annotations

import random
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.eval.context import PREFILL_CHUNK, Context, read_context
from quest_attention.eval.continuation import follow_text, next_tokens
from quest_attention.eval.decode import decode_answers
from quest_attention.eval.frame import Frame, chat_frame, plain_frame, turn_end
from quest_attention.eval.longbench import LONGBENCH, Document, load_documents, score
from quest_attention.eval.methods import LayerReads, Method
from quest_attention.eval.perplexity import BUCKET, predict_tokens
from quest_attention.eval.plan import GRID_DEPTHS, Job, Plan, Work
from quest_attention.eval.recall import measure_recall
from quest_attention.eval.tasks import CONTINUATION, GRID, PERPLEXITY, RECALL, Sample, is_correct, make_sample
from quest_attention.eval.texts import Texts, load_texts
from quest_attention.hf import layer_kinds

__all__ = ["CONTINUATION_STEPS", "RECALL_STEPS", "Runner"]

RECALL_STEPS = 32
"""Tokens of a text that are decoded to measure recall [steps]."""
CONTINUATION_STEPS = 128
"""Tokens at the end of a stretch that are predicted one by one [steps]."""
_TAIL = 8
"""What is decoded of a sample is its question and so many tokens before it that all is a multiple of this: samples
whose questions differ by little can then be one batch [tokens]."""
_FROM_BOOKS = (PERPLEXITY, CONTINUATION, RECALL)
"""Tasks that are made of nothing but a text."""
_GPU_PASS = 1 << 14
"""Tokens of all sequences per forward pass of a prefill on a GPU, where launches cost more than memory. The mask of a
pass has a row for each of them, as wide as the context."""
_GPU_BATCH = 64
"""Samples measured as one batch on a GPU, where a step of many takes as long as a step of one [sequences]."""
_GPU_BYTES = 15 << 28
"""Their keys and values together, which are in memory once for all methods and once for the one at work: 3.75 GiB, so
that five runs fit side by side on a GPU of 80 GB, which one alone does not keep busy [bytes]."""
_SPARE = 64
"""Tokens more of a book than a sample has, so that none is too short after a start token."""


@dataclass
class Runner:
    """A model with what its samples are made from.

    Attributes:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        plan: What is measured.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    _loaded: dict[tuple[str, int], list[Document]] = field(default_factory=dict, init=False, repr=False)

    def encode(self, text: str) -> list[int]:
        """Text to token ids, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    @cached_property
    def frame(self) -> Frame:
        """What stands around a context and its question.

        Raises:
            QuestValueError: A chat was asked for, and the tokenizer has no template for one.
        """
        return chat_frame(self.tokenizer, self.plan.chat)

    @cached_property
    def start(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text."""
        return plain_frame(self.tokenizer).head

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Token ids that end an answer: the tokenizer's, those of the model's generation settings, and of a turn."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        turn = turn_end(self.tokenizer) if self.frame.is_chat else None
        found = [self.tokenizer.eos_token_id, turn, *(own if isinstance(own, list) else [own])]
        return frozenset(token for token in found if token is not None)

    @cached_property
    def texts(self) -> Texts:
        """The books."""
        return load_texts(self.plan.books, self.encode)

    @cached_property
    def jobs(self) -> list[Job]:
        """Every sample of the plan that there is text for.

        Raises:
            QuestValueError: A length is more than the model's positions or than every text, or too short for what is
            measured.
        """
        text = self.model.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        for length in self.plan.lengths:
            if positions is not None and length > positions:
                raise QuestValueError("length", length, f"at most {positions}, the model's positions")
            self._check_room(length)
        if not set(_FROM_BOOKS).isdisjoint(self.plan.tasks):
            self.texts.at_least(max(self.plan.lengths))
        jobs = []
        for job in self.plan.jobs(len(self.texts.names)):
            if job.task in LONGBENCH and job.index >= len(self._documents(job.task, job.length)):
                continue
            if job.task == PERPLEXITY and job.index >= len(self.texts.at_least(job.length).names):
                continue
            jobs.append(job)
        return jobs

    def _check_room(self, length: int) -> None:
        """Refuse a length that leaves too little before the tokens that are decoded: budgets must leave something out.

        Raises:
            QuestValueError: As said.
        """
        for task, steps in ((CONTINUATION, CONTINUATION_STEPS), (RECALL, RECALL_STEPS)):
            if task not in self.plan.tasks:
                continue
            budgets = [arm.token_budget or 0 for arm in self.plan.arms(task, length)]
            least = max(budgets) + steps + len(self.start) + 1
            if length <= least:
                expected = f"more than {least} for {task}: its last {steps} tokens are decoded, past the largest budget"
                raise QuestValueError("length", length, expected)

    @property
    def is_batched(self) -> bool:
        """Whether samples are measured in batches."""
        return self.model.device.type == "cuda"

    def batch_size(self, job: Job) -> int:
        """Most samples in a batch with this one [sequences]."""
        if not self.is_batched:
            return 1
        return _GPU_BATCH if job.task == PERPLEXITY else max(1, min(_GPU_BATCH, self._tokens_held // job.length))

    @cached_property
    def _tokens_held(self) -> int:
        """Tokens whose keys and values are held at a time on a GPU [tokens]."""
        text = self.model.config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        kinds = layer_kinds(self.model.config, QuestConfig()).values()
        layers = sum(kind in {"quest", "dense"} for kind in kinds)  # others hold a window or a state
        vectors = 2 * max(1, layers) * (getattr(text, "num_key_value_heads", None) or heads)
        return int(_GPU_BYTES // (vectors * dim * self.model.dtype.itemsize))

    def shape(self, job: Job) -> Hashable:
        """What samples of a task and length must have in common to be one batch: methods take no padding."""
        if job.task in _FROM_BOOKS:
            return None  # as many tokens as the length says
        if job.task in LONGBENCH:
            return job.index
        sample = self._sample(job)
        return len(sample.context_ids) + len(sample.question_ids), self._tail(sample)

    def measure(self, work: Work) -> Iterator[dict[str, Any]]:
        """A row for each sample and arm. Where a batch finds too little memory, its halves answer the arms left over.

        The rows of an arm, one for each sample, are made together: by that it is known which arms have answered.

        Raises:
            QuestStateError: A method did not take its sparse path, or read more than its budget.
            torch.OutOfMemoryError: There is too little memory for a single sample.
        """
        measures = {PERPLEXITY: self._perplexity, CONTINUATION: self._continuation, RECALL: self._recall}
        made = 0
        try:
            for row in measures.get(work.jobs[0].task, self._retrieval)(work):
                made += 1
                yield row
        except torch.OutOfMemoryError:
            if len(work.jobs) == 1:
                raise
        # What a failed batch held is free again, now that the block is left.
        assert made % len(work.jobs) == 0, "the rows of an arm are made together"
        left = work.arms[made // len(work.jobs) :]
        if not left:
            return
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(work.jobs) // 2
        yield from self.measure(Work(work.jobs[:half], left))
        yield from self.measure(Work(work.jobs[half:], left))

    def _retrieval(self, work: Work) -> Iterator[dict[str, Any]]:
        samples = [self._sample(job) for job in work.jobs]
        texts = torch.tensor([[*sample.context_ids, *sample.question_ids] for sample in samples])
        decoded_tokens = 1 if self.plan.question == "prefill" else self._tail(samples[0])
        ids, questions = texts[:, :-decoded_tokens], texts[:, -decoded_tokens:]
        methods = [self.plan.method(arm) for arm in work.arms]
        context = self._read(ids, methods)
        most = max(sample.max_new_tokens for sample in samples)
        for arm, method in zip(work.arms, methods, strict=True):
            started = time.perf_counter()
            with method.session(self.model, texts.shape[1] + most) as session:
                session.load(context)
                decoded = decode_answers(
                    self.model, session.cache, questions, most, context=ids, stop_tokens=self.stop_tokens
                )
                totals = _totals(self._check(session.reads(), method))
            seconds = round((time.perf_counter() - started) / len(samples), 4)
            for job, sample, tokens in zip(work.jobs, samples, decoded.answers, strict=True):
                text = str(self.tokenizer.decode(tokens[: sample.max_new_tokens], skip_special_tokens=True))
                yield {
                    **asdict(job),
                    **asdict(arm),
                    "score": _score(job, sample, text),
                    "answer": text,
                    "depth": sample.depths[0] if isinstance(sample, Sample) and sample.depths else None,
                    **totals,
                    "seconds": seconds,
                }

    def _perplexity(self, work: Work) -> Iterator[dict[str, Any]]:
        length = work.jobs[0].length
        books = self.texts.at_least(length)
        rest = length - len(self.start)
        tokens = torch.tensor([[*self.start, *books.tokens[job.index][:rest]] for job in work.jobs])
        for arm in work.arms:
            method = self.plan.method(arm)
            found = predict_tokens(self.model, method, tokens)
            totals = _totals(self._check(found.reads, method))
            for job, nll in zip(work.jobs, found.nll.tolist(), strict=True):
                yield {
                    **asdict(job),
                    **asdict(arm),
                    "book": books.names[job.index],
                    "bucket": BUCKET,
                    "nll": [round(value, 4) for value in nll],
                    "count": found.count,
                    **totals,
                }

    def _continuation(self, work: Work) -> Iterator[dict[str, Any]]:
        tokens = torch.tensor([self._stretch(job) for job in work.jobs])
        head, tail = tokens[:, : -CONTINUATION_STEPS - 1], tokens[:, -CONTINUATION_STEPS - 1 :]
        methods = [self.plan.method(arm) for arm in work.arms]
        context = self._read(head, methods)
        expected = next_tokens(self.model, context, tail[:, :-1].to(self.model.device))
        for arm, method in zip(work.arms, methods, strict=True):
            found = follow_text(self.model, method, context, tail, expected)
            totals = _totals(self._check(found.reads, method))
            for job, nll, agreed in zip(work.jobs, found.nll, found.agreed, strict=True):
                yield {
                    **asdict(job),
                    **asdict(arm),
                    "nll": round(nll, 4),
                    "agreed": agreed,
                    "count": found.count,
                    **totals,
                }

    def _recall(self, work: Work) -> Iterator[dict[str, Any]]:
        tokens = torch.tensor([self._stretch(job) for job in work.jobs])
        methods = [self.plan.method(arm) for arm in work.arms]
        context = self._read(tokens[:, :-RECALL_STEPS], methods)
        for arm, method in zip(work.arms, methods, strict=True):
            recalls = measure_recall(self.model, method, context, tokens[:, -RECALL_STEPS:])
            for job, found in zip(work.jobs, recalls, strict=True):
                yield {
                    **asdict(job),
                    **asdict(arm),
                    "layers": found.layers,
                    "mass": [[round(share, 5) for share in heads] for heads in found.mass],
                    "top10": [[round(share, 5) for share in heads] for heads in found.top],
                }

    def _read(self, ids: Tensor, methods: Sequence[Method]) -> Context:
        return read_context(
            self.model,
            ids,
            observe=any(method.observes for method in methods),
            num_dense_layers=self.plan.num_dense_layers,
            chunk_size=_GPU_PASS // ids.shape[0] if self.is_batched else PREFILL_CHUNK,
        )

    def _random(self, job: Job) -> random.Random:
        return random.Random(f"{self.plan.seed}/{job.task}/{job.length}/{job.index}")

    def _stretch(self, job: Job) -> list[int]:
        """Tokens of a book from a place of its own, behind the tokenizer's start."""
        length = job.length - len(self.start)
        return [*self.start, *self.texts.at_least(length).stretch(job.index, length, self._random(job))]

    def _tail(self, sample: Sample | Document) -> int:
        """Tokens at the end of a sample that are fed as decode steps, the question among them [tokens]."""
        return min(-(-len(sample.question_ids) // _TAIL) * _TAIL, len(sample.context_ids))

    def _sample(self, job: Job) -> Sample | Document:
        if job.task in LONGBENCH:
            return self._documents(job.task, job.length)[job.index]
        rng = self._random(job)
        haystack = self.texts.stretch(job.index, job.length + _SPARE, rng)
        task, depth = ("needle", GRID_DEPTHS[job.index % len(GRID_DEPTHS)]) if job.task == GRID else (job.task, None)
        return make_sample(task, self.encode, haystack, job.length, rng.getrandbits(32), depth=depth, frame=self.frame)

    def _documents(self, task: str, length: int) -> list[Document]:
        key = (task, length)
        if key not in self._loaded:  # read once for all samples
            assert self.plan.longbench is not None, "the plan was checked"
            self._loaded[key] = load_documents(task, self.plan.longbench, self.encode, length, frame=self.frame)
        return self._loaded[key]

    def _check(self, reads: list[LayerReads], method: Method) -> list[LayerReads]:
        """The layers that may choose, after seeing that they did and that they read no more than the budget.

        Raises:
            QuestStateError: They did not.
        """
        dense = self.plan.num_dense_layers if method.num_dense_layers is None else method.num_dense_layers
        kinds = layer_kinds(self.model.config, QuestConfig(num_dense_layers=dense))
        choosing = [layer for layer in reads if kinds.get(layer.layer) == "quest"]
        if method.token_budget is None:
            return choosing
        for layer in choosing:
            if not layer.is_sparse:
                raise QuestStateError(f"{method.name} took no sparse step in layer {layer.layer}")
            if layer.tokens_read > method.token_budget * layer.steps:
                raise QuestStateError(
                    f"{method.name} read {layer.tokens_read} tokens in {layer.steps} steps of layer {layer.layer}, "
                    f"more than its budget of {method.token_budget} a step"
                )
        return choosing


def _score(job: Job, sample: Sample | Document, text: str) -> float:
    if isinstance(sample, Sample):
        return float(is_correct(sample, text))
    return round(score(job.task, text, sample.answers), 6)


def _totals(reads: Sequence[LayerReads]) -> dict[str, int]:
    """Tokens read and held by the layers that may choose, and the steps in which they did, summed."""
    return {
        "tokens_read": sum(layer.tokens_read for layer in reads),
        "tokens_held": sum(layer.tokens_held for layer in reads),
        "sparse_steps": sum(layer.steps for layer in reads if layer.is_sparse),
    }


# Longer than 250 lines: the four kinds of measurement share one model, its frame and its texts.
