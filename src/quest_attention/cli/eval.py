"""`quest eval` and `quest report`: measure methods on tasks, and show what was found."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Any, cast

from quest_attention.bench.record import describe_machine
from quest_attention.cli.console import progress_bar, say, stdout_console
from quest_attention.cli.loading import LoadedModel, check_dtype, load_model, resolve_device, set_threads
from quest_attention.cli.pace import Pace
from quest_attention.cli.table import ANY_WIDTH, print_table
from quest_attention.config import Backend, QuestConfig
from quest_attention.errors import BackendError, QuestValueError
from quest_attention.eval.dense_layers import check_dense_layers
from quest_attention.eval.journal import Journal
from quest_attention.eval.longbench import LONGBENCH, document_file
from quest_attention.eval.methods import Quest
from quest_attention.eval.plan import Arm, Job, Plan
from quest_attention.eval.pool import run_jobs
from quest_attention.eval.report import (
    accuracy_rows,
    continuation_rows,
    perplexity_rows,
    read_results,
    recall_rows,
    write_report,
)
from quest_attention.eval.rounds import make_rounds
from quest_attention.eval.run_folder import hold_folder
from quest_attention.eval.runner import Runner
from quest_attention.eval.texts import book_files
from quest_attention.eval.wording import counted
from quest_attention.ops.dispatch import resolve_backend

__all__ = ["evaluate", "report"]

_AT_MOST = "; fewer where full attention cannot do a task"
"""Behind how many answers are to make, with `--least-full`."""
_OWN_DTYPE = "auto"
"""Of `--dtype`: what the model and the device call for."""
_SHARE_READ = (
    "share read is the tokens attended to, of those held. What Quest reads to choose them is not in it: metadata of "
    "every page and, where keys rank candidates, the keys of those (docs/evaluation.md)."
)


def evaluate(
    plan: Plan, output: Path, *, model_name: str | None, device: str, dtype: str, threads: int | None, workers: int,
    is_quiet: bool,
) -> None:  # fmt: skip
    """Do what `quest eval` does.

    Raises:
        QuestValueError: An option is wrong, also for this model, or another run writes to the folder.
        BackendError: The backend cannot run on the device.
        UnsupportedModelError: Quest cannot serve the model.
        QuestStateError: A method did not take its sparse path, or an answer could not be written.
    """
    set_threads(threads)
    _check(plan, device, dtype)
    with hold_folder(output), progress_bar(is_quiet=is_quiet) as on_progress:
        on_progress("loading the model", 0, 0)
        loaded = load_model(model_name, device=device, dtype=dtype)
        _check_layers(plan, loaded)
        runner = Runner(loaded.model, loaded.tokenizer, plan)
        on_progress("reading the texts", 0, 0)
        jobs = runner.jobs
        journal = Journal(output, _settings(runner, loaded, output, model_name, dtype))
        open_jobs = [(job, arms) for job in jobs if (arms := journal.missing(job, plan.arms(job.task, job.length)))]
        total = sum(len(plan.arms(job.task, job.length)) for job in jobs)
        done = total - sum(len(arms) for _, arms in open_jobs)
        if not is_quiet:
            say(f"quest: {_to_do(open_jobs, done, total, output)}{_AT_MOST if plan.least_full else ''}")
        make = functools.partial(_make_runner, plan, model_name, device, dtype)
        what = plan.tasks[0] if len(plan.tasks) == 1 else f"{len(plan.tasks)} tasks"
        on_progress(what, done, total)
        # An answer takes longer the longer its text is.
        pace = Pace(sum(job.length * len(arms) for job, arms in open_jobs), skips_first=workers > 1)
        rounds = make_rounds(plan, open_jobs, output, say if not is_quiet else lambda _: None)
        with contextlib.closing(run_jobs(runner, rounds, workers=workers, make_runner=make)) as measured:
            amount = 0
            for rows, is_batch_done in measured:
                journal.add(rows)
                done += len(rows)
                amount += sum(row["length"] for row in rows)
                on_progress(what, done, total)
                if not is_batch_done:
                    continue
                left, amount = pace.take(amount), 0
                if left is not None and not is_quiet:
                    say(f"quest: {done} of {total} answers are made; the others take about {left} at this pace")
    if not is_quiet:
        _show(output)


def report(folder: Path) -> None:
    """Do what `quest report` does.

    Raises:
        QuestValueError: There is no run in the folder.
    """
    page = write_report(folder)
    _show(folder)
    say(f"quest: the report is {page}")


def _check(plan: Plan, device: str, dtype: str) -> None:
    """Refuse what can be known to be wrong before a model is loaded.

    Raises:
        QuestValueError: There is no such device, dtype, book or file.
        BackendError: A backend cannot run on the device.
    """
    target = resolve_device(device)
    check_dtype(dtype)
    resolve_backend(cast("Backend", plan.backend), target)
    for arm in plan.arms(plan.tasks[0], plan.lengths[0]):
        method = plan.method(arm)
        if isinstance(method, Quest) and method.config.backend != plan.backend:
            try:
                resolve_backend(method.config.backend, target)
            except BackendError as error:
                why = str(error).partition("expected ")[2]
                raise QuestValueError("method", arm.method, f"another backend: {why}") from None
    if plan.books is not None:
        book_files(plan.books)
    for task in plan.tasks:
        if task in LONGBENCH and plan.longbench is not None:
            document_file(task, plan.longbench)


def _check_layers(plan: Plan, loaded: LoadedModel) -> None:
    """Refuse dense layers that leave a method none to choose in: it would be full attention by another name.

    Raises:
        QuestValueError: As said.
    """
    for arm in plan.arms(plan.tasks[0], plan.lengths[0]):
        method = plan.method(arm)
        if arm.token_budget is None:
            continue
        config = method.config if isinstance(method, Quest) else QuestConfig(num_dense_layers=plan.num_dense_layers)
        try:
            check_dense_layers(loaded.model, config)
        except QuestValueError as error:
            if config.num_dense_layers == plan.num_dense_layers:
                raise
            expected = str(error).partition("expected ")[2]
            raise QuestValueError("method", arm.method, f"num_dense_layers {expected}") from None


def _to_do(open_jobs: list[tuple[Job, list[Arm]]], done: int, total: int, output: Path) -> str:
    """How much there is to do, and how much is done."""
    if done == total:
        return f"all {counted(total, 'answer')} are in {output} already"
    made = f"{done:,} of {total:,} answers are in {output} already; " if done else ""
    samples = counted(len(open_jobs), "sample")
    return f"{made}{counted(total - done, 'answer')} to make, for {samples} by {_arms_of(open_jobs)}"


def _arms_of(open_jobs: list[tuple[Job, list[Arm]]]) -> str:
    arms = dict.fromkeys((arm.method, arm.token_budget) for _, some in open_jobs for arm in some)
    methods = dict.fromkeys(method for method, _ in arms)
    return counted(len(methods), "method") + (f" ({len(arms)} with their budgets)" if len(arms) > len(methods) else "")


def _make_runner(plan: Plan, model_name: str | None, device: str, dtype: str) -> Runner:
    loaded = load_model(model_name, device=device, dtype=dtype)
    return Runner(loaded.model, loaded.tokenizer, plan)


def _settings(runner: Runner, loaded: LoadedModel, output: Path, model_name: str | None, dtype: str) -> dict[str, Any]:
    """What a run shares, ready for JSON: enough to make it again."""
    plan = runner.plan
    options = dataclasses.asdict(plan)
    options["chat"] = "yes" if runner.frame.is_chat else "no"  # what `auto` came to
    options["books"] = None if plan.books is None else plan.books.name  # a name, not a place on one machine
    options["longbench"] = None if plan.longbench is None else plan.longbench.name
    return {
        "model": loaded.name,
        "description": loaded.description,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        **options,
        "command": _command(plan, output, model_name, dtype),
        "machine": describe_machine(),
    }


def _command(plan: Plan, output: Path, model_name: str | None, dtype: str) -> str:
    """The command that makes the run again, with names where it has places on one machine."""
    options: dict[str, object] = {
        "--output": output.name,
        "--model": model_name and Path(model_name).name,
        "--method": ",".join(plan.methods),
        "--token-budget": ",".join(plan.token_budgets) or None,
        "--length": ",".join(map(str, plan.lengths)),
        "--num-samples": plan.num_samples,
        "--dense-layers": plan.num_dense_layers,
        "--page-size": plan.page_size,
        "--question": plan.question,
        "--chat": plan.chat,
        "--least-full": plan.least_full or None,
        "--seed": plan.seed,
        "--backend": plan.backend,
        "--books": plan.books and plan.books.name,
        "--longbench": plan.longbench and plan.longbench.name,
        "--dtype": None if dtype == _OWN_DTYPE else dtype,
    }
    given = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    return shlex.join(["quest", "eval", *plan.tasks, *given])


def _show(folder: Path) -> None:
    """Print what a folder holds, a table for each kind of task."""
    results = read_results(folder)
    console = stdout_console()
    if not console.is_terminal:
        console.width = ANY_WIDTH  # a file or a pipe has none of its own
    tables = (accuracy_rows(results), perplexity_rows(results), continuation_rows(results), recall_rows(results))
    for rows in tables:
        if rows:
            print_table(console, rows[0], rows[1:])
            console.print()
    methods = [cell.method for cells in (results.accuracy, results.perplexity, results.continuation) for cell in cells]
    if any(method.startswith(Quest.name) for method in methods):
        console.print(_SHARE_READ, style="dim", highlight=False)
