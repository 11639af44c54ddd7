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
from quest_attention.cli.loading import LoadedModel, load_model, resolve_device, set_threads
from quest_attention.cli.page_picture import page_picture
from quest_attention.cli.table import print_table
from quest_attention.config import QuestConfig
from quest_attention.eval.demo import Demo, MethodResult, check_case, check_fits, make_case, run_demo
from quest_attention.eval.wording import chosen_by, counted

__all__ = ["show_demo"]

ANSWER_WIDTH = 14
"""Of an answer in the table [columns]: the key, and enough of a wrong one to see that it is."""
CUT = "..."


def show_demo(
    config: QuestConfig, *, length: int, depth: float, seed: int, model_name: str | None, device: str, dtype: str,
    threads: int | None, as_json: bool, is_quiet: bool,
) -> None:  # fmt: skip
    """Do what `quest demo` does.

    Raises:
        QuestValueError: An option is wrong, also for this model.
        QuestStateError: There is no bundled model.
        UnsupportedModelError: Quest cannot serve the model.
        Exit: With `CHECK_FAILED`, where Quest's sparse path was not taken.
    """
    started = time.perf_counter()
    set_threads(threads)
    config = config.resolved(resolve_device(device).type)
    check_case(length, depth, config)
    with progress_bar(is_quiet=is_quiet) as on_progress:
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
    elif is_quiet:
        _show_results(stdout_console(), demo)
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
        f"{counted(config.token_budget, 'token')} a step ({_units(config)}); layers that read all: "
        f"{config.num_dense_layers} of {layers}",
    )
    head.add_row("model", loaded.description)
    console.print(head)
    console.print()
    _show_results(console, demo)
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


def _units(config: QuestConfig) -> str:
    """What fills the budget, and by what it is chosen."""
    if config.units_per_page == 1:
        return f"{counted(config.page_budget, 'page')} of {config.page_size}, by {chosen_by(config)}"
    how = "one by one" if config.unit_size == 1 else f"in runs of {config.unit_size}"
    return f"{counted(config.num_forced_pages, 'page')} always, the others chosen {how} by {chosen_by(config)}"


def _pages(pages: range) -> str:
    return f"page {pages[0]:,}" if len(pages) == 1 else f"pages {pages[0]:,} to {pages[-1]:,}"


def _show_results(console: Console, demo: Demo) -> None:
    numbers = ("tokens read\nper step", "share of\nKV cache", "in all\nlayers", "ms per\ntoken")
    headings = ("method", "answer", "", *numbers)
    rows = [
        (
            Text(result.method, style="bold cyan" if result.method == "quest" else ""),
            Text(_shortened(_printable(result.answer))),
            Text("right", style="bold green") if result.is_right else Text("wrong", style="bold red"),
            f"{result.tokens_per_step:,.0f}",
            f"{result.share_read:.1%}",
            f"{result.share_read_all_layers:.1%}",
            f"{result.ms_per_token:.2f}",
        )
        for result in demo.results
    ]
    print_table(console, headings, rows, numbers=range(len(headings) - len(numbers), len(headings)))


def _shortened(answer: str) -> str:
    return answer if len(answer) <= ANSWER_WIDTH else f"{answer[: ANSWER_WIDTH - len(CUT)]}{CUT}"


def _printable(answer: str) -> str:
    """The answer without what would move the cursor: a model may write anything."""
    return "".join(letter if letter.isprintable() else " " for letter in answer)


def _remarks(demo: Demo, seconds: float) -> str:
    quest = _quest(demo)
    pages = demo.pages.num_pages
    return (
        f"Measured in this run of {seconds:.0f} s: one question, every method on the same prefilled context; ms is the "
        f"median of {counted(quest.timed_steps, 'decode step')}. Tokens and share are those of a layer that may "
        f"choose; all layers include the {demo.config.num_dense_layers} that read everything. To choose, Quest also "
        f"reads {_choosing(demo.config, pages)}. full is transformers' DynamicCache with sdpa. {_lossless(demo)}"
    )


def _lossless(demo: Demo) -> str:
    """What the row of lossless decoding is, or why there is none."""
    if demo.without_lossless is not None:
        return f"No row of lossless decoding: {demo.without_lossless}."
    return (
        "lossless writes what full writes: Quest drafts and the whole model checks; its numbers are of drafts and "
        "checks together, over the tokens written. So short an answer is mostly written before drafting begins."
    )


def _choosing(config: QuestConfig, pages: int) -> str:
    """What is read beside keys and values to choose among them."""
    all_pages, candidates = counted(pages, "page"), min(pages * config.page_size, config.candidate_tokens)
    scores = f"the {config.metadata} of all {all_pages}: as many bytes as {counted(pages, 'token')}"
    if config.metadata == "sketch":
        scores = f"the sketches of all {all_pages}: a bit of each channel of each key and the pages' means"
    return f"{scores}; and the keys of {counted(candidates, 'token')}" if candidates else scores
