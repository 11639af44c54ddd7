"""Time the attention of one decode step on an NVIDIA GPU: FlashInfer over everything, Quest over what it selects.

    python benchmarks/attention_gpu.py --output benchmarks/results/attention_gpu.json

All arms replay CUDA graphs over rotating layers, so that nothing is found in the cache of the GPU. FlashInfer's time is
the better of its two forms (with and without tensor cores). Quest runs as it is served: with bounds in the dtype of the
keys and in 8 bits, their verbs timed alone beside it, and with sketches, which choose single tokens, at several
budgets. One shape, the one of docs/choosing.md, is timed with bounds, moments and sketches at each of that page's
budgets; `alone` are sketches whose estimates alone choose, with a quarter, a half and all of the budget of bounds, of
which the last reads as much as `tokens_alone` says. `clustered_us` are bounds and estimates alone over keys of which
the newest are looked at most, as in texts, and `newest_share` how much of what is read they are. `bytes_...` count
what a step must read: of every page what ranks it, and keys and values of what is selected. `launches_sketch` are the
kernels of a step, which run one after the other, and `launch_times_us` the launches in their order, each timed alone,
without its early start. `break-even` is the shortest context at which Quest with bounds is no slower. `tables_gpu.py`
makes the tables of docs/gpu.md from the file. The run fails when a step was not sparse: it must have run the kernels
that are made for it and no other, and have read as many pages or tokens as the budget gives.

FlashInfer is not a dependency: `pip install flashinfer-python==0.6.13`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flashinfer
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quest_attention import QuestConfig, score_pages, select_pages, sparse_decode_attention
from quest_attention.bench.caches import cluster_keys, make_caches, with_metadata
from quest_attention.bench.gpu import check_gpu
from quest_attention.bench.record import write_record
from quest_attention.bench.steps import check_kernels, launch_times, quest_steps
from quest_attention.bench.timing import percentiles, time_graph
from quest_attention.config import enough_candidates
from quest_attention.forms import SketchLayout
from quest_attention.ops.triton.token_workspace import passing_sample
from quest_attention.pages import PagedKV

HEAD_DIM, PAGE_SIZE, DTYPE = 128, 16, torch.bfloat16
FLASHINFER_WORKSPACE = 512 << 20
MOST_BYTES = 6 << 30
"""K and V of all layers together, beyond what a layer of the shortest rotation needs."""
SKETCH_BUDGETS = (512, 2048)
"""Of sketches in every row [tokens]."""
PARTS = (4, 2, 1)
"""By what the budget of bounds is divided where estimates alone choose."""
CHOICE_BUDGETS = (256, 512, 1024, 2048)
"""Of the row that is timed with every form [tokens]."""
BREAK_EVEN_LENGTHS = (3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)


class Shape(NamedTuple):
    """One row of the table.

    Attributes:
        batch: Sequences.
        query_heads: HQ.
        kv_heads: HKV.
        context: Tokens per sequence.
        token_budget: Tokens a step may read.
    """

    batch: int
    query_heads: int
    kv_heads: int
    context: int
    token_budget: int


SHAPES = (
    Shape(1, 32, 32, 8192, 2048),
    Shape(1, 32, 32, 32768, 2048),
    Shape(1, 32, 32, 131072, 2048),
    Shape(4, 32, 32, 32768, 2048),
    Shape(1, 32, 8, 32768, 2048),
    Shape(1, 32, 8, 131072, 2048),
    Shape(8, 32, 8, 32768, 2048),
    Shape(8, 32, 8, 131072, 2048),
    Shape(1, 32, 8, 1 << 20, 4096),
)

CHOICE_SHAPE = SHAPES[4]
"""The row that is timed with every form."""


def make_layers(shape: Shape) -> tuple[list[PagedKV], list[Tensor], Tensor]:
    """Random caches, a query for each, and the lengths."""
    layer_bytes = 2 * shape.batch * shape.context * shape.kv_heads * HEAD_DIM * DTYPE.itemsize
    layers = max(3, min(8, MOST_BYTES // layer_bytes))
    caches, lengths = make_caches(layers, shape.batch, shape.context, shape.kv_heads)
    queries = [torch.randn(shape.batch, shape.query_heads, HEAD_DIM, dtype=DTYPE, device="cuda") for _ in caches]
    return caches, queries, lengths


def time_dense(shape: Shape, caches: list[PagedKV], queries: list[Tensor], repeats: int) -> dict[str, dict[str, float]]:
    """FlashInfer's paged decode over everything, in both forms [us]."""
    pages = shape.context // PAGE_SIZE
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * pages
    last = torch.full((shape.batch,), PAGE_SIZE, dtype=torch.int32, device="cuda")
    out = torch.empty_like(queries[0])
    times = {}
    for form, use_tensor_cores in (("tensor cores", True), ("cuda cores", False)):
        wrappers = []
        for kv in caches:  # each layer has a page table of its own
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(FLASHINFER_WORKSPACE // len(caches), dtype=torch.uint8, device="cuda"),
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=use_tensor_cores,
                paged_kv_indptr_buffer=starts.clone(),
                paged_kv_indices_buffer=torch.empty(shape.batch * pages, dtype=torch.int32, device="cuda"),
                paged_kv_last_page_len_buffer=last.clone(),
            )
            wrapper.plan(
                starts,
                kv.page_table.flatten(),
                last,
                shape.query_heads,
                shape.kv_heads,
                HEAD_DIM,
                PAGE_SIZE,
                q_data_type=DTYPE,
                kv_data_type=DTYPE,
            )
            wrappers.append(wrapper)
        calls = [
            lambda w=w, q=q, kv=kv: w.run(q, (kv.keys, kv.values), out=out)
            for w, q, kv in zip(wrappers, queries, caches, strict=True)
        ]
        times[form] = percentiles(time_graph(calls, repeats))
    return times


