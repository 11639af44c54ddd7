"""Time decoding through `generate()` on an NVIDIA GPU with random weights: the paper's Figure 10, and longer.

    python benchmarks/decode_gpu.py --output benchmarks/results/decode_gpu.json

Arms, each over the same random keys and values:

    stock        transformers without us: DynamicCache and sdpa, eager
    dense        our storage and kernels, every layer reading everything, in CUDA graphs
    quest-N      Quest with a budget of N tokens, the first two layers dense, in CUDA graphs
    quest-N-fp8  the same with page metadata in 8 bits

With `--lossless` two arms instead, in the same CUDA graphs:

    dense        as above
    lossless-N   lossless decoding, whose drafts are sparse steps with sketches and a budget of N tokens

    python benchmarks/decode_gpu.py --lossless --models llama-3.1-8b --acceptance acceptance.json

Random weights seldom agree with themselves, so checks accept as many drafts as `--acceptance` has, a result of
`acceptance.py` on a public model: imposed, and in the record. All else runs as with any model.

`dense` and `quest` differ in nothing but what they read. The time of a token is that between two calls of a logits
processor, so it holds all that `generate()` does. `prefill` times a prompt without Quest, with bounds and with
sketches; `--only-prefill` times nothing else. The run fails when an arm did not take the path it is named for. With
`--compiled` the decoder layers are compiled (`torch.compile`; cache and attention stay out of it) for all arms alike;
`stock` and `prefill` are left out. Weights are bfloat16, and 4-bit in groups of 128 by torchao where the name of a
model ends in -int4 (`pip install torchao`): the paper's 2.23x is with 4-bit weights.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch._dynamo import config as dynamo
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from quest_attention import QuestConfig, QuestWarning, enable_quest
from quest_attention.bench.drafts import imposed_acceptance, measured_acceptance, time_rounds
from quest_attention.bench.record import write_record
from quest_attention.bench.shapes import SHAPES, check_shape
from quest_attention.bench.timing import percentiles
from quest_attention.bench.written import time_written
from quest_attention.cli.app import split_list
from quest_attention.errors import QuestValueError

PAGE_SIZE, NUM_DENSE_LAYERS = 16, 2
INT4 = "-int4"
"""Ends the name of a model whose linear layers have 4-bit weights."""
WARMUP = 6
"""Tokens not counted: the first steps capture the graph."""


class Case(NamedTuple):
    """What is timed together.

    Attributes:
        model: Name in SHAPES.
        batch: Sequences.
        context: Tokens in the cache.
        arms: Names of the arms.
    """

    model: str
    batch: int
    context: int
    arms: tuple[str, ...]


PAPER_ARMS = ("stock", "dense", "quest-512", "quest-1024", "quest-2048", "quest-4096", "quest-2048-fp8")
LONG_ARMS = ("dense", "quest-2048", "quest-2048-fp8")
CASES = (
    *(Case("llama-2-7b", 1, length, PAPER_ARMS) for length in (8192, 16384, 32768)),
    Case("llama-2-7b", 1, 131072, LONG_ARMS),
    Case("llama-2-7b", 4, 32768, LONG_ARMS),
    *(Case("llama-3.1-8b", 1, length, ("stock", *LONG_ARMS)) for length in (32768, 131072)),
    Case("llama-3.1-8b", 1, 262144, LONG_ARMS),
    *(Case("llama-3.1-8b", 4, length, LONG_ARMS) for length in (32768, 131072)),
    *(Case("llama-2-7b-int4", 1, length, LONG_ARMS) for length in (8192, 16384, 32768, 131072)),
)
TRIES = tuple(Case("tiny", batch, 600, ("stock", "dense", "quest-512", "quest-512-fp8")) for batch in (1, 2))
LOSSLESS_ARMS = ("dense", "lossless-512", "lossless-2048")
LOSSLESS_CASES = (
    *(Case("llama-3.1-8b", batch, length, LOSSLESS_ARMS) for batch, length in ((4, 32768), (1, 131072), (4, 131072))),
    *(Case("tiny", batch, 600, ("dense", "lossless-512")) for batch in (1, 2)),
)
LOSSLESS_TIMES = 25
"""Times the counted tokens that lossless arms write: of a short text the end, where nothing is drafted, is much."""
PREFILL_LENGTHS = (8192, 32768)


def make_model(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """A Llama of random weights, made on the device."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[name.removesuffix(INT4)], max_position_embeddings=1 << 20, bos_token_id=None, eos_token_id=None
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    if name.endswith(INT4):
        from torchao.quantization import Int4WeightOnlyConfig, quantize_  # noqa: PLC0415 (for these models alone)

        with torch.inference_mode(False), torch.no_grad():
            quantize_(model.model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return model


def names_of(models: str) -> tuple[str, ...]:
    """Models, comma-separated; refused before the first is timed if there is no such shape."""
    names = split_list(models)
    for name in names:
        check_shape(name.removesuffix(INT4))
    return names


def cases_of(model: str, longest: int, cases: tuple[Case, ...] | None = None) -> list[Case]:
    """What is timed of a model, up to a length."""
    return [
        case
        for case in ((*CASES, *TRIES) if cases is None else cases)
        if case.model == model and case.context <= longest
    ]


def imposed_by(acceptance: Path | None, accepted_as: str, drafts: int, tokens: int) -> dict[str, Any]:
    """What lossless arms are made to accept, for the record; refused before anything is timed.

    Raises:
        QuestValueError: No measurement says it.
    """
    if acceptance is None:
        raise QuestValueError("acceptance", None, "a JSON file of acceptance.py with --lossless")
    text, _, arm = accepted_as.partition(" ")
    measured = measured_acceptance(acceptance, text=text, arm=arm)
    return {
        "num_dense_layers": measured.dense_layers,
        "accepted_at_least": measured.at_least,  # random weights seldom agree
        "accepted_as": accepted_as,
        "draft_tokens": drafts,
        "lossless_tokens": LOSSLESS_TIMES * tokens,
    }


def compile_layers(model: LlamaForCausalLM) -> None:
    """Fuse what stands between the matrix products of a layer. Layers share what was compiled."""
    dynamo.allow_unspec_int_on_nn_module = True  # the index of a layer is no reason to compile it again
    dynamo.recompile_limit = 64  # checks of drafts are of several numbers of tokens, with a mask
    dynamo.fail_on_recompile_limit_hit = True  # an arm that goes on eagerly is not the one it is named for
    for layer in model.model.layers:
        layer.compile()


def fill(cache: Cache, model: LlamaForCausalLM, batch: int, length: int, seed: int) -> None:
    """Write random tokens to every layer of a cache, as a prefill would."""
    generator = torch.Generator(model.device).manual_seed(seed)
    config = model.config
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    keys, values = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    for layer in range(config.num_hidden_layers):
        cache.update(keys.normal_(generator=generator), values.normal_(generator=generator), layer)
        if isinstance(cache, DynamicCache) and type(cache) is DynamicCache:  # it keeps what it is given
            keys, values = torch.empty_like(keys), torch.empty_like(values)
        elif model.device.type == "cuda":
            torch.cuda.synchronize()  # a cache in host memory takes them while other work goes on


def time_arm(
    model: LlamaForCausalLM, case: Case, arm: str, tokens: int, seed: int, imposed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Time per token of one arm, and what it read.

    Raises:
        RuntimeError: The arm did not take its path.
    """
    if imposed is not None and arm.startswith("lossless"):
        return time_lossless(model, case, arm, imposed, seed)
    room = case.context + WARMUP + tokens + 2
    if arm == "stock":
        cache: Cache = DynamicCache(config=model.config)
        fill(cache, model, case.batch, case.context, seed)
        return {
            "ms": percentiles(time_written(model, cache, case.batch, case.context, tokens, WARMUP)),
            "share_read": 1.0,
        }
    layers = model.config.num_hidden_layers
    is_dense = arm == "dense"
    budget = 512 if is_dense else int(arm.split("-")[1])
    num_dense = layers if is_dense else NUM_DENSE_LAYERS
    bounds = "fp8" if arm.endswith("fp8") else "kv"
    config = QuestConfig.paper(budget, page_size=PAGE_SIZE, num_dense_layers=num_dense, metadata_dtype=bounds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuestWarning)  # every layer dense is what one arm is for
        handle = enable_quest(model, config)
    with handle:
        cache = handle.make_cache(room)
        fill(cache, model, case.batch, case.context, seed)
        ms = time_written(model, cache, case.batch, case.context, tokens, WARMUP)
        steps = WARMUP + tokens
        taken = (handle.counters.sparse_steps, handle.counters.dense_steps)
        if taken != ((layers - num_dense) * steps, num_dense * steps):
            raise RuntimeError(f"{case} {arm}: took {taken} sparse and dense layer steps in {steps} steps")
        graphs = handle.graphs
        if model.device.type == "cuda" and (graphs is None or graphs.replayed_steps != steps or graphs.captures != 1):
            raise RuntimeError(f"{case} {arm}: not all steps replayed one graph: {graphs and graphs.eager_steps}")
        return {"ms": percentiles(ms), "share_read": handle.counters.share_read}


def time_lossless(model: LlamaForCausalLM, case: Case, arm: str, imposed: dict[str, Any], seed: int) -> dict[str, Any]:
    """Time per token of a lossless arm, and what became of its drafts.

    Raises:
        RuntimeError: The arm did not take its path.
    """
    config = QuestConfig(
        int(arm.split("-")[1]), PAGE_SIZE, num_dense_layers=imposed["num_dense_layers"], metadata="sketch",
        selection_unit="token",
    )  # fmt: skip
    tokens = imposed["lossless_tokens"]
    room = case.context + tokens + 32
    with (
        imposed_acceptance(imposed["accepted_at_least"], seed),
        enable_quest(model, config, lossless=True, draft_tokens=imposed["draft_tokens"]) as handle,
    ):
        cache = handle.make_cache(room)
        fill(cache, model, case.batch, case.context, seed)
        row = time_rounds(model, cache, case.batch, case.context, tokens)
        counters, graphs = handle.counters, handle.graphs
        if not counters.sparse_steps:
            raise RuntimeError(f"{case} {arm}: nothing was drafted: {counters.drafts}")
        if model.device.type == "cuda" and (graphs is None or graphs.eager_steps):
            raise RuntimeError(f"{case} {arm}: not all passes replayed a graph: {graphs and graphs.eager_steps}")
        captures = None if graphs is None else graphs.captures
        found = {"share_read": counters.share_read, "captures": captures, "drafts": counters.to_dict()["drafts"]}
        return {"ms": {"p50": row.pop("ms_per_token")}, **row, **found}


def time_prefill(model: LlamaForCausalLM, length: int, repeats: int) -> dict[str, float]:
    """Seconds of a prompt without Quest and with it, with bounds and with sketches, medians.

    In turns, so that a drift of the clocks touches all.
    """
    ids = torch.ones(1, length, dtype=torch.long, device=model.device)

    def once() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - start

    configs = {
        "stock": None,
        "quest": QuestConfig.paper(2048),
        "sketch": QuestConfig(2048, PAGE_SIZE, metadata="sketch", selection_unit="token"),
    }
    times: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(1 + repeats):
        for name in (*configs, *configs)[turn % len(configs) :][: len(configs)]:  # none always finds what one leaves
            with contextlib.nullcontext() if (config := configs[name]) is None else enable_quest(model, config):
                seconds = once()
            if turn:  # in the first, kernels are compiled and memory is taken
                times[name].append(seconds)
    return {name: percentiles(values)["p50"] for name, values in times.items()}


def main(
    models: Annotated[str, typer.Option(help="Shapes, comma-separated.")] = "llama-2-7b,llama-3.1-8b,llama-2-7b-int4",
    longest: Annotated[int, typer.Option(help="Leave out longer contexts [tokens].")] = 1 << 20,
    tokens: Annotated[int, typer.Option(help="Counted tokens per arm.", min=1)] = 24,
    repeats: Annotated[int, typer.Option(help="Timings of a prefill.", min=1)] = 12,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda",
    only_prefill: Annotated[bool, typer.Option("--only-prefill", help="Prompts alone.")] = False,
    compiled: Annotated[bool, typer.Option(help="Compile the decoder layers; no `stock`, no `prefill`.")] = False,
    lossless: Annotated[bool, typer.Option("--lossless", help="Dense and lossless decoding alone.")] = False,
    acceptance: Annotated[Path | None, typer.Option(help="JSON of acceptance.py, for --lossless.")] = None,
    accepted_as: Annotated[str, typer.Option(help="Its text and arm.")] = "book sketch@512",
    drafts: Annotated[int, typer.Option(help="Before a check, for --lossless [tokens].")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of weights and caches.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time decoding and prefilling on one GPU."""
    names = names_of(models)
    imposed = imposed_by(acceptance, accepted_as, drafts, tokens) if lossless else None
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    table = Table("model", "batch", "context", "arm", "ms per token (p50)", "to dense", "read")
    rows: list[dict[str, Any]] = []

    def write() -> None:
        if output is not None:
            settings = {
                "page_size": PAGE_SIZE,
                "num_dense_layers": NUM_DENSE_LAYERS,
                "dtype": str(dtype),
                "tokens": tokens,
                "warmup": WARMUP,
                "repeats": repeats,
                "compiled": compiled,
                "seed": seed,
            }
            settings |= imposed or {}
            write_record(output, settings, rows)

    with torch.inference_mode():
        for name in names:
            model = make_model(name, where, dtype, seed)
            if compiled:
                compile_layers(model)
            for case in () if only_prefill else cases_of(name, longest, LOSSLESS_CASES if lossless else None):
                dense: float | None = None
                for arm in case.arms:
                    if compiled and arm == "stock":
                        continue
                    row = time_arm(model, case, arm, tokens, seed, imposed)
                    gc.collect()
                    if where.type == "cuda":
                        torch.cuda.empty_cache()
                    dense = row["ms"]["p50"] if arm == "dense" else dense
                    ratio = None if dense is None else dense / row["ms"]["p50"]
                    shape = {"model": name, "batch": case.batch, "context": case.context}
                    rows.append({**shape, "arm": arm, **row, "ratio_to_dense": ratio})
                    numbers = (f"{row['ms']['p50']:.2f}", f"{ratio:.2f}x" if ratio else "", f"{row['share_read']:.1%}")
                    table.add_row(name, str(case.batch), str(case.context), arm, *numbers)
                    write()
            lengths = (
                () if name.endswith(INT4) or compiled or lossless else PREFILL_LENGTHS if name != "tiny" else (600,)
            )
            for length in lengths:  # kernels for 4-bit weights are made for decoding
                if length <= longest:
                    seconds = time_prefill(model, length, repeats)
                    rows.append({"model": name, "batch": 1, "context": length, "arm": "prefill", "seconds": seconds})
                    for arm in ("quest", "sketch"):
                        more = seconds[arm] / seconds["stock"] - 1
                        shown = (f"{seconds[arm]:.3f} s", f"{more:+.1%}", "")
                        table.add_row(name, "1", str(length), f"prefill, {arm}", *shown)
                    write()
            del model
            gc.collect()
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
