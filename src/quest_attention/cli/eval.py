"""`quest eval` and `quest report`: measure methods on tasks, and show what was found."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Any

from rich.table import Table

from quest_attention.bench.record import describe_machine
from quest_attention.cli.console import progress_bar, say, stdout_console
from quest_attention.cli.loading import LoadedModel, load_model, set_threads
from quest_attention.eval.journal import Journal
from quest_attention.eval.plan import Plan
from quest_attention.eval.pool import run_jobs
from quest_attention.eval.report import (
    accuracy_rows,
    perplexity_rows,
    read_results,
    recall_rows,
    write_report,
)
from quest_attention.eval.runner import Runner

__all__ = ["evaluate", "report"]

_OWN_DTYPE = "auto"
"""Of `--dtype`: what the model and the device call for."""
_FILE_WIDTH = 120
"""Width of tables in a file or a pipe, which have none of their own [characters]."""


def evaluate(
    plan: Plan,
    output: Path,
    *,
    model_name: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    workers: int,
) -> None:
    """Do what `quest eval` does.

    Raises:
        QuestValueError: An option is wrong, also for this model.
        UnsupportedModelError: Quest cannot serve the model.
        QuestStateError: A method did not take its sparse path.
    """
    set_threads(threads)
    with progress_bar() as on_progress:
        on_progress("loading the model", 0, 0)
        loaded = load_model(model_name, device=device, dtype=dtype)
        runner = Runner(loaded.model, loaded.tokenizer, plan)
        on_progress("reading the texts", 0, 0)
        jobs = runner.jobs
        journal = Journal(output, _settings(runner, loaded, output, model_name, dtype))
        open_jobs = [(job, arms) for job in jobs if (arms := journal.missing(job, plan.arms(job.task, job.length)))]
        total = sum(len(plan.arms(job.task, job.length)) for job in jobs)
        done = total - sum(len(arms) for _, arms in open_jobs)
        if done:
            say(f"quest: {done} of {total} answers are in {output} already")
        make = functools.partial(_make_runner, plan, model_name, device, dtype)
        what = plan.tasks[0] if len(plan.tasks) == 1 else f"{len(plan.tasks)} tasks"
        on_progress(what, done, total)
        for rows in run_jobs(runner, open_jobs, workers=workers, make_runner=make):
            journal.add(rows)
            done += len(rows)
            on_progress(what, done, total)
    _show(output)


def report(folder: Path) -> None:
    """Do what `quest report` does.

    Raises:
        QuestValueError: There is no run in the folder.
    """
    page = write_report(folder)
    _show(folder)
    say(f"quest: the report is {page}")


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
        console.width = _FILE_WIDTH
    for rows in (accuracy_rows(results), perplexity_rows(results), recall_rows(results)):
        if not rows:
            continue
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in rows[0]:
            table.add_column(heading)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        console.print()
