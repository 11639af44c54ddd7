"""The commands and their options. What they do is in the modules they import when they run."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, cast

import typer

from quest_attention.cli.console import say
from quest_attention.cli.failures import INTERRUPTED, USAGE, one_line, reports_failures, usage_message
from quest_attention.cli.options import (
    check_seed,
    check_threads,
    check_workers,
    drafts_of,
    path_of,
    refuse_cache_options,
)
from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError

__all__ = ["app", "main", "run"]

COMPLETION = ("install_completion", "show_completion")
"""Options that typer adds."""
MODEL_HELP = "A folder, a GGUF file or a Hub id; the bundled model by default."

app = typer.Typer(
    help="Quest sparse attention: decode long contexts while reading a few per cent of the KV cache.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Model = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP, show_default=False)]
TokenBudget = Annotated[
    int | None,
    typer.Option(
        "--token-budget",
        "-b",
        help="Most tokens a step may read; by default 2,048, or 512 by sketch where keys rank candidates.",
        show_default=False,
    ),
]
SinkPages = Annotated[
    int | None, typer.Option("--sink-pages", help="First pages always read; by default 1, with bounds 0.")
]
RecentPages = Annotated[int, typer.Option("--recent-pages", help="Last pages always read.")]
GroupReduction = Annotated[
    str | None,
    typer.Option(
        help="Over the query heads of a KV head: max (the default), mean, or, where tokens are ranked, mass.",
        show_default=False,
    ),
]
Metadata = Annotated[
    str,
    typer.Option(
        help="Of a page's keys: bounds (the paper's), moments (mean, deviation), sketch (a bit a channel); auto is "
        "sketch on a GPU, moments on a CPU."
    ),
]
SelectionUnit = Annotated[
    str | None,
    typer.Option(
        help="What is chosen: page, token or 4 (tokens); by default page, with auto on a GPU token.",
        show_default=False,
    ),
]
CandidateFactor = Annotated[
    int | None,
    typer.Option(
        help="Times the budget that is ranked once more, by keys; 4 where tokens are ranked, or for 2,048 tokens; "
        "0 for tokens by sketch from 2,048 on.",
        show_default=False,
    ),
]
Coefficient = Annotated[
    float | None,
    typer.Option(
        help="With moments: deviations above its mean where a page's best key is taken to lie; 1.", show_default=False
    ),
]
MetadataDtype = Annotated[str, typer.Option(help="Page bounds as the keys (kv) or in 8 bits (fp8).")]
PageSize = Annotated[int, typer.Option(help="Tokens per page.")]
DenseLayers = Annotated[int, typer.Option("--dense-layers", help="First layers that read everything.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output instead.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice by default.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Backend = Annotated[str, typer.Option(help="auto, torch, triton or reference; `quest env` explains.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No summary and no progress; errors and warnings still show.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (as saved; the bundled model and GGUF on a CPU: float32, GGUF on a GPU: bfloat16), float32, "
        "bfloat16, float16."
    ),
]


def split_list(text: str) -> tuple[str, ...]:
    """Parts of a comma-separated list; commas between the options of a method, `quest:a=1,b=2`, part nothing."""
    return tuple(part.strip() for part in re.split(r",(?!\w+=)", text) if part.strip())


def integers(option: str, text: str) -> list[int]:
    """Numbers of a comma-separated list.

    Raises:
        QuestValueError: One is no positive integer, or there is none.
    """
    parts = split_list(text) or (text,)
    for part in parts:
        if not part.isdecimal() or not int(part):
            raise QuestValueError(option, part, "positive integers, parted by commas")
    return [int(part) for part in parts]


def unit_of(text: str | None) -> str | int | None:
    """A selection unit as a config takes it: a number of tokens is a number."""
    return int(text) if text is not None and text.isdecimal() else text


@contextlib.contextmanager
def _methods_as_given(given: Mapping[str, str]) -> Iterator[None]:
    """Word a mistake with methods as they were given, where their metadata "auto" was spelled out."""
    try:
        yield
    except QuestValueError as error:
        expected = error.expected
        for spelled, own in given.items():
            if own != spelled and expected.endswith(f" {spelled}"):
                expected = expected.replace(spelled, f"{own}, which is {spelled} here")
        raise QuestValueError(error.argument, given.get(str(error.got), error.got), expected) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        from quest_attention import __version__

        typer.echo(f"quest-attention {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all_commands(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - the callback acts on it
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@reports_failures
def demo(
    length: Annotated[int, typer.Option("--length", "-l", help="Tokens of context, question and answer.")] = 8192,
    depth: Annotated[float, typer.Option(help="Where the fact is hidden: 0 % is the start, 100 % the end.")] = 50.0,
    token_budget: TokenBudget = QuestConfig.token_budget,
    page_size: PageSize = QuestConfig.page_size,
    num_dense_layers: DenseLayers = QuestConfig.num_dense_layers,
    metadata: Metadata = QuestConfig.metadata,
    selection_unit: SelectionUnit = None,
    candidate_factor: CandidateFactor = QuestConfig.candidate_factor,
    seed: Annotated[int, typer.Option(help="Chooses the hidden number.")] = 0,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    is_quiet: Quiet = False,
) -> None:
    """Hide a fact in a book, ask for it, and compare full attention, Quest, a sliding window and lossless decoding.

    The book is real and was held out from the bundled model's training. Every number shown is measured in the run: the
    answers, the tokens read per step, the share of the KV cache and the time per token. A picture shows which pages
    Quest read.
    """
    check_seed(seed)
    config = QuestConfig.from_dict(
        {
            "token_budget": token_budget,
            "page_size": page_size,
            "num_dense_layers": num_dense_layers,
            "metadata": metadata,
            "selection_unit": unit_of(selection_unit),
            "candidate_factor": candidate_factor,
        }
    )
    from quest_attention.cli.demo import show_demo  # last: transformers takes seconds to import

    show_demo(
        config, length=length, depth=depth, seed=seed, model_name=model, device=device, dtype=dtype, threads=threads,
        as_json=as_json, is_quiet=is_quiet,
    )  # fmt: skip


@app.command()
@reports_failures
def generate(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt itself.", show_default=False)] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", "-f", help="A file in UTF-8; - is standard input.", show_default=False),
    ] = None,
    model: Model = None,
    token_budget: TokenBudget = QuestConfig.token_budget,
    page_size: PageSize = QuestConfig.page_size,
    num_dense_layers: DenseLayers = QuestConfig.num_dense_layers,
    num_sink_pages: SinkPages = QuestConfig.num_sink_pages,
    num_recent_pages: RecentPages = QuestConfig.num_recent_pages,
    group_reduction: GroupReduction = QuestConfig.group_reduction,
    metadata: Metadata = QuestConfig.metadata,
    metadata_dtype: MetadataDtype = QuestConfig.metadata_dtype,
    moments_coefficient: Coefficient = QuestConfig.moments_coefficient,
    selection_unit: SelectionUnit = None,
    candidate_factor: CandidateFactor = QuestConfig.candidate_factor,
    backend: Backend = QuestConfig.backend,
    dense: Annotated[bool, typer.Option("--dense", help="Read everything, without Quest, to compare.")] = False,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Write what --dense writes: Quest drafts, the whole model checks.")
    ] = False,
    draft_tokens: Annotated[
        str | None,
        typer.Option(help="Drafts before a check of --lossless, 1 to 15 or auto; 4 if left out.", show_default=False),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            help="host: keys and values in host memory, what is read often on the GPU. For NVIDIA GPUs.",
            show_default=False,
        ),
    ] = None,
    hot_tokens: Annotated[
        int | None,
        typer.Option(
            help="With --offload: tokens on the GPU, of each layer and KV head; by default half of its free memory.",
            show_default=False,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="Keys and values as the model has them (auto) or in 8 bits (fp8).")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the tokenizer's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    is_quiet: Quiet = False,
) -> None:
    """Continue a prompt with Quest, streaming the text.

    Standard output carries the generated text and nothing else; a summary (speed, share of the KV cache read) follows
    on standard error. Without --prompt and --prompt-file the prompt is read from standard input.
    """
    from quest_attention.cli.prompt import read_prompt

    check_seed(seed)
    config = QuestConfig.from_dict(
        {
            "token_budget": token_budget,
            "page_size": page_size,
            "num_dense_layers": num_dense_layers,
            "num_sink_pages": num_sink_pages,
            "num_recent_pages": num_recent_pages,
            "group_reduction": group_reduction,
            "metadata": metadata,
            "metadata_dtype": metadata_dtype,
            "moments_coefficient": moments_coefficient,
            "selection_unit": unit_of(selection_unit),
            "candidate_factor": candidate_factor,
            "backend": backend,
        }
    )
    drafts = drafts_of(draft_tokens, is_lossless=lossless, is_dense=dense)
    refuse_cache_options(offload, hot_tokens, kv_cache_dtype, is_lossless=lossless, is_dense=dense)
    text = read_prompt(prompt, prompt_file)
    from quest_attention.cli.generate import Sampling, stream_text  # likewise

    stream_text(
        text, None if dense else config,
        Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed), is_chat=chat,
        draft_tokens=drafts, offload=offload, hot_tokens=hot_tokens, kv_cache_dtype=kv_cache_dtype, model_name=model,
        device=device, dtype=dtype, threads=threads, as_json=as_json, is_quiet=is_quiet,
    )  # fmt: skip


@app.command(name="eval")
@reports_failures
def evaluate(
    tasks: Annotated[list[str], typer.Argument(help="passkey, niah_single_1, ..., continuation, perplexity, recall.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the run; it goes on if it was begun.")],
    model: Model = None,
    methods: Annotated[
        str, typer.Option("--method", help="full, quest, oracle, token_oracle, streaming_llm, h2o ...")
    ] = ("full,quest,streaming_llm"),
    token_budgets: Annotated[
        str, typer.Option("--token-budget", "-b", help="Tokens a step may read, or shares of the length as 1/16.")
    ] = "64,128,256",  # noqa: S107 (tokens of a model, no secret)
    lengths: Annotated[str, typer.Option("--length", "-l", help="Tokens of context, question and answer.")] = "8192",
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="For each task and length.")] = 200,
    num_dense_layers: DenseLayers = QuestConfig.num_dense_layers,
    page_size: PageSize = QuestConfig.page_size,
    question: Annotated[str, typer.Option(help="Whether the question is decoded or prefilled: decode, prefill.")] = (
        "decode"
    ),
    chat: Annotated[
        str, typer.Option(help="Questions through the model's chat template: auto (where it has one), yes, no.")
    ] = "auto",
    least_full: Annotated[
        int, typer.Option(help="Ask other methods only where full is right in at least so many answers [%].")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    backend: Backend = QuestConfig.backend,
    books: Annotated[
        str | None, typer.Option(help="Folder of *.txt to hide facts in; an excerpt by default.", show_default=False)
    ] = None,
    longbench: Annotated[str | None, typer.Option(help="Folder with LongBench's *.jsonl.", show_default=False)] = None,
    workers: Annotated[int, typer.Option(help="Processes, each with a model of its own, spread over the GPUs.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    is_quiet: Quiet = False,
) -> None:
    """Measure methods that read less of the KV cache on retrieval, perplexity and recall.

    Every method runs through generate() with the same budget and the same dense layers, and the run fails where one
    did not take its sparse path. An interrupted run goes on with the same command. `quest report` draws the figures.
    """
    check_seed(seed)
    check_threads(threads)
    check_workers(workers)
    folder = path_of("output", output)
    from quest_attention.cli.eval import evaluate as run_evaluation
    from quest_attention.cli.loading import resolve_device
    from quest_attention.eval.frame import Chat
    from quest_attention.eval.methods import spell_out
    from quest_attention.eval.plan import Plan, Question

    kind = resolve_device(device).type
    given = split_list(methods)
    spelled = tuple(spell_out(method, kind, page_size) for method in given)
    with _methods_as_given(dict(zip(spelled, given, strict=True))):
        plan = Plan(
            tasks=tuple(dict.fromkeys(tasks)),
            methods=spelled,
            token_budgets=split_list(token_budgets),
            lengths=tuple(integers("length", lengths)),
            num_samples=num_samples,
            num_dense_layers=num_dense_layers,
            page_size=page_size,
            question=cast("Question", question),  # the plan checks it
            chat=cast("Chat", chat),  # likewise
            least_full=least_full,
            seed=seed,
            backend=backend,
            books=None if books is None else path_of("books", books),
            longbench=None if longbench is None else path_of("longbench", longbench),
        )
    run_evaluation(
        plan, folder, model_name=model, device=device, dtype=dtype, threads=threads, workers=workers, is_quiet=is_quiet
    )


@app.command()
@reports_failures
def report(folder: Annotated[str, typer.Argument(help="Folder of a run of `quest eval`.")]) -> None:
    """Draw a run of `quest eval`: one HTML page that needs nothing else, PNG figures, and a summary as JSON."""
    from quest_attention.cli.eval import report as show_report

    show_report(path_of("folder", folder))


@app.command()
@reports_failures
def env(as_json: AsJson = False) -> None:
    """Show versions, devices, and which backend would run on each and why: for bug reports."""
    from quest_attention.cli.env import show_environment

    show_environment(as_json=as_json)


def make_command() -> Callable[..., object]:
    """The whole command line; the options of shell completion work, and keep out of the help."""
    command = typer.main.get_command(app)
    for parameter in command.params:
        if parameter.name in COMPLETION:
            parameter.hidden = True  # type: ignore[attr-defined]  # options have it, and these are options
    return command


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, or see `cli.failures`.

    Args:
        arguments: Without the program's name; those of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = make_command()(args=given, prog_name="quest", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        # The parser's errors have different bases from one release of typer to the next, but all can format themselves.
        if not hasattr(error, "format_message"):
            raise
        say(f"quest: error: {one_line(usage_message(error, given))}")
        return USAGE
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `quest` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    sys.exit(run())


# Longer than 250 lines: every option of every command stands here with its help.
