"""Time decoding inside vLLM, its FlashAttention backend against Quest in the same settings, with random weights.

    python benchmarks/serve_vllm.py --output benchmarks/results/serve_vllm.json
    python benchmarks/serve_vllm.py --bounds kv --sketch 512 --batches 1,4,16,most  # and single tokens by sketches
    python benchmarks/serve_vllm.py --bounds kv --estimates 2048 --no-stock  # without candidates, and without stock
    python benchmarks/serve_vllm.py --bounds "" --sketch 512 --speculate 4 --accept 3 --drafts eagle,lossless

An engine for each arm, in a process of its own. Its random weights are spread as those of a model are when training
begins: with vLLM's own, which are all nearly zero, every token weighs the same, and no choice among them is one. Each
case is a number of sequences with contexts of their own, which a first pass puts into the prefix cache; in the timed
ones, several a case, the engine waits until it has all of them, so that they begin and decode together. Latency is the
time between two tokens of a sequence, throughput that of all. The run fails where Quest did not read what the budget
says (arms without drafts), where its decode steps were not replayed from graphs, or where sequences were preempted.
"most" is as many sequences as the cache of Quest, which is the smaller one, holds of a context and ROOM tokens each;
with sketches, which take more of it than bounds, the cache of theirs. A case of more than that is left out, which the
table and the record say.

With `--speculate` arms are run once more with so many drafts a step: with `--drafts eagle` every arm, by an EAGLE head
of one layer and random weights, whose drafts Quest checks sparse; with `lossless` each arm of Quest, as the model's own
proposer, whose drafts stock attention checks. Random weights say nothing of how many drafts a model keeps: `--accept`
says how many tokens a step writes in the mean, and vLLM then keeps drafts at random (`rejection_sample_method`
"synthetic").
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quest_attention import QuestConfig
from quest_attention.bench.record import write_record
from quest_attention.bench.shapes import SERVED_SHAPES, check_shape
from quest_attention.bench.timing import percentiles
from quest_attention.bench.weights import spread_weights
from quest_attention.cli.app import integers, split_list
from quest_attention.config import enough_candidates
from quest_attention.errors import QuestValueError

CONTEXTS = (8192, 32768, 131072)
MOST = "most"
BATCHES = ("1", "4", MOST)
ROOM = 512
"""Tokens that a sequence may grow beyond its context, or less [tokens]."""
STOCK = "stock"
"""The arm without Quest."""
QUEST = "quest"
SKETCH = "sketch"
ESTIMATES = "estimates"
"""What the names of the arms with bounds, with sketches, and with their estimates alone begin with."""
EAGLE = "eagle"
LOSSLESS = "lossless"
"""How the names of arms go on that check an EAGLE head's drafts, and of those that draft with Quest."""
MOST_DRAFTS = 15
"""Of a step: a row that chooses has 16 tokens at most."""
DEVICES = ("cuda", "cpu")
MOST_EAGER = 8
"""Decode steps of a timed pass that may run outside of a graph: those that prompts share with decoding rows."""
ARM = "QUEST_BENCHMARK_ARM"
"""Environment variable that makes this script the process of an arm; holds its options as JSON."""


def write_config(folder: Path, model: str, positions: int, **changes: Any) -> None:
    """A model without weights or tokenizer."""
    shape = {"torch_dtype": "bfloat16", "max_position_embeddings": positions, "bos_token_id": 1, "eos_token_id": 2}
    config = {**SERVED_SHAPES[model], **shape}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def speculation(options: dict[str, Any], head: Path) -> dict[str, Any]:
    """What vLLM is told of an arm's drafts, with the folder of an EAGLE head."""
    found: dict[str, Any] = {"num_speculative_tokens": options["speculate"]}
    if options["drafts"] == LOSSLESS:
        found |= {"method": "custom_class", "model": "quest_attention.vllm.proposer.QuestProposer"}
    else:
        found |= {"method": EAGLE, "model": str(head)}
    if options["accept"]:
        found |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": options["accept"]}
    return found


