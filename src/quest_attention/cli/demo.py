"""`quest demo`: run the demonstration and show what it found."""

from __future__ import annotations

import json
import sys
import time

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quest_attention.cli.console import can_draw, progress_bar, say, stdout_console
from quest_attention.cli.failures import CHECK_FAILED
from quest_attention.cli.loading import LoadedModel, load_model, set_threads
from quest_attention.cli.page_picture import page_picture
from quest_attention.config import QuestConfig
from quest_attention.eval.demo import Demo, MethodResult, check_fits, make_case, run_demo

__all__ = ["show_demo"]


def show_demo(
    config: QuestConfig,
    *,
    length: int,
    depth: float,
    seed: int,
    model_name: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Do what `quest demo` does.

    Raises:
        QuestValueError: An option is wrong, also for this model.
        QuestStateError: There is no bundled model.
        UnsupportedModelError: Quest cannot serve the model.
        Exit: With `CHECK_FAILED`, where Quest's sparse path was not taken.
    """
    started = time.perf_counter()
    set_threads(threads)
    with progress_bar() as on_progress:
        on_progress("loading the model", 0, 0)
        loaded = load_model(model_name, device=device, dtype=dtype)
        check_fits(loaded.model, length, config)
        case = make_case(loaded.tokenizer, length=length, depth=depth, seed=seed)
        demo = run_demo(loaded.model, loaded.tokenizer, case, config, on_progress=on_progress)
    seconds = time.perf_counter() - started
    if not _quest(demo).sparse_layer_steps:
        say("quest: error: Quest took no sparse step: there is nothing to compare")
        raise typer.Exit(CHECK_FAILED)
    if as_json:
        report = {"model": loaded.description, "seconds": seconds, **demo.to_dict()}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(stdout_console(), demo, loaded, seconds)


def _quest(demo: Demo) -> MethodResult:
    return next(result for result in demo.results if result.method == "quest")


def _show(console: Console, demo: Demo, loaded: LoadedModel, seconds: float) -> None:
    case, config = demo.case, demo.config
    pages = case.fact_pages(config.page_size)
    layers = config.num_dense_layers + len(demo.pages.layers)
    console.print()
    console.print(f"[bold]A fact hidden in {case.length:,} tokens of[/] {case.book}")
    console.print()
    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    head.add_column(style="dim", no_wrap=True)
    head.add_column(overflow="fold")
    depth = case.sample.depths[0]
    head.add_row("fact", case.sample.facts[0].strip())
    head.add_row(
        "hidden",
        f"at token {case.fact_start:,} (depth {depth:.0%}), {_pages(pages)} of {demo.pages.num_pages:,}",
    )
    head.add_row("question", f"{case.sample.question.strip()} ...")
    head.add_row(
        "reading",
        f"{config.token_budget} tokens a step ({config.page_budget} pages of {config.page_size}); "
        f"{config.num_dense_layers} of {layers} layers read all",
    )
    head.add_row("model", loaded.description)
    console.print(head)
    console.print()
    console.print(_table(demo))
    console.print()
    console.print(page_picture(demo, width=console.width, is_unicode=can_draw(console, "░▒▓█▲└─┘")))
    console.print()
    if not demo.results[0].is_right:
        console.print(
            "The model did not find the fact even with everything read, so this run says nothing about what a method "
            "loses. Try another --seed or --depth, or a shorter --length.",
            style="yellow",
        )
        console.print()
    console.print(_remarks(demo, seconds), style="dim")


def _pages(pages: range) -> str:
    return f"page {pages[0]:,}" if len(pages) == 1 else f"pages {pages[0]:,} to {pages[-1]:,}"


def _table(demo: Demo) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True)
    table.add_column("method", no_wrap=True)
    table.add_column("answer", overflow="ellipsis", no_wrap=True, max_width=14)
    table.add_column("", no_wrap=True)
    table.add_column("tokens read\nper step", justify="right", no_wrap=True)
    table.add_column("share of\nKV cache", justify="right", no_wrap=True)
    table.add_column("in all\nlayers", justify="right", no_wrap=True)
    table.add_column("ms per\ntoken", justify="right", no_wrap=True)
    for result in demo.results:
        verdict = Text("right", style="bold green") if result.is_right else Text("wrong", style="bold red")
        table.add_row(
            Text(result.method, style="bold cyan" if result.method == "quest" else ""),
            Text(_printable(result.answer)),
            verdict,
            f"{result.tokens_per_step:,.0f}",
            f"{result.share_read:.1%}",
            f"{result.share_read_all_layers:.1%}",
            f"{result.ms_per_token:.2f}",
        )
    return table


def _printable(answer: str) -> str:
    """The answer without what would move the cursor: a model may write anything."""
    return "".join(letter if letter.isprintable() else " " for letter in answer)


def _remarks(demo: Demo, seconds: float) -> str:
    quest = _quest(demo)
    pages = demo.pages.num_pages
    return (
        f"Measured in this run of {seconds:.0f} s: one question, every method on the same prefilled context; ms is the "
        f"median of {quest.timed_steps} decode steps. Tokens and share are those of a layer that may choose; all "
        f"layers include the {demo.config.num_dense_layers} that read everything. To choose, Quest also reads "
        f"the bounds of all {pages:,} pages: as many bytes as {pages:,} tokens. full is transformers' DynamicCache "
        f"with sdpa."
    )