def config_of(metadata: str, token_budget: int, **others: str | int) -> QuestConfig:
    """A form with what it selects: sketches choose tokens, whose keys rank candidates, other forms pages.

    All else is what the form wants.
    """
    options: dict[str, str | int] = {"page_size": PAGE_SIZE, "metadata": metadata, "selection_unit": "page"}
    if metadata == "sketch":
        factor = enough_candidates(metadata, token_budget)
        options |= {"selection_unit": "token", "candidate_factor": factor}
    options |= others
    return QuestConfig.from_dict({"token_budget": token_budget, **options})


def time_quest(
    config: QuestConfig, caches: list[PagedKV], queries: list[Tensor], lengths: Tensor, repeats: int
) -> dict[str, float]:
    """The whole step, as it is served [us].

    Args:
        config: Of the step.
        caches: With the metadata of the config.
        queries: One for each cache.
        lengths: Of the sequences.
        repeats: Replays.

    Raises:
        RuntimeError: It was not sparse, or ran other kernels than those that are made for it.
    """
    steps = quest_steps(queries, caches, lengths, config)
    check_kernels(steps[0], config)
    return percentiles(time_graph(steps, repeats))


def time_sketch(
    caches: list[PagedKV], queries: list[Tensor], lengths: Tensor, repeats: int
) -> tuple[dict[str, dict[str, float]], list[tuple[str, float]]]:
    """The whole step with sketches, by budget [us], and the launches of the first budget, each alone [us]."""
    sketched = [with_metadata(kv, lengths, config_of("sketch", SKETCH_BUDGETS[0])) for kv in caches]
    configs = {str(budget): config_of("sketch", budget) for budget in SKETCH_BUDGETS}
    times = {name: time_quest(config, sketched, queries, lengths, repeats) for name, config in configs.items()}
    launches = launch_times(quest_steps(queries, sketched, lengths, configs[str(SKETCH_BUDGETS[0])]))
    return times, [(one.kernel, one.alone) for one in launches]


def time_alone(
    token_budget: int, caches: list[PagedKV], queries: list[Tensor], lengths: Tensor, repeats: int
) -> tuple[dict[str, float], list[tuple[str, float]], float]:
    """Where estimates alone choose: the whole step [us], its launches, each alone [us], and the tokens that it reads.

    Raises:
        RuntimeError: The kernels did not hold it.
    """
    config = config_of("sketch", token_budget, candidate_factor=0)
    sketched = [with_metadata(kv, lengths, config) for kv in caches]
    steps = quest_steps(queries, sketched, lengths, config)
    check_kernels(steps[0], config)
    launches = [(one.kernel, one.alone) for one in launch_times(steps)]
    read = sum(step().selected.counts.float().mean().item() for step in steps) / len(steps)
    return percentiles(time_graph(steps, repeats)), launches, read


def time_clustered(
    shape: Shape, caches: list[PagedKV], queries: list[Tensor], lengths: Tensor, repeats: int
) -> tuple[dict[str, dict[str, float]], float]:
    """Bounds and estimates alone over clustered keys [us], and the share of the newest among what the latter read.

    Of the caches the keys change.
    """
    firsts = [cluster_keys(kv, query, shape.context) for kv, query in zip(caches, queries, strict=True)]
    configs = {
        "bounds": config_of("bounds", shape.token_budget),
        "alone": config_of("sketch", shape.token_budget, candidate_factor=0),
    }
    times, newest = {}, 0.0
    for name, config in configs.items():
        kept = [with_metadata(kv, lengths, config) for kv in caches]
        times[name] = time_quest(config, kept, queries, lengths, repeats)
        if name == "alone":
            selected = quest_steps(queries, kept, lengths, config)[0]().selected
            newest = float((selected.units >= firsts[0]).sum() / selected.counts.sum())
    return times, newest