def settings_of(options: dict[str, Any], longest: int) -> dict[str, Any]:
    """What an arm's engine is made with, but for the model and its drafts."""
    is_gpu = options["device"] == "cuda"
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16" if is_gpu else "float32",
        "max_model_len": longest,
        "tensor_parallel_size": options["tensor_parallel"],
        "quantization": options["quantization"],
        "kv_cache_dtype": options["kv_cache_dtype"],
        "disable_log_stats": False,
        "seed": options["seed"],
        "additional_config": dict(options["additional_config"]),
    }
    if is_gpu:
        memory, most = options["gpu_memory_utilization"], options["max_num_seqs"]
        settings |= {"gpu_memory_utilization": memory, "attention_backend": "FLASH_ATTN", "max_num_seqs": most}
    else:
        settings |= {"enforce_eager": True, "block_size": 32}
    if options["budget"]:
        settings["additional_config"]["quest"] = {"token_budget": options["budget"], **options["quest"]}
        settings |= {
            "attention_backend": "CUSTOM",
            "worker_extension_cls": "quest_attention.vllm.worker.QuestWorkerExtension",
        }
    return settings


def measure_arm(options: dict[str, Any]) -> dict[str, Any]:
    """All cases of an arm, in this process."""
    import vllm  # noqa: PLC0415 (the parent must not touch the GPU)
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    longest, is_gpu = max(options["contexts"]) + ROOM, options["device"] == "cuda"
    settings = settings_of(options, longest)
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder) / "model", options["model"], longest)
        if options["drafts"]:
            write_config(Path(folder) / EAGLE, options["model"], longest, num_hidden_layers=1)
            settings["speculative_config"] = speculation(options, Path(folder) / EAGLE)
        llm = LLM(model=str(Path(folder) / "model"), **settings)
        llm.apply_model(spread_weights)
        cache = llm.llm_engine.vllm_config.cache_config
        pool = cache.num_gpu_blocks * cache.block_size
        rows, left_out = [], []
        for context in options["contexts"]:
            most = options["most"].get(str(context)) or max(1, pool // (context + ROOM))
            for batch in dict.fromkeys(most if name == MOST else int(name) for name in options["batches"]):
                if batch > most:
                    left_out.append({"context": context, "batch": batch, "most": most})
                    continue
                vocabulary = SERVED_SHAPES[options["model"]]["vocab_size"]
                # The prompts of a longer context begin with those of a shorter one, which are in the cache already.
                prompts = [
                    {"prompt_token_ids": random.Random(index).choices(range(3, vocabulary), k=longest)[:context]}
                    for index in range(batch)
                ]
                params = {"temperature": 0, "ignore_eos": True, "detokenize": False}
                llm.generate(prompts, SamplingParams(max_tokens=1, **params), use_tqdm=False)
                if options["budget"]:
                    llm.collective_rpc("quest_reset")
                params = SamplingParams(max_tokens=options["tokens"], **params)
                before = counted(llm)
                passes = [decode_together(llm, prompts, params) for _ in range(options["repeats"])]
                row = {"context": context, "batch": batch, **times_of(passes)}
                if options["drafts"]:
                    row["drafts"] = {name: number - before[name] for name, number in counted(llm).items()}
                if options["budget"]:
                    row["counters"] = check_counters(llm, batch, options, cache.block_size, is_gpu=is_gpu)
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
        preempted = metric(llm, "num_preemptions")
    graphs = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
    if preempted:
        raise RuntimeError(f"{preempted} sequences were preempted: the cases do not fit the cache")
    if not rows:
        raise RuntimeError(f"a cache of {pool} tokens holds none of the cases: {left_out}")
    said = {name: settings.get(name) for name in ("gpu_memory_utilization", "max_num_seqs", "max_model_len")}
    engine = {"vllm": vllm.__version__, "pool_tokens": pool, "block_size": cache.block_size, "cudagraph_mode": graphs}
    return {"rows": rows, "left_out": left_out, **engine, **said}


def metric(llm: Any, name: str) -> int:
    """One of vLLM's counters."""
    return int(sum(one.value for one in llm.get_metrics() if one.name == f"vllm:{name}"))


def counted(llm: Any) -> dict[str, int]:
    """Rows that checked drafts, drafts, and those that were kept."""
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return {name: metric(llm, f"spec_decode_{name}") for name in names}


def decode_together(llm: Any, prompts: list[Any], params: Any) -> list[Any]:
    """Sequences that begin in the same step, with their times: requests are taken in one by one, which takes time."""
    llm.sleep(level=0, mode="keep")  # schedules nothing, takes requests
    llm.enqueue(prompts, params, use_tqdm=False)
    llm.wake_up(tags=["scheduling"])
    return [one.metrics for one in llm.wait_for_completion(use_tqdm=False)]


def times_of(passes: list[list[Any]]) -> dict[str, Any]:
    """Milliseconds between tokens over the sequences of all passes of a case, and tokens a second of all."""
    stats = [one for each in passes for one in each]
    latencies = [(one.last_token_ts - one.first_token_ts) * 1e3 / (one.num_generation_tokens - 1) for one in stats]
    seconds = sum(max(one.last_token_ts for one in each) - min(one.first_token_ts for one in each) for each in passes)
    tokens = sum(one.num_generation_tokens - 1 for one in stats)
    return {"ms_between_tokens": percentiles(latencies), "tokens_per_second": round(tokens / seconds, 2)}


def check_counters(
    llm: Any, batch: int, options: dict[str, Any], page_size: int, *, is_gpu: bool
) -> list[dict[str, int]]:
    """What each worker read.

    Raises:
        RuntimeError: Quest did not run, read more or less than it should, or ran outside of graphs.
    """
    counters: list[dict[str, int]] = llm.collective_rpc("quest_counters")
    repeats, rows = options["repeats"], options["tokens"]
    if options["drafts"]:  # of so many tokens, if all drafts are kept; where Quest drafts, a row a draft
        rows = -(-rows // (1 + options["speculate"])) * (options["speculate"] if options["drafts"] == LOSSLESS else 1)
    for worker in counters:
        ran = worker["sparse_rows"] + worker["verified_sparse_rows"]
        # The last drafts of an answer may be more than it has tokens left.
        if ran < batch * repeats * (rows - MOST_EAGER) or not ran:
            raise RuntimeError(f"Quest ran for {ran} rows of {repeats} x {batch} x {rows}")
        fewest, budget = fewest_read(options, page_size), options["budget"]
        if not options["drafts"] and not fewest <= worker["tokens_read"] / ran <= budget:
            raise RuntimeError(f"a row read {worker['tokens_read'] / ran} tokens, expected {fewest} to {budget}")
        if is_gpu and worker["eager_steps"] > repeats * MOST_EAGER:
            raise RuntimeError(f"{worker['eager_steps']} decode steps were not replayed from a graph")
    return counters


def fewest_read(options: dict[str, Any], page_size: int) -> int:
    """Tokens that a row past the budget reads at least: the budget, but for what estimates alone may leave of it."""
    budget: int = options["budget"]
    if options["quest"].get("candidate_factor") == 0:
        return budget // 2  # about four fifths are read, by a threshold that a sample gives
    return budget if options["quest"]["metadata"] == "sketch" else budget // page_size * page_size


def check_arguments(
    contexts: str,
    batches: str,
    bounds: str,
    sketch: str,
    budget: int,
    device: str,
    estimates: str = "",
    stock: bool = True,
    speculate: int = 0,
    accept: float = 0,
    drafts: tuple[str, ...] = (),
    draft_dense_layers: int = 2,
) -> tuple[list[int], tuple[str, ...], list[dict[str, Any]]]:
    """Contexts, batches and arms of Quest, before an engine starts.

    Those arms come first whose cache holds fewest tokens: they say how many sequences fit.

    Raises:
        QuestValueError: One is wrong.
    """
    if device not in DEVICES:
        raise QuestValueError("device", device, " or ".join(DEVICES))
    numbers = integers("contexts", contexts)
    budgets = integers("sketch", sketch) if sketch else []
    alone = integers("estimates", estimates) if estimates else []
    names, kinds = split_list(batches), split_list(bounds)
    largest = max([budget] * bool(kinds) + budgets + alone, default=budget)
    if min(numbers) <= largest:
        raise QuestValueError("contexts", min(numbers), f"more than the budget of {largest}: less is read whole")
    if not names:
        raise QuestValueError("batches", batches, f"positive integers or {MOST!r}, parted by commas")
    for name in names:
        if name != MOST:
            integers("batches", name)
    if not kinds and not budgets and not alone:
        raise QuestValueError("bounds", bounds, "'kv', 'fp8' or both, or budgets for --sketch or --estimates")
    check_drafts(speculate, accept, drafts, device)
    arms = arms_of_quest(kinds, budget, budgets, alone)
    if stock:
        arms.append({"name": STOCK, "budget": 0, "quest": {}})
    if speculate:
        arms = [other for arm in arms for other in with_drafts(arm, speculate, drafts, draft_dense_layers)]
        arms.sort(key=lambda arm: not arm["drafts"])  # what drafts leaves less of the cache
        arms.sort(key=lambda arm: arm["name"].split("-")[0] == STOCK)
    return numbers, names, [{"drafts": "", **arm} for arm in arms]


def arms_of_quest(kinds: tuple[str, ...], budget: int, budgets: list[int], alone: list[int]) -> list[dict[str, Any]]:
    """Arms by bounds of some dtypes, by sketches whose candidates' keys rank tokens, and by estimates alone.

    Raises:
        QuestValueError: A budget is too small for its form.
    """
    arms: list[dict[str, Any]] = []
    for kind, some in ((SKETCH, budgets), (ESTIMATES, alone)):
        for tokens in some:
            factor = enough_candidates("sketch", tokens) if kind == SKETCH else 0
            quest = {"metadata": "sketch", "selection_unit": "token", "candidate_factor": factor}
            arms.append({"name": f"{kind}-{tokens}", "budget": tokens, "quest": quest})
    for kind in kinds:
        name = f"{QUEST}-{budget}" + ("" if kind == "kv" else f"-{kind}")
        arms.append({"name": name, "budget": budget, "quest": {"metadata": "bounds", "metadata_dtype": kind}})
    for arm in arms:
        QuestConfig.from_dict({"token_budget": arm["budget"], **arm["quest"]})
    return arms


def check_drafts(speculate: int, accept: float, drafts: tuple[str, ...], device: str) -> None:
    """Options of arms with drafts.

    Raises:
        QuestValueError: One is wrong.
    """
    if accept and not speculate:
        raise QuestValueError("accept", accept, "--speculate with it, how many drafts a step has")
    if speculate and (not drafts or set(drafts) - {EAGLE, LOSSLESS}):
        raise QuestValueError("drafts", ",".join(drafts), f"{EAGLE!r}, {LOSSLESS!r} or both, parted by commas")
    if accept and device == "cpu":
        raise QuestValueError("accept", accept, "0 on a cpu: vLLM's engine for it keeps drafts as the model says alone")
    if accept and not 1 <= accept <= 1 + speculate:
        raise QuestValueError(
            "accept", accept, f"1 to {1 + speculate} tokens a step: one and those drafts that are kept"
        )


def with_drafts(
    arm: dict[str, Any], speculate: int, drafts: tuple[str, ...], draft_dense_layers: int
) -> list[dict[str, Any]]:
    """An arm, and how it is run with drafts."""
    made = [{**arm, "drafts": ""}]
    if EAGLE in drafts:
        quest = {**arm["quest"], "verify": "sparse"} if arm["budget"] else {}
        made.append({**arm, "name": f"{arm['name']}-{EAGLE}-{speculate}", "quest": quest, "drafts": EAGLE})
    if LOSSLESS in drafts and arm["budget"]:
        quest = {**arm["quest"], "num_dense_layers": draft_dense_layers}
        made.append({**arm, "name": f"{arm['name']}-{LOSSLESS}-{speculate}", "quest": quest, "drafts": LOSSLESS})
    return made


def read_object(name: str, text: str) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        QuestValueError: It is none.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise QuestValueError(name, text, f"JSON: {error}") from None
    if not isinstance(found, dict):
        raise QuestValueError(name, text, "an object of JSON")
    return found


def run_arm(options: dict[str, Any]) -> dict[str, Any]:
    """Measure an arm in a process of its own."""
    environment = {**os.environ, ARM: json.dumps(options), "HF_HUB_OFFLINE": "1"}
    environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of a function to the workers, which are ours
    done = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"arm {options['name']}: exit code {done.returncode}")
    (last,) = [line for line in done.stdout.splitlines() if line.startswith("{")][-1:]  # vLLM may have more to say
    found: dict[str, Any] = json.loads(last)
    return found


def main(
    model: Annotated[str, typer.Option(help="Shape.")] = "llama-3.1-8b",
    contexts: Annotated[str, typer.Option(help="Tokens of a context, comma-separated.")] = ",".join(map(str, CONTEXTS)),
    batches: Annotated[str, typer.Option(help="Sequences at once, comma-separated.")] = ",".join(BATCHES),
    budget: Annotated[int, typer.Option(help="Token budget of Quest with bounds.", min=1)] = 2048,
    tokens: Annotated[int, typer.Option(help="Tokens that each sequence writes.", min=2, max=ROOM)] = 128,
    repeats: Annotated[int, typer.Option(help="Timed passes of a case.", min=1)] = 5,
    bounds: Annotated[
        str, typer.Option(help="Arms of Quest by the dtype of bounds, comma-separated; empty for none.")
    ] = "kv,fp8",
    sketch: Annotated[
        str, typer.Option(help="Arms that read single tokens by sketches: their token budgets, comma-separated.")
    ] = "",
    estimates: Annotated[
        str, typer.Option(help="Arms that read them by estimates alone, without candidates: budgets, comma-separated.")
    ] = "",
    stock: Annotated[bool, typer.Option(help="Run the arm without Quest too.")] = True,
    quantization: Annotated[str | None, typer.Option(help="Of weights, as vLLM names it: fp8.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="Of keys and values, as vLLM names it: fp8.")] = "auto",
    additional_config: Annotated[
        str, typer.Option(help="vLLM's of all arms, as JSON; Quest's options are added to those of its arms.")
    ] = "{}",
    tensor_parallel: Annotated[int, typer.Option(help="GPUs.", min=1)] = 1,
    speculate: Annotated[
        int, typer.Option(help="Drafts of a step in arms that have some; 0 for none.", min=0, max=MOST_DRAFTS)
    ] = 0,
    accept: Annotated[
        float, typer.Option(help="Tokens a step with drafts writes in the mean; 0 for what the model keeps.", min=0)
    ] = 0,
    drafts: Annotated[
        str, typer.Option(help="Whose, comma-separated: an EAGLE head's, or Quest's own, whose answers are stock's.")
    ] = EAGLE,
    draft_dense_layers: Annotated[int, typer.Option(help="Leading layers that drafts by Quest read whole.", min=0)] = 2,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script out.")] = "cuda",
    max_num_seqs: Annotated[
        int, typer.Option(help="Sequences of a step at most, on a GPU: checks by sketches take memory for all.", min=1)
    ] = 128,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of the GPU's memory for weights, cache and what vLLM counts.", min=0.1, max=1)
    ] = 0.92,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time vLLM with and without Quest."""
    lengths, sequences, arms = check_arguments(
        contexts,
        batches,
        bounds,
        sketch,
        budget,
        device,
        estimates,
        stock,
        speculate,
        accept,
        split_list(drafts),
        draft_dense_layers,
    )
    shared: dict[str, Any] = {
        "model": check_shape(model, SERVED_SHAPES),
        "contexts": lengths,
        "batches": sequences,
        "tokens": tokens,
        "repeats": repeats,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "tensor_parallel": tensor_parallel,
        "additional_config": read_object("additional_config", additional_config),
        "device": device,
        "seed": seed,
        "speculate": speculate,
        "accept": accept,
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
    }
    asked = {arm["name"]: {"token_budget": arm["budget"], **arm["quest"]} for arm in arms if arm["budget"]}
    settings = {**shared, "token_budget": budget, "num_dense_layers": 2, "arms": asked}
    most: dict[str, int] = {}
    found: dict[str, Any] = {}
    for arm in arms:  # Quest first: it says how many sequences fit
        found[arm["name"]] = run_arm({**shared, **arm, "most": most})
        for row in found[arm["name"]]["rows"]:
            most[str(row["context"])] = max(row["batch"], most.get(str(row["context"]), 0))
        if output is not None:  # a later arm may fail; the record itself asks the GPU, and would take memory from it
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({"settings": settings, "arms so far": found}, indent=1) + "\n")
    if output is not None:
        engines = {name: {key: one[key] for key in one if key != "rows"} for name, one in found.items()}
        write_record(output, {**settings, "engines": engines}, compare(found))
    table = Table("context", "batch", "arm", "ms between tokens", "tokens/s", "to stock")
    for row in compare(found):
        numbers = f"{row['ms_between_tokens']['p50']:.2f}", f"{row['tokens_per_second']:.0f}"
        ratio = "" if row["ratio_to_stock"] is None else f"{row['ratio_to_stock']:.2f}x"
        table.add_row(f"{row['context']}", f"{row['batch']}", row["arm"], *numbers, ratio)
    for one in found[arms[-1]["name"]]["left_out"]:
        table.add_row(f"{one['context']}", f"{one['batch']}", "left out", f"the cache holds {one['most']}")
    Console(width=100).print(table)


def compare(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all arms, case by case, stock first, with how many times faster each is than stock.

    And than stock with the same drafts, where arms have some. None before such an arm ran.
    """
    of_stock = {name: arm["rows"] for name, arm in found.items() if name.split("-")[0] == STOCK}
    plain, drafting = of_stock.pop(STOCK, []), [row for rows in of_stock.values() for row in rows]
    rows = []
    for name, arm in found.items():
        for row in arm["rows"]:
            made = {"arm": name, **row, "ratio_to_stock": times_faster(row, plain)}
            if "drafts" in row:
                made["ratio_to_stock_with_drafts"] = times_faster(row, drafting)
            rows.append(made)
    kinds = (STOCK, QUEST, SKETCH, ESTIMATES)
    return sorted(
        rows, key=lambda row: (row["context"], row["batch"], kinds.index(row["arm"].split("-")[0]), row["arm"])
    )


def times_faster(row: dict[str, Any], stock: list[dict[str, Any]]) -> float | None:
    """Than the same case of stock, or None where that is not there."""
    for base in stock:
        if (base["context"], base["batch"]) == (row["context"], row["batch"]):
            return float(base["ms_between_tokens"]["p50"] / row["ms_between_tokens"]["p50"])
    return None


if __name__ == "__main__":
    if ARM in os.environ:
        print("\n" + json.dumps(measure_arm(json.loads(os.environ[ARM]))))
    else:
        typer.run(main)
