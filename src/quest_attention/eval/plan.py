"""`Plan`: what an evaluation measures: tasks, methods, budgets, lengths and how many samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.eval.frame import Chat
from quest_attention.eval.longbench import LONGBENCH
from quest_attention.eval.methods import Full, Method, make_method
from quest_attention.eval.tasks import CONTINUATION, GRID, PERPLEXITY, RECALL, TASKS

__all__ = ["GRID_DEPTHS", "Arm", "Job", "Plan", "Question", "Shapes", "Work", "divide", "task_names"]

Question = Literal["decode", "prefill"]
Shapes = Sequence[Hashable] | None
GRID_DEPTHS = tuple(depth / 10 for depth in range(11))


def task_names() -> tuple[str, ...]:
    """Everything that can be evaluated."""
    return (*TASKS, GRID, PERPLEXITY, CONTINUATION, RECALL, *LONGBENCH)


@dataclass(frozen=True)
class Arm:
    """A method with a budget.

    Attributes:
        method: As it was asked for, options included.
        token_budget: None for full attention [tokens].
    """

    method: str
    token_budget: int | None


@dataclass(frozen=True)
class Job:
    """One sample, which every arm answers.

    Attributes:
        task: Name of the task.
        length: Context, question and answer together [tokens].
        index: Number of the sample.
    """

    task: str
    length: int
    index: int


@dataclass(frozen=True)
class Work:
    """What one process measures in one go.

    Attributes:
        jobs: Samples of one task and length, as one batch.
        arms: Methods that answer each of them.
    """

    jobs: tuple[Job, ...]
    arms: tuple[Arm, ...]


def divide(
    jobs: Iterable[tuple[Job, Sequence[Arm]]], size_of: Callable[[Job], int], shapes: Shapes = None
) -> list[Work]:
    """Put samples and the arms that are to answer them together as they are best measured.

    The arms of a sample share its context, so they stay together. Those of perplexity share nothing and take thousands
    of steps each: every arm is work of its own. That comes first, so that no process starts with it when the others
    are done.

    Args:
        jobs: Samples, each with its arms.
        size_of: Most samples in a batch with this one [sequences].
        shapes: Of each sample, in order: those alike can be one batch. None: each is one of its own.
    """
    alike: dict[Hashable, list[tuple[Job, tuple[Arm, ...]]]] = {}
    for index, (job, arms) in enumerate(jobs):
        shape = index if shapes is None else shapes[index]
        for some in [(arm,) for arm in arms] if job.task == PERPLEXITY else [tuple(arms)]:
            alike.setdefault((job.task, job.length, shape, some), []).append((job, some))
    works = [
        Work(tuple(job for job, _ in group[start : start + size]), group[0][1])
        for group in alike.values()
        for size in [size_of(group[0][0])]
        for start in range(0, len(group), size)
    ]
    long = [work for work in works if work.jobs[0].task == PERPLEXITY]
    long.sort(key=lambda work: work.jobs[0].length - (work.arms[0].token_budget or work.jobs[0].length), reverse=True)
    others = [work for work in works if work.jobs[0].task != PERPLEXITY]
    return long + sorted(others, key=lambda work: work.jobs[0].index)  # interrupted, a run has as many of each


@dataclass(frozen=True)
class Plan:
    """What is measured. Validated when made.

    Args:
        tasks: Names from `task_names`.
        methods: As `make_method` takes them.
        token_budgets: Numbers of tokens, or shares of the length such as `"1/16"`.
        lengths: Context, question and answer together [tokens].
        num_samples: For each task and length; perplexity takes one a book, as far as there are books.
        num_dense_layers: Leading full-attention layers that read everything, for every method [layers].
        page_size: Tokens per page [tokens].
        question: Whether the question is decoded or prefilled with the context.
        chat: Whether questions go through the tokenizer's chat template.
        least_full: Where full attention is right in fewer of the answers to a task, other methods are not asked [%].
        seed: Everything random follows from it.
        backend: Of Quest's verbs.
        books: Folder of texts; the excerpt of the package by default.
        longbench: Folder of LongBench's files.

    Raises:
        QuestValueError: A task, a method or a budget is not known or not possible.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    token_budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    num_samples: int = 200
    num_dense_layers: int = 2
    page_size: int = 16
    question: Question = "decode"
    chat: Chat = "auto"
    least_full: int = 0
    seed: int = 0
    backend: str = "auto"
    books: Path | None = None
    longbench: Path | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "lengths"):
            if not getattr(self, name):
                raise QuestValueError(name.removesuffix("s"), "nothing", "at least one")
        for task in self.tasks:
            if task not in task_names():
                raise QuestValueError("task", task, f"one of {', '.join(task_names())}")
            if task in LONGBENCH and self.longbench is None:
                raise QuestValueError("longbench", None, f"the folder with LongBench's files, for {task}")
        self._check_each_once()
        # Also where no method is Quest: what all methods share is wrong for all of them.
        QuestConfig.paper(max(1, self.page_size), page_size=self.page_size, num_dense_layers=self.num_dense_layers)
        if self.num_samples < 1:
            raise QuestValueError("num_samples", self.num_samples, "a positive integer")
        self._check_options()
        for task in self.tasks:
            for length in self.lengths:
                if not self.arms(task, length):
                    raise QuestValueError("method", ", ".join(self.methods), f"quest or an oracle, for {task}")

    def _check_options(self) -> None:
        if not 0 <= self.least_full <= 100:
            raise QuestValueError("least_full", self.least_full, "a percentage from 0 to 100")
        if self.least_full and Full.name not in self.methods:
            raise QuestValueError("least_full", self.least_full, "0 where full is not among the methods")
        if self.question not in get_args(Question):
            raise QuestValueError("question", self.question, f"one of {', '.join(get_args(Question))}")
        if self.chat not in get_args(Chat):
            raise QuestValueError("chat", self.chat, f"one of {', '.join(get_args(Chat))}")

    def _check_each_once(self) -> None:
        for name in ("methods", "lengths"):
            for given in (values := getattr(self, name)):
                if values.count(given) > 1:
                    raise QuestValueError(name.removesuffix("s"), given, "each once")

    def arms(self, task: str, length: int) -> list[Arm]:
        """Methods with their budgets, for samples of a task and a length; recall is of those that select.

        Raises:
            QuestValueError: A method is unknown, or a budget is no number or leaves nothing to leave out.
        """
        arms = []
        for spec in self.methods:
            if spec == Full.name:
                arms.append(Arm(spec, None))
                continue
            if not self.token_budgets:
                raise QuestValueError("token_budget", "nothing", f"at least one, for {spec}")
            arms += [Arm(spec, self._budget(given, length)) for given in self.token_budgets]
        methods = {arm: self.method(arm) for arm in arms}
        first: dict[object, str] = {}
        for arm, method in methods.items():
            same = first.setdefault((type(method), method.token_budget, getattr(method, "config", None)), arm.method)
            if same != arm.method:
                raise QuestValueError("method", arm.method, f"methods that differ: it is {same}")
        return [arm for arm, method in methods.items() if task != RECALL or method.unit is not None]

    def method(self, arm: Arm) -> Method:
        """The method of an arm."""
        return make_method(
            arm.method,
            token_budget=arm.token_budget or self.page_size,
            num_dense_layers=self.num_dense_layers,
            page_size=self.page_size,
            backend=self.backend,
        )

    def jobs(self, num_books: int) -> Iterator[Job]:
        """Every sample, those of one index side by side, so that an interrupted run has the same number of each."""
        for index in range(self.num_samples):
            for task in self.tasks:
                if task == PERPLEXITY and index >= num_books:
                    continue
                for length in self.lengths:
                    yield Job(task, length, index)

    def _budget(self, given: str, length: int) -> int:
        """A budget in tokens; a share is rounded down to whole pages."""
        top, slash, bottom = given.partition("/")
        if not top.isdecimal() or (slash and not (bottom.isdecimal() and int(bottom))):
            raise QuestValueError("token_budget", given, "a number of tokens, or a share of the length such as 1/16")
        budget = length * int(top) // int(bottom) // self.page_size * self.page_size if slash else int(top)
        if budget < 1:
            raise QuestValueError("token_budget", given, f"at least a page of {self.page_size} of {length} tokens")
        if budget >= length:
            raise QuestValueError("token_budget", given, f"less than the length, {length}: else all is read")
        return budget