def time_choices(
    caches: list[PagedKV], queries: list[Tensor], lengths: Tensor, repeats: int
) -> dict[str, dict[str, dict[str, float]]]:
    """The whole step, by form and budget [us]."""
    times: dict[str, dict[str, dict[str, float]]] = {}
    for metadata in ("bounds", "moments", "sketch"):
        kept = [with_metadata(kv, lengths, config_of(metadata, CHOICE_BUDGETS[0])) for kv in caches]
        times[metadata] = {
            str(budget): time_quest(config_of(metadata, budget), kept, queries, lengths, repeats)
            for budget in CHOICE_BUDGETS
        }
    times["alone"] = {
        str(budget): time_alone(budget, caches, queries, lengths, repeats)[0] for budget in CHOICE_BUDGETS
    }
    return times


def time_verbs(
    shape: Shape, caches: list[PagedKV], queries: list[Tensor], lengths: Tensor, repeats: int
) -> dict[str, float]:
    """Scoring, selecting and attending as launches of their own, p50 [us]."""
    pairs = list(zip(queries, caches, strict=True))
    scores = [score_pages(q, kv, lengths) for q, kv in pairs]
    options = {"page_size": PAGE_SIZE, "token_budget": shape.token_budget}
    selected = [select_pages(one, lengths, **options) for one in scores]
    out = torch.empty_like(scores[0])
    verbs = {
        "score": [lambda q=q, kv=kv: score_pages(q, kv, lengths, out=out) for q, kv in pairs],
        "select": [lambda one=one: select_pages(one, lengths, **options) for one in scores],
        "attend": [
            lambda q=q, kv=kv, one=one: sparse_decode_attention(q, kv, lengths, one)
            for (q, kv), one in zip(pairs, selected, strict=True)
        ],
    }
    return {name: percentiles(time_graph(calls, repeats))["p50"] for name, calls in verbs.items()}


def bytes_read(shape: Shape, config: QuestConfig, tokens: float | None = None) -> int:
    """What Quest must read: of every page what ranks it, keys and values of what is selected, `tokens` or all [bytes].

    Two vectors rank a page, and a sketch the tokens of one. Where keys rank candidates, those of all of them are read,
    of which the selected tokens are some.
    """
    rows, pages = shape.batch * shape.kv_heads, shape.context // PAGE_SIZE
    selected = keys = config.unit_budget * config.unit_size if tokens is None else round(tokens)
    if config.metadata == "sketch":
        ranking = pages * SketchLayout.of(PAGE_SIZE, HEAD_DIM).total
        keys = max(keys, min(shape.context, config.candidate_budget * config.unit_size))
    else:
        ranking = pages * 2 * HEAD_DIM * (1 if config.metadata_dtype == "fp8" else DTYPE.itemsize)
    return rows * (ranking + (keys + selected) * HEAD_DIM * DTYPE.itemsize)


def bytes_scanned(shape: Shape) -> int:
    """What the scan of a step with sketches must move: the sketches of all pages, and two bits a token [bytes]."""
    pages = shape.batch * shape.kv_heads * shape.context // PAGE_SIZE
    return pages * (SketchLayout.of(PAGE_SIZE, HEAD_DIM).total + PAGE_SIZE // 4)


def bytes_of_exact_choice(shape: Shape, token_budget: int) -> int:
    """What a choice by the keys themselves must read: all keys, and the values of what is selected [bytes]."""
    return shape.batch * shape.kv_heads * (shape.context + token_budget) * HEAD_DIM * DTYPE.itemsize


def find_break_even(shape: Shape, repeats: int) -> int | None:
    """The shortest context, of a list, at which Quest takes no longer than FlashInfer [tokens]."""
    for context in BREAK_EVEN_LENGTHS:
        if context > shape.context:
            break
        short = shape._replace(context=context)
        caches, queries, lengths = make_layers(short)
        dense = min(form["p50"] for form in time_dense(short, caches, queries, repeats).values())
        if time_quest(config_of("bounds", short.token_budget), caches, queries, lengths, repeats)["p50"] <= dense:
            return context
    return None


def main(
    repeats: Annotated[int, typer.Option(help="Replays per timing.")] = 25,
    seed: Annotated[int, typer.Option(help="Seed of the caches and queries.")] = 0,
    break_even: Annotated[bool, typer.Option(help="Look for the contexts from which Quest is no slower.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time FlashInfer and Quest, with every form, over the table of shapes."""
    check_gpu()
    torch.manual_seed(seed)
    columns = (
        "dense",
        "quest",
        "",
        "quest fp8",
        "",
        "sketch 512",
        "",
        "alone",
        "",
        "score",
        "select",
        "attend",
        "break-even",
    )
    table = Table("B x HQ/HKV x context, budget", *columns, title="us per layer and step (p50)")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        caches, queries, lengths = make_layers(shape)
        dense = time_dense(shape, caches, queries, repeats)
        best = min(form["p50"] for form in dense.values())
        bounds, in_8_bits = (config_of("bounds", shape.token_budget, metadata_dtype=kind) for kind in ("kv", "fp8"))
        quest = time_quest(bounds, caches, queries, lengths, repeats)
        kept = [with_metadata(kv, lengths, in_8_bits) for kv in caches]
        narrow = time_quest(in_8_bits, kept, queries, lengths, repeats)
        del kept
        verbs = time_verbs(shape, caches, queries, lengths, repeats)
        sketch, launches = time_sketch(caches, queries, lengths, repeats)
        alone = {
            str(budget): time_alone(budget, caches, queries, lengths, repeats)
            for budget in (shape.token_budget // part for part in PARTS)
            if passing_sample(budget, shape.context)  # else the single verbs would run
        }
        whole, launches_alone, read = alone[str(shape.token_budget)]
        row = {
            "shape": list(shape),
            "dense_us": dense,
            "quest_us": quest,
            "quest_fp8_us": narrow,
            "sketch_us": sketch,
            "launches_sketch": Counter(name for name, _ in launches),
            "launch_times_us": launches,
            "alone_us": {budget: times for budget, (times, _, _) in alone.items()},
            "tokens_alone": read,
            "launch_times_alone_us": launches_alone,
            "verbs_us": verbs,
            "bytes_quest": bytes_read(shape, bounds),
            "bytes_quest_fp8": bytes_read(shape, in_8_bits),
            "bytes_sketch": {str(budget): bytes_read(shape, config_of("sketch", budget)) for budget in SKETCH_BUDGETS},
            "bytes_alone": bytes_read(shape, config_of("sketch", shape.token_budget, candidate_factor=0), read),
            "bytes_scan": bytes_scanned(shape),
            "bytes_dense": 2 * shape.batch * shape.kv_heads * shape.context * HEAD_DIM * DTYPE.itemsize,
            "ratio": best / quest["p50"],
            "ratio_fp8": best / narrow["p50"],
        }
        if shape == CHOICE_SHAPE:
            row["choices_us"] = time_choices(caches, queries, lengths, repeats)
            row["bytes_exact"] = {str(budget): bytes_of_exact_choice(shape, budget) for budget in CHOICE_BUDGETS}
        # Last, as the keys change.
        row["clustered_us"], row["newest_share"] = time_clustered(shape, caches, queries, lengths, repeats)
        del caches, queries
        torch.cuda.empty_cache()
        is_first_of_its_kind = not any(row["shape"][:3] == list(shape[:3]) for row in rows)
        looked_for = break_even and is_first_of_its_kind
        row["break_even_context"] = find_break_even(shape._replace(context=32768), 9) if looked_for else None
        rows.append(row)
        name = f"{shape.batch} x {shape.query_heads}/{shape.kv_heads} x {shape.context // 1024}K, {shape.token_budget}"
        least = sketch[str(SKETCH_BUDGETS[0])]["p50"]
        times = [f"{best:.1f}", f"{quest['p50']:.1f}", f"{row['ratio']:.1f}x"]
        times += [f"{narrow['p50']:.1f}", f"{row['ratio_fp8']:.1f}x", f"{least:.1f}", f"{best / least:.1f}x"]
        times += [f"{whole['p50']:.1f}", f"{best / whole['p50']:.1f}x"]
        times += [f"{verbs[verb]:.1f}" for verb in ("score", "select", "attend")]
        times.append(str(row["break_even_context"] or ""))
        table.add_row(name, *times)
        if output is not None:
            settings = {
                "head_dim": HEAD_DIM,
                "page_size": PAGE_SIZE,
                "dtype": str(DTYPE),
                "flashinfer": flashinfer.__version__,
                "repeats": repeats,
                "seed": seed,
            }
            write_record(output, settings, rows)
    Console(width=170).print(table)


if __name__ == "__main__":
    typer.run(main)
