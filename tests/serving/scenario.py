"""Scenarios with a vLLM engine, one a process: `python scenario.py NAME` prints what happened as JSON, last.

A process of its own, because an engine keeps threads and memory, and warns in ways that are not ours to mend.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

import quest_attention
from cores import engine_environment, own_cores
from mixed_models import ALL, BASE, FAMILIES, WITH_STATES, save, token_prompts
from quest_attention.models import bundled_model_path

MAX_MODEL_LEN = 2048
BLOCK = 32
"""Smallest block that every release of vLLM takes on a CPU [tokens]."""
BUDGET = 4 * BLOCK
ANSWER = 10
"""Tokens of an answer."""
OWN_BUDGETS = (None, 2 * BLOCK, "none", 3 * BLOCK, 2 * BLOCK)
"""What requests ask for in a batch [tokens]."""
ORACLE = {"worker_extension_cls": "vllm_oracle.OracleExtension"}
SIMULATED_ORACLE = {"worker_extension_cls": "gpu_on_cpu.SimulatedOracle"}
GPU_ORACLE = {"worker_extension_cls": "gpu_oracle.GPUOracleExtension"}
HELPERS = Path(__file__).parent.parent / "ops"
"""Where it finds `token_choice`."""
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "CopyingSpec",
        "spec_module_path": "moved_blocks",
        "cpu_bytes_to_use": 1 << 28,
    },
}
FROM_PROMPT = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 2}
"""Speculation that needs no model."""


def book() -> str:
    """The book in the package."""
    return (Path(quest_attention.__file__).parent / "eval" / "books" / "south.txt").read_text(encoding="utf-8")


def prompts(count: int, words: int) -> list[str]:
    """Different passages of the book in the package, each with a pass key in it and a question behind."""
    made, text = [], book().split()
    for index in range(count):
        passage = text[index * 531 : index * 531 + words]
        passage.insert(words // 3, f"The pass key is {48213 + index}. Remember it.")
        made.append(" ".join(passage) + " What is the pass key? The pass key is")
    return made


def make_llm(quest: dict[str, Any] | None, **options: Any) -> Any:
    """An engine with the bundled model; stock without options of Quest, which are those of bounds unless they say."""
    from vllm import LLM

    settings = {
        "model": str(bundled_model_path()),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "disable_log_stats": False,
        "seed": 0,
    }
    more = options.pop("additional_config", {})
    if quest is not None:
        settings["attention_backend"] = "CUSTOM"
        more = {**more, "quest": {"metadata": "bounds"} | quest}
    return LLM(**(settings | options), additional_config=more)


def answers(llm: Any, texts: list[str], tokens: int = ANSWER, temperature: float = 0) -> list[list[int]]:
    """Of so many tokens each, greedy or sampled."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=1)
    return [list(one.outputs[0].token_ids) for one in llm.generate(texts, params, use_tqdm=False)]


def greedy(llm: Any, prompts: list[Any]) -> dict[str, list[Any]]:
    """Answers to prompts of tokens, with the log-probability of each token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, logprobs=0, detokenize=False)
    found = [done.outputs[0] for done in llm.generate(prompts, params, use_tqdm=False)]
    return {
        "tokens": [list(one.token_ids) for one in found],
        "logprobs": [[next(iter(step.values())).logprob for step in one.logprobs] for one in found],
    }


def metrics(llm: Any) -> dict[str, float]:
    """vLLM's own counters."""
    return {metric.name.removeprefix("vllm:"): metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def checked(llm: Any, batches: list[list[str]], tokens: int = ANSWER, temperature: float = 0) -> dict[str, Any]:
    """Answers to batches with the oracle on, what it saw, and vLLM's and Quest's counters."""
    llm.collective_rpc("install_oracle")
    llm.collective_rpc("quest_reset")
    given = [answers(llm, batch, tokens, temperature) for batch in batches]
    return {
        "answers": given,
        "oracle": llm.collective_rpc("oracle_report"),
        "counters": llm.collective_rpc("quest_counters"),
        "metrics": metrics(llm),
    }


def stock() -> dict[str, Any]:
    """Without Quest: long and short rows, alone and together."""
    return {"answers": answers(make_llm(None), prompts(3, 600) + prompts(2, 40))}


def budget_of_the_context() -> dict[str, Any]:
    """With Quest and budgets that every row fits: one that covers the model, and one that covers these rows."""
    found = {}
    for budget in (MAX_MODEL_LEN, MAX_MODEL_LEN - BLOCK):
        llm = make_llm(
            {"token_budget": budget}, worker_extension_cls="quest_attention.vllm.worker.QuestWorkerExtension"
        )
        found[str(budget)] = {
            "answers": answers(llm, prompts(3, 600) + prompts(2, 40)),
            "counters": llm.collective_rpc("quest_counters"),
        }
        del llm
    return found


def api() -> dict[str, Any]:
    """What clients ask for beside plain answers, one after the other: text or numbers, and what Quest counted."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    llm = make_llm({"token_budget": BUDGET}, enable_lora=True, max_lora_rank=8, **ORACLE)
    texts = prompts(2, 400)

    def ask(lora: Any = None, count: int = 2, **params: Any) -> list[Any]:
        params = {"temperature": 0, "max_tokens": ANSWER, "ignore_eos": True} | params
        return list(llm.generate(texts[:count], SamplingParams(**params), lora_request=lora, use_tqdm=False))

    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder))
        tried = {
            "plain": lambda: [one.outputs[0].text for one in ask()],
            "LoRA": lambda: [one.outputs[0].text for one in ask(LoRARequest("random", 1, folder))],
            "logprobs": lambda: [len(one.outputs[0].logprobs) for one in ask(logprobs=3)],
            # One prompt: of two vLLM 0.32 fails where LoRA is on, without Quest too.
            "prompt logprobs": lambda: [len(one.prompt_logprobs) for one in ask(count=1, prompt_logprobs=1)],
            "three answers": lambda: [[each.text for each in one.outputs] for one in ask(n=3, temperature=1, seed=3)],
            "structured output": lambda: [
                one.outputs[0].text
                for one in ask(structured_outputs=StructuredOutputsParams(regex=r" [0-9]{5}\."), ignore_eos=False)
            ],
            "penalties": lambda: [one.outputs[0].text for one in ask(frequency_penalty=2.0, presence_penalty=2.0)],
            "beam search": lambda: [
                [each.text[len(text) :] for each in found.sequences]
                for text, found in zip(
                    texts,
                    llm.beam_search([{"prompt": text} for text in texts], BeamSearchParams(3, ANSWER)),
                    strict=True,
                )
            ],
        }
        llm.collective_rpc("install_oracle")
        found = {}
        for name, run in tried.items():
            llm.collective_rpc("quest_reset")
            found[name] = {"given": run(), "counters": llm.collective_rpc("quest_counters")[0]}
    return {"tried": found, "oracle": llm.collective_rpc("oracle_report")}


def own_budgets(oracle: dict[str, Any] = ORACLE, **kept: Any) -> dict[str, Any]:
    """Requests with budgets of their own, one of which is none, beside others in the same batches; then each alone."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm = make_llm({"token_budget": BUDGET, **kept}, **oracle)
    texts = prompts(len(OWN_BUDGETS), 400)
    llm.collective_rpc("install_oracle")
    alone = [slice(place, place + 1) for place in range(len(texts))]
    found = {"together": ask_own(llm, texts, [slice(None)]), "alone": ask_own(llm, texts, alone)}

    def refusal(asked: Any) -> str:
        try:
            llm.generate(texts[0], SamplingParams(extra_args={"quest_token_budget": asked}), use_tqdm=False)
        except VLLMValidationError as error:
            return str(error)
        return "none"

    return {
        **found,
        "refused": [refusal(asked) for asked in (BUDGET + 1, 1, "all")],
        "oracle": llm.collective_rpc("oracle_report"),
    }


def ask_own(llm: Any, texts: list[str], batches: list[slice], *, plain: bool = False) -> dict[str, Any]:
    """Answers to texts with `OWN_BUDGETS`, or, if `plain`, with the server's, some at a time, and what was counted."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=ANSWER, ignore_eos=True, logprobs=0,
            extra_args=None if plain or asked is None else {"quest_token_budget": asked},
        )
        for asked in OWN_BUDGETS
    ]  # fmt: skip
    llm.collective_rpc("quest_reset")
    done = [one for batch in batches for one in llm.generate(texts[batch], params[batch], use_tqdm=False)]
    return {
        "answers": [list(one.outputs[0].token_ids) for one in done],
        "logprobs": [[next(iter(step.values())).logprob for step in one.outputs[0].logprobs] for one in done],
        "lengths": [len(one.prompt_token_ids) for one in done],
        "counters": llm.collective_rpc("quest_counters")[0],
    }


def own_budgets_of_sketches() -> dict[str, Any]:
    """The same where single tokens are chosen."""
    return own_budgets(**SKETCH)


def own_budgets_in_the_adapter_of_a_gpu() -> dict[str, Any]:
    """The same in a GPU's adapter."""
    from quest_attention.vllm import plugin

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    return own_budgets(SIMULATED_ORACLE, **SKETCH)


def save_adapter(folder: Path) -> None:
    """Random LoRA weights for the bundled model's queries and values."""
    config = json.loads((bundled_model_path() / "config.json").read_text())
    hidden, dim = config["hidden_size"], config["head_dim"]
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in (("q_proj", config["num_attention_heads"]), ("v_proj", config["num_key_value_heads"])):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(8, hidden, generator=draw) / 8
            weights[f"{at}.lora_B.weight"] = torch.randn(heads * dim, 8, generator=draw) / 8
    save_file(weights, folder / "adapter_model.safetensors")
    says = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(says | {"target_modules": ["q_proj", "v_proj"]}))


def off() -> dict[str, Any]:
    """Installed and not asked for: the stock classes, and pages of the stock size."""
    llm = make_llm(None)
    layer = next(iter(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()))
    return {"backend": layer.attn_backend.__name__, "impl": type(layer.impl).__name__}


def prefix_and_chunks() -> dict[str, Any]:
    """Prompts in chunks beside rows that decode, then the same prompts out of the prefix cache."""
    llm = make_llm({"token_budget": BUDGET}, max_num_batched_tokens=192, **ORACLE)
    texts = prompts(3, 600) + prompts(1, 40)
    return checked(llm, [texts, texts])


PREFIXES = tuple(map(int, os.environ.get("QUEST_PREFIXES", "128,512,513,640").split(",")))
"""Lengths of prompts, each the beginning of the next [tokens]. The first is the budget: a multiple of the block."""


def prefix_prompts(ids: list[int], length: int) -> list[tuple[list[int], int]]:
    """Prompts that share the beginning of one of a length, and how many of their tokens the prefix cache then has.

    The same, one token less, one more, and one that leaves it a token before its end and ends in mid-block.
    """
    tail = [token for token in ids[length:] if token != ids[length - 1]][: (BLOCK // 2 - length + 1) % BLOCK + BLOCK]
    left = ids[: length - 1] + tail
    assert len(left) % BLOCK == BLOCK // 2
    made = [(ids[:size], size - 1) for size in (length, length - 1, length + 1)] + [(left, length - 1)]
    return [(prompt, shared // BLOCK * BLOCK) for prompt, shared in made]


def reuse_prefixes(quest: dict[str, Any] | None) -> dict[str, Any]:
    """Prompts at odd lengths from nothing, then out of the prefix cache, alone and together.

    In a pool that a prompt and a half fill, so that blocks are used again.
    """
    longest = max(PREFIXES) + 2 * BLOCK + ANSWER
    most = -(-longest // BLOCK) * BLOCK
    options = {"max_model_len": most, **ORACLE}
    options["num_gpu_blocks_override"] = most // BLOCK * 3 // 2
    options["max_num_batched_tokens"] = most // 4 // BLOCK * BLOCK + BLOCK // 4  # chunks that end in mid-block
    llm = make_llm(None if quest is None else {"token_budget": PREFIXES[0], **quest}, **options)
    ids = llm.get_tokenizer()(book()).input_ids
    asked = [(length, *one) for length in PREFIXES for one in prefix_prompts(ids, length)]
    if quest is not None:
        llm.collective_rpc("install_oracle")
        llm.collective_rpc("quest_reset")
    emptied, fresh, reused = [], [], []

    def ask(prompt: list[int]) -> dict[str, Any]:
        before = metrics(llm)["prefix_cache_hits"]
        (tokens,), (logprobs,) = greedy(llm, [{"prompt_token_ids": prompt}]).values()
        return {"tokens": tokens, "logprobs": logprobs, "hits": metrics(llm)["prefix_cache_hits"] - before}

    for _, prompt, _ in asked:
        emptied.append(llm.reset_prefix_cache())  # which is refused while a block is in use
        fresh.append(ask(prompt))
    emptied.append(llm.reset_prefix_cache())
    for index, (length, prompt, _) in enumerate(asked):
        if index == 0 or length != asked[index - 1][0]:
            ask(ids[:length])
        reused.append(ask(prompt))
    together = greedy(llm, [{"prompt_token_ids": prompt} for _, prompt, _ in asked])
    emptied.append(llm.reset_prefix_cache())
    found = {"lengths": [len(prompt) for _, prompt, _ in asked], "expected": [shared for *_, shared in asked]}
    found |= {"emptied": emptied, "fresh": fresh, "reused": reused, "together": together}
    if quest is not None:
        found |= {"oracle": llm.collective_rpc("oracle_report"), "counters": llm.collective_rpc("quest_counters")}
    return found


def stock_prefixes() -> dict[str, Any]:
    """What stock shows against itself."""
    return reuse_prefixes(None)


def prefixes() -> dict[str, Any]:
    """With bounds."""
    return reuse_prefixes({})


def sketch_prefixes() -> dict[str, Any]:
    """With single tokens by sketches."""
    return reuse_prefixes(SKETCH)


def one_token_more_than_blocks() -> dict[str, Any]:
    """A prompt whose last token is left alone by a prefix hit: what it answers the second time."""
    from vllm import SamplingParams

    llm = make_llm({"token_budget": BUDGET}, **ORACLE)
    ids = llm.get_tokenizer()(prompts(1, 600)[0]).input_ids
    ids = ids[: (len(ids) - 1) // BLOCK * BLOCK + 1]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    found = []
    for _ in range(2):
        (done,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        found.append(next(iter(done.outputs[0].logprobs[0].values())).logprob)
    return {"logprobs": found, "counters": llm.collective_rpc("quest_counters"), "metrics": metrics(llm)}


def bfloat16() -> dict[str, Any]:
    """bf16, forced pages, a mean over the group, no dense layer, bounds in 8 bits."""
    quest = {
        "token_budget": BUDGET,
        "num_dense_layers": 0,
        "num_sink_pages": 1,
        "num_recent_pages": 2,
        "group_reduction": "mean",
        "metadata_dtype": "fp8",
    }
    return checked(make_llm(quest, dtype="bfloat16", **ORACLE), [prompts(2, 500)])


def preemption() -> dict[str, Any]:
    """A pool too small for all rows: some are preempted, lose their blocks and are computed anew."""
    return checked(make_llm({"token_budget": BUDGET}, **small_pool(28), **ORACLE), [prompts(4, 230)], tokens=40)


def moments() -> dict[str, Any]:
    """Mean and deviation in place of bounds: chunks, preempted rows, blocks used again and out of the prefix cache."""
    quest = {"token_budget": BUDGET, "metadata": "moments", "moments_coefficient": 0.5}
    pool = {**small_pool(26), "enable_prefix_caching": True}
    texts = prompts(4, 230)
    return checked(make_llm(quest, max_num_batched_tokens=192, **pool, **ORACLE), [texts, texts[2:]], tokens=40)


def auto() -> dict[str, Any]:
    """What auto is on a CPU, in blocks laid out for it; rows out of the prefix cache."""
    llm = make_llm({"token_budget": BUDGET, "metadata": "auto"}, **ORACLE)
    texts = prompts(2, 400) + prompts(1, 40)
    found = checked(llm, [texts, texts])
    return {**found, "form": llm.collective_rpc("quest_form")}


SKETCH = {"metadata": "sketch", "selection_unit": "token"}


def sketch_budget_of_the_context() -> dict[str, Any]:
    """Single tokens by sketches, with a budget that these rows fit."""
    quest = {"token_budget": MAX_MODEL_LEN - BLOCK, **SKETCH}
    llm = make_llm(quest, worker_extension_cls="quest_attention.vllm.worker.QuestWorkerExtension")
    return {
        "answers": answers(llm, prompts(3, 600) + prompts(2, 40)),
        "counters": llm.collective_rpc("quest_counters"),
    }


def sketch_prefix_and_chunks() -> dict[str, Any]:
    """Single tokens by sketches: prompts in chunks beside rows that decode, then out of the prefix cache, then anew."""
    llm = make_llm({"token_budget": BUDGET, **SKETCH}, max_num_batched_tokens=192, **ORACLE)
    texts = prompts(2, 600) + prompts(1, 40)
    return checked(llm, [texts, texts])


def sketch_preemption() -> dict[str, Any]:
    """Runs of four tokens by sketches, in bf16 and by mass: preempted rows, blocks used again and prefix hits."""
    quest = {"token_budget": BUDGET, "metadata": "sketch", "selection_unit": 4, "group_reduction": "mass"}
    pool = {**small_pool(26), "enable_prefix_caching": True}
    texts = prompts(4, 230)
    llm = make_llm(quest, dtype="bfloat16", max_num_batched_tokens=192, **pool, **ORACLE)
    return checked(llm, [texts, texts[2:]], tokens=40)


def sketch_pages() -> dict[str, Any]:
    """Whole pages by sketches, ranked in one stage: vLLM's kernel attends."""
    quest = {"token_budget": BUDGET, "metadata": "sketch", "candidate_factor": 0}
    return checked(make_llm(quest, **ORACLE), [prompts(2, 400)])


def sketch_speculation() -> dict[str, Any]:
    """Sketches of pages that were written again after tokens were taken back."""
    llm = make_llm({"token_budget": BUDGET, **SKETCH}, speculative_config=FROM_PROMPT, **ORACLE)
    return checked(llm, [prompts(2, 400)], tokens=40, temperature=0.7)


CHUNKS = {"max_num_batched_tokens": 192}
FAMILY_LENGTHS = (400, 330, 50)
"""Two rows past the budget and one within it, together [tokens]."""


def family(
    name: str, make: Callable[..., Any] = make_llm, quest: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A model of several kinds of layers: stock, with a budget of the context, and sparse with the oracle.

    Args:
        name: Of the family.
        make: What makes an engine.
        quest: Options under "quest" in place of the family's.
        more: Options of the engine.
    """
    from vllm import ModelRegistry

    one, prompts = ALL[name], token_prompts(FAMILY_LENGTHS)
    kept = {"num_dense_layers": 1, **(one.quest if quest is None else quest)}
    with tempfile.TemporaryDirectory() as folder:
        architecture = save(one, Path(folder))
        # In this process: vLLM would look at the class in another, which takes long.
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
        options = {"model": folder, "skip_tokenizer_init": True, "max_model_len": 1024, "max_num_seqs": 4, **ORACLE}
        pool = {"num_gpu_blocks_override": one.blocks}
        options |= {"num_gpu_blocks_override": 256} | one.engine | more
        llm = make(None, **options)
        found = {"stock": greedy(llm, prompts)}
        stop(llm)
        llm = make({"token_budget": 1024 - BLOCK, **kept}, **options)
        found["whole"] = greedy(llm, prompts) | {"counters": llm.collective_rpc("quest_counters")}
        stop(llm)
        llm = make({"token_budget": BUDGET, **kept}, **CHUNKS | options | pool)
        llm.collective_rpc("install_oracle")
        llm.collective_rpc("quest_reset")
        found["sparse"] = greedy(llm, prompts)
        found["again"] = greedy(llm, prompts)
        asked = {"oracle": "oracle_report", "counters": "quest_counters", "groups": "quest_groups"}
        if make is make_llm:
            asked["form"] = "quest_form"
        found |= {name: llm.collective_rpc(method) for name, method in asked.items()} | {"metrics": metrics(llm)}
        llm.collective_rpc("remove_oracle")
        stop(llm)
        return found


def stop(llm: Any) -> None:
    """End an engine of this process before another starts, which shares what it takes down."""
    llm.llm_engine.engine_core.shutdown()


def families(names: Iterable[str], **options: Any) -> dict[str, Any]:
    """Several, one after another."""
    with mock.patch.object(gc, "collect", return_value=0):  # half of the time of engines so small, and none is large
        return {name: family(name, **options) for name in names}


def windowed() -> dict[str, Any]:
    """Families with windows and chunks."""
    return families(FAMILIES)


def with_states() -> dict[str, Any]:
    """Families with states."""
    return families(WITH_STATES)


def small_pool(blocks: int) -> dict[str, Any]:
    """Options of a pool of so few blocks that two rows of 400 tokens fit as they begin, and not as they end."""
    return {"num_gpu_blocks_override": blocks, "max_model_len": 448, "enable_prefix_caching": False}


def speculation() -> dict[str, Any]:
    """n-gram speculation: rows of several tokens, some of which are taken back."""
    llm = make_llm({"token_budget": BUDGET}, speculative_config=FROM_PROMPT, **ORACLE)
    return checked(llm, [prompts(3, 500)], tokens=40, temperature=0.7)


VERIFY = {"verify": "sparse"}


def save_eagle(folder: Path) -> None:
    """An EAGLE head of a layer for the bundled model: it drafts what the model wrote last, but for a little noise."""
    config = json.loads((bundled_model_path() / "config.json").read_text())
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    wide, narrow = (dim * config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    shapes = {
        "layers.0.self_attn.q_proj": (wide, hidden),
        "layers.0.self_attn.k_proj": (narrow, hidden),
        "layers.0.self_attn.v_proj": (narrow, hidden),
        "layers.0.self_attn.o_proj": (hidden, wide),
        "layers.0.mlp.gate_proj": (inner, hidden),
        "layers.0.mlp.up_proj": (inner, hidden),
        "layers.0.mlp.down_proj": (hidden, inner),
    }
    draw = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape, generator=draw) / shape[1] ** 0.5 for name, shape in shapes.items()}
    weights["fc.weight"] = torch.cat([torch.zeros(hidden, hidden), torch.eye(hidden)], 1)  # of token and model
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.0.{name}.weight"] /= 32
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    weights["embed_tokens.weight"] = torch.randn(config["vocab_size"], hidden, generator=draw)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def eagle(quest: dict[str, Any] | None = None, **oracle: Any) -> dict[str, Any]:
    """An EAGLE head drafts: stock, or beside Quest, with the backend of each layer."""
    with tempfile.TemporaryDirectory() as folder:
        save_eagle(Path(folder))
        drafts = {"method": "eagle", "model": folder, "num_speculative_tokens": 3}
        llm = make_llm(quest, speculative_config=drafts, max_num_batched_tokens=192, **oracle)
        texts = prompts(3, 400) + prompts(1, 40)
        found = checked(llm, [texts], tokens=30) if oracle else {"answers": [answers(llm, texts, 30)]}
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return {**found, "backends": {name: layer.attn_backend.__name__ for name, layer in layers.items()}}


def sparse_eagle() -> dict[str, Any]:
    """Its drafts are checked sparse."""
    return eagle({"token_budget": BUDGET, **VERIFY}, **ORACLE)


def sparse_eagle3() -> dict[str, Any]:
    """An EAGLE-3 head drafts, of dummy weights as the model's then are."""
    config = json.loads((bundled_model_path() / "config.json").read_text())
    head = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    head |= {"draft_vocab_size": config["vocab_size"], "eagle_aux_hidden_state_layer_ids": [1, 2, 4]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config | head))
        drafts = {"method": "eagle3", "model": folder, "num_speculative_tokens": 3}
        options = {"speculative_config": drafts, "load_format": "dummy", "max_num_batched_tokens": 192}
        llm = make_llm({"token_budget": BUDGET, **VERIFY}, **options, **ORACLE)
        found = checked(llm, [prompts(2, 300) + prompts(1, 40)], tokens=20)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return {**found, "backends": {name: layer.attn_backend.__name__ for name, layer in layers.items()}}


def eagle_of_the_context() -> dict[str, Any]:
    """The same with a budget that these rows fit."""
    return eagle({"token_budget": MAX_MODEL_LEN - BLOCK, **VERIFY}, **ORACLE)


def sparse_verification(oracle: dict[str, Any] = ORACLE, **kept: Any) -> dict[str, Any]:
    """Rows that check drafts choose: of different numbers of tokens, beside decode rows and prompts in chunks."""
    options = {"speculative_config": FROM_PROMPT, "max_num_batched_tokens": 192, **oracle}
    llm = make_llm({"token_budget": BUDGET, **VERIFY, **kept}, **options)
    return checked(llm, [repetitive(3, 400) + prompts(1, 40), repetitive(2, 400)], tokens=16)


def sparse_verification_of_sketches() -> dict[str, Any]:
    """The same where single tokens are chosen."""
    return sparse_verification(**SKETCH)


def sparse_verification_in_the_adapter_of_a_gpu(**kept: Any) -> dict[str, Any]:
    """The same in a GPU's adapter, and what it plans for a graph."""
    from quest_attention.vllm import plugin

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    options = {"speculative_config": FROM_PROMPT, "max_num_batched_tokens": 192, "dtype": "bfloat16", "block_size": 16}
    llm = make_llm({"token_budget": BUDGET, **VERIFY, **kept}, **options, **SIMULATED_ORACLE)
    found = checked(llm, [repetitive(3, 400) + prompts(1, 40)], tokens=16)
    return {**found, "planned": llm.collective_rpc("plan_a_capture", args=(1 + FROM_PROMPT["num_speculative_tokens"],))}


def sparse_verification_in_8_bits(**kept: Any) -> dict[str, Any]:
    """The same with keys and values in 8 bits, by scales."""
    from vllm.v1.attention.backends import flash_attn

    from quest_attention.vllm import plugin, scales

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    scales._DEVICES = ("cpu",)
    flash_attn.flash_attn_supports_kv_cache_dtype = lambda *_, **__: True  # which asks for a GPU
    options = {"dtype": "bfloat16", "block_size": 16, "kv_cache_dtype": "fp8", "max_num_batched_tokens": 192}
    quest = {"token_budget": BUDGET, **VERIFY, **kept}
    llm = make_llm(quest, speculative_config=FROM_PROMPT, **options, **SIMULATED_ORACLE)
    llm.collective_rpc("set_scales", args=(0.5, 0.25, 0.125))
    return checked(llm, [repetitive(2, 300) + prompts(1, 40)], tokens=18)


def sparse_verification_of_sketches_in_8_bits() -> dict[str, Any]:
    """The same with single tokens by sketches."""
    return sparse_verification_in_8_bits(**SKETCH)


def sparse_verification_of_sketches_in_the_adapter_of_a_gpu() -> dict[str, Any]:
    """The same with single tokens by sketches."""
    return sparse_verification_in_the_adapter_of_a_gpu(**SKETCH)


MTP = {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
"""A family of full attention with a layer that predicts one token more."""


def sparse_mtp() -> dict[str, Any]:
    """A model's own layer drafts, with random weights; its drafts are checked sparse."""
    from quest_attention.bench.weights import spread_weights

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of a function to the worker
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**BASE, **MTP}))
        llm = make_llm(
            {"token_budget": BUDGET, "num_dense_layers": 1, **VERIFY}, model=folder, load_format="dummy",
            skip_tokenizer_init=True, speculative_config={"method": "mtp", "num_speculative_tokens": 1},
            max_model_len=1024, **CHUNKS, **ORACLE,
        )  # fmt: skip
        llm.apply_model(spread_weights)
        llm.collective_rpc("install_oracle")
        llm.collective_rpc("quest_reset")
        found = greedy(llm, token_prompts(FAMILY_LENGTHS))
        asked = {"oracle": "oracle_report", "counters": "quest_counters"}
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        backends = {
            name: layer.attn_backend.__name__ for name, layer in layers.items() if hasattr(layer, "attn_backend")
        }
        found |= {name: llm.collective_rpc(method) for name, method in asked.items()}
        return {**found, "backends": backends, "metrics": metrics(llm)}


DRAFTED = {
    "method": "custom_class",
    "model": "quest_attention.vllm.proposer.QuestProposer",
    "num_speculative_tokens": 3,
}


def drafts_by_quest(oracle: dict[str, Any] = ORACLE, **kept: Any) -> dict[str, Any]:
    """The model drafts for itself with Quest: rows that stop being alike, prompts in chunks, then prefix hits."""
    options = {"speculative_config": DRAFTED, "max_num_batched_tokens": 192, **oracle}
    llm = make_llm({"token_budget": BUDGET, **kept}, **options)
    return checked(llm, [draft_texts(), draft_texts()[:2]], tokens=60)


def draft_texts() -> list[str]:
    """Rows past the budget and one within it."""
    return prompts(3, 400) + prompts(1, 40)


def without_drafts() -> dict[str, Any]:
    """Stock, without speculation, for the same texts."""
    llm = make_llm(None, max_num_batched_tokens=192)
    return {"answers": [answers(llm, texts, 60) for texts in (draft_texts(), draft_texts()[:2])]}


def drafts_by_sketches() -> dict[str, Any]:
    """The same with single tokens."""
    return drafts_by_quest(**SKETCH)


def drafts_in_the_adapter_of_a_gpu(*, is_replayed: bool = False) -> dict[str, Any]:
    """The same in a GPU's adapter."""
    from quest_attention.vllm import plugin

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    if is_replayed:
        from gpu_on_cpu import replay_drafts

        replay_drafts()
    options = {"speculative_config": DRAFTED, "max_num_batched_tokens": 192, "dtype": "bfloat16", "block_size": 16}
    llm = make_llm({"token_budget": BUDGET, **SKETCH}, **options, **SIMULATED_ORACLE)
    if is_replayed:  # the first draft makes what is replayed, as a start does on a GPU, and counters begin after it
        answers(llm, ["The grass is green. " * 20], 8)
    return checked(llm, [draft_texts()], tokens=20)


def replayed_drafts_in_the_adapter_of_a_gpu() -> dict[str, Any]:
    """The same, with draft steps that know on the host neither rows nor lengths, as those that a graph holds."""
    return drafts_in_the_adapter_of_a_gpu(is_replayed=True)


def drafts_where_blocks_run_out() -> dict[str, Any]:
    """Rows that are preempted while drafts hold blocks ahead of them, and that end at the longest sequence."""
    llm = make_llm({"token_budget": BUDGET}, speculative_config=DRAFTED, **small_pool(28), **ORACLE)
    return checked(llm, [prompts(4, 230)], tokens=60)


def without_drafts_where_blocks_run_out() -> dict[str, Any]:
    """Stock, without speculation, likewise."""
    return {"answers": [answers(make_llm(None, **small_pool(28)), prompts(4, 230), 60)]}


def stock_verification(quest: dict[str, Any] | None = None) -> dict[str, Any]:
    """Answers of stock with drafts. An engine of its own: vLLM 0.32 cannot make a second one that speculates."""
    worker = {"worker_extension_cls": "quest_attention.vllm.worker.QuestWorkerExtension"}
    llm = make_llm(quest, speculative_config=FROM_PROMPT, **worker)
    given = answers(llm, repetitive(3, 400) + prompts(1, 40), 40)
    return {"answers": given, "counters": llm.collective_rpc("quest_counters")}


def sparse_verification_of_the_context() -> dict[str, Any]:
    """The same with Quest and a budget that these rows fit."""
    return stock_verification({"token_budget": MAX_MODEL_LEN - BLOCK, **VERIFY})


def sparse_verification_of_the_context_by_sketches() -> dict[str, Any]:
    """The same by sketches."""
    return stock_verification({"token_budget": MAX_MODEL_LEN - BLOCK, **VERIFY, **SKETCH})


def sparse_verification_of_own_budgets() -> dict[str, Any]:
    """Requests with budgets of their own whose rows check drafts."""
    llm = make_llm({"token_budget": BUDGET, **VERIFY}, speculative_config=FROM_PROMPT, **ORACLE)
    llm.collective_rpc("install_oracle")
    texts = repetitive(len(OWN_BUDGETS), 300)
    found = ask_own(llm, texts, [slice(None)])
    return {**found, "oracle": llm.collective_rpc("oracle_report"), "metrics": metrics(llm)}


def sparse_verification_of(name: str) -> dict[str, Any]:
    """The same in a model of several kinds of layers, which drafts often: a token that was there before is enough."""
    from vllm import ModelRegistry

    one = ALL[name]
    with tempfile.TemporaryDirectory() as folder:
        architecture = save(one, Path(folder))
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
        often = FROM_PROMPT | {"prompt_lookup_max": 1, "prompt_lookup_min": 1}
        options = {"model": folder, "skip_tokenizer_init": True, "max_model_len": 1024, "max_num_seqs": 4, **one.engine}
        llm = make_llm(
            {"token_budget": BUDGET, "num_dense_layers": 1, **VERIFY, **one.quest}, speculative_config=often,
            num_gpu_blocks_override=256, **CHUNKS, **options, **ORACLE,
        )  # fmt: skip
        llm.collective_rpc("install_oracle")
        llm.collective_rpc("quest_reset")
        found: dict[str, Any] = greedy(llm, token_prompts(FAMILY_LENGTHS))
        asked = {"oracle": "oracle_report", "counters": "quest_counters", "groups": "quest_groups"}
        return {
            **found,
            **{what: llm.collective_rpc(method) for what, method in asked.items()},
            "metrics": metrics(llm),
        }


def sparse_verification_of_gpt_oss() -> dict[str, Any]:
    """With sinks and windows."""
    return sparse_verification_of("gpt_oss")


def sparse_verification_of_gemma2() -> dict[str, Any]:
    """With softcap and windows."""
    return sparse_verification_of("gemma2")


def repetitive(count: int, words: int) -> list[str]:
    """Different passages of the book that end as they began, so that n-grams of what is written are found in them."""
    return [f"{text[:300]} {text} {text[:250]}" for text in prompts(count, words)]


def adapter_of_a_gpu() -> dict[str, Any]:
    """What a GPU runs, but for the kernels: blocks of 16, prompts in chunks beside decoding rows, prefix hits."""
    from quest_attention.vllm import plugin

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    llm = make_llm(
        {"token_budget": BUDGET}, dtype="bfloat16", max_num_batched_tokens=192, block_size=16, **SIMULATED_ORACLE
    )
    texts = prompts(3, 400) + prompts(1, 40)
    return {**checked(llm, [texts, texts]), "planned": llm.collective_rpc("plan_a_capture")}


def adapter_of_a_gpu_with_sketches() -> dict[str, Any]:
    """The same with sketches, by which single tokens are read."""
    from quest_attention.vllm import plugin

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    quest = {"token_budget": BUDGET, **SKETCH}
    llm = make_llm(quest, dtype="bfloat16", max_num_batched_tokens=192, block_size=16, **SIMULATED_ORACLE)
    texts = prompts(2, 400) + prompts(1, 40)
    return {**checked(llm, [texts, texts]), "planned": llm.collective_rpc("plan_a_capture")}


def adapter_of_a_gpu_in_8_bits() -> dict[str, Any]:
    """The same with keys and values in 8 bits, of pages by bounds and of single tokens by sketches."""
    from vllm.v1.attention.backends import flash_attn

    from quest_attention.vllm import plugin, scales

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    scales._DEVICES = ("cpu",)
    flash_attn.flash_attn_supports_kv_cache_dtype = lambda *_, **__: True  # which asks for a GPU
    found = {}
    for name, quest in (("bounds", {}), ("sketch", SKETCH)):
        llm = make_llm(
            {"token_budget": BUDGET, **quest}, dtype="bfloat16", block_size=16, kv_cache_dtype="fp8",
            max_num_batched_tokens=192, **SIMULATED_ORACLE,
        )  # fmt: skip
        llm.collective_rpc("set_scales", args=(0.5, 0.25, 0.125))
        texts = prompts(2, 400) + prompts(1, 40)
        found[name] = checked(llm, [texts, texts])
        llm.collective_rpc("remove_oracle")
        stop(llm)
    return found


def checkpoint_in_8_bits() -> dict[str, Any]:
    """A checkpoint whose own settings ask for 8 bits, of which vLLM learns as it makes the layers."""
    from vllm.v1.attention.backends import flash_attn

    from quest_attention.vllm import plugin, scales

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(bundled_model_path(), folder)
        config = json.loads((folder / "config.json").read_text())
        in_8_bits = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "kv_cache_scheme": in_8_bits,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        options = {"model": str(folder), "dtype": "bfloat16"}
        try:
            make_llm({"token_budget": BUDGET}, **options)
            refusal = "none"
        except Exception as error:  # noqa: BLE001 - whatever an engine makes of it
            refusal = f"{error} {error.__cause__}"
        scales._DEVICES = ("cpu",)
        flash_attn.flash_attn_supports_kv_cache_dtype = lambda *_, **__: True  # which asks for a GPU
        llm = make_llm({"token_budget": BUDGET}, block_size=16, **SIMULATED_ORACLE, **options)
        found = checked(llm, [prompts(2, 400)])
        return {**found, "refusal": refusal, "stored": llm.llm_engine.vllm_config.cache_config.cache_dtype}


def adapter_of_a_gpu_with_windows() -> dict[str, Any]:
    """The same in models whose other layers are windowed: with sinks, and with several pages in a block."""
    from quest_attention.vllm import plugin

    plugin._BACKENDS["cpu"] = "gpu_on_cpu.SimulatedBackend"
    return families(("gpt_oss", "gemma4_pages"), **SIMULATED_ORACLE)


def whole_blocks(llm: Any, text: str) -> dict[str, list[int]]:
    """The end of a prompt, in as many tokens as fill blocks: its last token is computed where all of it is loaded."""
    ids = llm.get_tokenizer()(text).input_ids
    return {"prompt_token_ids": ids[len(ids) % BLOCK :]}


def offloading() -> dict[str, Any]:
    """Prompts whose blocks are saved by vLLM's offloading connector, made anew by other prompts, and loaded elsewhere.

    On a CPU it is refused, because its own store asks for a GPU; here it has one of a test.
    """
    from quest_attention.vllm import transfers

    transfers._TESTED = {"OffloadingConnector": transfers._ON_A_CPU}
    transfers._STORE = "CopyingSpec"
    pool = {"num_gpu_blocks_override": 65, "max_model_len": 1024}  # prompts of two batches do not fit together
    oracle = {"worker_extension_cls": "moved_blocks.OffloadingOracle"}
    found = {}
    for name, quest in (("bounds", {}), ("sketch", SKETCH)):
        llm = make_llm({"token_budget": BUDGET, **quest}, kv_transfer_config=OFFLOADING, **pool, **oracle)
        one, another, *others = prompts(4, 400)
        texts = [one, whole_blocks(llm, another)]
        found[name] = checked(llm, [texts, others, texts]) | {"moved": llm.collective_rpc("moved_report")}
        llm.collective_rpc("remove_oracle")
        stop(llm)
    return found


def fetched_by_nixl() -> dict[str, Any]:
    """Two engines: one computes prompts, the other fetches their blocks and decodes."""
    return {name: prefill_and_decode(quest) for name, quest in (("bounds", {}), ("sketch", SKETCH))}


def prefill_and_decode(quest: dict[str, Any]) -> dict[str, Any]:
    """The second engine's answers to prompts that the first computed, and those of the first alone."""
    from vllm import SamplingParams

    def make(role: str, core: int, oracle: str) -> Any:
        os.environ |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        connector = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        return make_llm(
            {"token_budget": BUDGET, **quest}, kv_transfer_config=connector, num_gpu_blocks_override=128,
            worker_extension_cls=f"moved_blocks.{oracle}",
        )  # fmt: skip

    def ask(llm: Any, prompt: Any, tokens: int, transfer: dict[str, Any]) -> Any:
        extra = {"kv_transfer_params": transfer}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        (done,) = llm.generate([prompt], params, use_tqdm=False)
        return done

    first_core, second_core = own_cores()[:2]
    first = make("kv_producer", first_core, "PrefillOracle")
    second = make("kv_consumer", second_core, "DecodeOracle")
    for llm in (first, second):
        llm.collective_rpc("install_oracle")
    one, another, other = prompts(3, 400)
    answers(second, [other])  # takes blocks that the first engine's prompts are in there
    second.collective_rpc("quest_reset")
    texts, given = [one, whole_blocks(first, another)], []
    before = second.collective_rpc("oracle_report")[0]["seen"]["rows past the budget"]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "blocks")
        for text in texts:
            where = ask(first, text, 1, {"do_remote_decode": True}).kv_transfer_params
            first.collective_rpc("save_blocks", args=(path, where["remote_block_ids"][0]))
            second.collective_rpc("expect_blocks", args=(path,))
            given.append(list(ask(second, text, ANSWER, where).outputs[0].token_ids))
            moved = second.collective_rpc("moved_report")
    found = {
        "answers": given,
        "alone": answers(first, texts),
        "moved": moved,
        "oracle": second.collective_rpc("oracle_report"),
        "counters": second.collective_rpc("quest_counters"),
        "metrics": metrics(second),
    }
    found["oracle"][0]["seen"]["rows past the budget"] -= before
    for llm in (first, second):
        stop(llm)
    return found


def free_port() -> int:
    """A port of this machine that nobody has."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def tensor_parallel() -> dict[str, Any]:
    """Two ranks, a KV head each."""
    llm = make_llm({"token_budget": BUDGET}, tensor_parallel_size=2, **ORACLE)
    return checked(llm, [prompts(2, 400)], tokens=10)


def one_rank() -> dict[str, Any]:
    """What two ranks are compared with."""
    llm = make_llm({"token_budget": BUDGET}, **ORACLE)
    return checked(llm, [prompts(2, 400)], tokens=10)


def make_gpu_llm(quest: dict[str, Any] | None, **options: Any) -> Any:
    """An engine with the bundled model on a GPU, as a server runs it: compiled, graphs captured."""
    settings = {
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "block_size": 16,
        "enforce_eager": False,
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 2 << 30,  # so that nothing is measured, and several may run on a GPU at once
    }
    if quest is None:
        settings["attention_backend"] = "FLASH_ATTN"
    return make_llm(quest, **(settings | options))


GPU_TEXTS = {"long": (4, 2500), "short": (2, 40)}
"""Prompts of a GPU's scenarios: how many, of how many words."""


def gpu_texts() -> list[str]:
    """Long and short rows."""
    return [text for count, words in GPU_TEXTS.values() for text in prompts(count, words)]


def gpu_stock() -> dict[str, Any]:
    """FlashAttention."""
    return {"answers": answers(make_gpu_llm(None), gpu_texts())}


def gpu_budget_of_the_context() -> dict[str, Any]:
    """A budget that covers the model, and one that covers these rows, whose graphs hold Quest."""
    found = {}
    for budget in (8192, 8192 - BUDGET):
        llm = make_gpu_llm({"token_budget": budget}, **GPU_ORACLE)
        llm.collective_rpc("quest_reset")
        found[str(budget)] = {"answers": answers(llm, gpu_texts()), "counters": llm.collective_rpc("quest_counters")}
        del llm
    return found


def gpu_eager() -> dict[str, Any]:
    """A sampled oracle, with prompts in chunks beside decoding rows, then out of the prefix cache."""
    llm = make_gpu_llm({"token_budget": 256}, enforce_eager=True, max_num_batched_tokens=512, **GPU_ORACLE)
    return checked(llm, [gpu_texts(), gpu_texts()], tokens=40)


def gpu_moments() -> dict[str, Any]:
    """Mean and deviation in place of bounds, eager, with the sampled oracle; blocks that are used again."""
    quest = {"token_budget": BUDGET, "metadata": "moments"}
    llm = make_gpu_llm(quest, enforce_eager=True, max_num_batched_tokens=512, **small_pool(53), **GPU_ORACLE)
    return checked(llm, [prompts(4, 230)], tokens=40)


def gpu_8_bits() -> dict[str, Any]:
    """Keys and values in 8 bits, eager, with the sampled oracle, scales of 1 and others: bounds, then sketches."""
    found = {}
    for name, quest in (("bounds", {}), ("sketch", SKETCH)):
        llm = make_gpu_llm({"token_budget": BUDGET, **quest}, enforce_eager=True, kv_cache_dtype="fp8", **GPU_ORACLE)
        found[name] = checked(llm, [prompts(4, 400)], tokens=20)
        llm.collective_rpc("remove_oracle")
        llm.reset_prefix_cache()  # whose keys were stored by other scales
        llm.collective_rpc("set_scales", args=(0.5, 0.25, 0.125))
        found[f"{name}, scaled"] = checked(llm, [prompts(4, 400)], tokens=20)
        stop(llm)
    return found


def gpu_sketch_budget_of_the_context() -> dict[str, Any]:
    """Single tokens by sketches with a budget that covers these rows, whose graphs hold Quest."""
    llm = make_gpu_llm({"token_budget": 8192 - BUDGET, **SKETCH}, **GPU_ORACLE)
    llm.collective_rpc("quest_reset")
    return {"answers": answers(llm, gpu_texts()), "counters": llm.collective_rpc("quest_counters")}


def gpu_sketch() -> dict[str, Any]:
    """Single tokens by sketches, eager, with the sampled oracle: chunks beside decoding rows, then prefix hits."""
    quest = {"token_budget": 256, **SKETCH}
    llm = make_gpu_llm(quest, enforce_eager=True, max_num_batched_tokens=512, **GPU_ORACLE)
    return checked(llm, [gpu_texts(), gpu_texts()], tokens=40)


def gpu_sketch_preemption() -> dict[str, Any]:
    """Runs of four tokens by sketches, eager, with the sampled oracle; blocks that are used again."""
    quest = {"token_budget": BUDGET, "metadata": "sketch", "selection_unit": 4, "group_reduction": "mass"}
    llm = make_gpu_llm(quest, enforce_eager=True, max_num_batched_tokens=512, **small_pool(53), **GPU_ORACLE)
    return checked(llm, [prompts(4, 230)], tokens=40)


def gpu_preemption() -> dict[str, Any]:
    """As on a CPU, with blocks of 16."""
    llm = make_gpu_llm({"token_budget": BUDGET}, enforce_eager=True, **small_pool(53), **GPU_ORACLE)
    return checked(llm, [prompts(4, 230)], tokens=40)


def gpu_offloading() -> dict[str, Any]:
    """Blocks that vLLM's offloading connector saves in the host's memory with its own store, and brings back."""
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    connector["kv_connector_extra_config"] = {"cpu_bytes_to_use": 1 << 30}
    pool = {"num_gpu_blocks_override": 130, "max_model_len": 1024}  # prompts of two batches do not fit together
    found = {}
    for name, quest in (("bounds", {}), ("sketch", SKETCH)):
        llm = make_gpu_llm(
            {"token_budget": BUDGET, **quest}, enforce_eager=True, kv_transfer_config=connector, **pool, **GPU_ORACLE
        )
        one, another, *others = prompts(4, 400)
        found[name] = checked(llm, [[one, another], others, [one, another]])
        llm.collective_rpc("remove_oracle")
        stop(llm)
    return found


def gpu_speculation() -> dict[str, Any]:
    """As on a CPU, with its runner, in which rows without a draft choose: vLLM's newer one drafts for every row."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    llm = make_gpu_llm({"token_budget": BUDGET}, enforce_eager=True, speculative_config=FROM_PROMPT, **GPU_ORACLE)
    return checked(llm, [prompts(3, 500)], tokens=40, temperature=0.7)


GPU_HEAD_TOKENS = 3
"""Drafts of a step by an EAGLE head on a GPU."""


def gpu_eagle(quest: dict[str, Any] | None, batches: int = 1, **options: Any) -> dict[str, Any]:
    """An EAGLE head drafts, in the runner that vLLM takes by itself."""
    with tempfile.TemporaryDirectory() as folder:
        save_eagle(Path(folder))
        drafts = {"method": "eagle", "model": folder, "num_speculative_tokens": GPU_HEAD_TOKENS}
        llm = make_gpu_llm(quest, speculative_config=drafts, **options)
        if options.get("enforce_eager"):
            return checked(llm, [gpu_texts()] * batches, tokens=40)
        if quest is not None:
            llm.collective_rpc("quest_reset")
        found = {"answers": answers(llm, gpu_texts(), 40), "metrics": metrics(llm)}
        return found if quest is None else {**found, "counters": llm.collective_rpc("quest_counters")}


def gpu_sparse_verification() -> dict[str, Any]:
    """Rows that check drafts choose: eager, with the sampled oracle, prompts in chunks, then prefix hits."""
    quest = {"token_budget": 256, **VERIFY}
    return gpu_eagle(quest, 2, enforce_eager=True, max_num_batched_tokens=512, **GPU_ORACLE)


def gpu_sparse_verification_of_sketches() -> dict[str, Any]:
    """The same where single tokens are chosen."""
    quest = {"token_budget": 256, **VERIFY, **SKETCH}
    return gpu_eagle(quest, 2, enforce_eager=True, max_num_batched_tokens=512, **GPU_ORACLE)


def gpu_sparse_verification_graphs() -> dict[str, Any]:
    """Batches of rows that check drafts from full CUDA graphs."""
    return gpu_eagle({"token_budget": 256, **VERIFY}, **GPU_ORACLE)


def gpu_sparse_verification_of_sketches_graphs() -> dict[str, Any]:
    """The same where single tokens are chosen."""
    return gpu_eagle({"token_budget": 256, **VERIFY, **SKETCH}, **GPU_ORACLE)


def gpu_stock_verification() -> dict[str, Any]:
    """FlashAttention with the same drafts."""
    return gpu_eagle(None)


def gpu_sparse_verification_of_the_context() -> dict[str, Any]:
    """A budget that these rows fit, from graphs that hold Quest."""
    return gpu_eagle({"token_budget": 8192 - BUDGET, **VERIFY, **SKETCH}, **GPU_ORACLE)


def gpu_drafts_by_quest() -> dict[str, Any]:
    """The model drafts for itself with Quest; FlashAttention checks."""
    llm = make_gpu_llm({"token_budget": 256, **SKETCH}, speculative_config=DRAFTED, **GPU_ORACLE)
    llm.collective_rpc("quest_reset")
    found = {"answers": answers(llm, gpu_texts(), 40), "metrics": metrics(llm)}
    return {**found, "counters": llm.collective_rpc("quest_counters")}


def gpu_graphs(ranks: int = 1, **quest: Any) -> dict[str, Any]:
    """Decode batches from full CUDA graphs."""
    llm = make_gpu_llm({"token_budget": 256, **quest}, tensor_parallel_size=ranks, **GPU_ORACLE)
    llm.collective_rpc("quest_reset")
    return {"answers": answers(llm, gpu_texts(), 40), "counters": llm.collective_rpc("quest_counters")}


def gpu_sketch_graphs() -> dict[str, Any]:
    """The same with single tokens by sketches, whose pages are completed in replayed steps."""
    return gpu_graphs(**SKETCH)


def gpu_sleep() -> dict[str, Any]:
    """Answers from graphs before an engine sleeps, which gives up its cache, and after."""
    llm = make_gpu_llm({"token_budget": 256, **SKETCH}, enable_sleep_mode=True, **GPU_ORACLE)
    before = answers(llm, gpu_texts(), 40)
    llm.sleep(level=1)
    llm.wake_up()
    llm.collective_rpc("quest_reset")
    return {"before": before, "after": answers(llm, gpu_texts(), 40), "counters": llm.collective_rpc("quest_counters")}


def gpu_own_budgets() -> dict[str, Any]:
    """Budgets of requests on a GPU: eager with the sampled oracle, then with graphs, of which others make use after."""
    found, texts = {}, prompts(len(OWN_BUDGETS), 400)
    for name, kept in (("bounds", {}), ("sketch", SKETCH)):
        llm = make_gpu_llm({"token_budget": BUDGET, **kept}, enforce_eager=True, **GPU_ORACLE)
        llm.collective_rpc("install_oracle")
        eager = ask_own(llm, texts, [slice(None)])
        (oracle,) = llm.collective_rpc("oracle_report")
        del llm
        llm = make_gpu_llm({"token_budget": BUDGET, **kept}, **GPU_ORACLE)
        graphs, after = (ask_own(llm, texts, [slice(None)], plain=plain) for plain in (False, True))
        found[name] = {"eager": eager, "oracle": oracle, "graphs": graphs, "after": after}
    return found


def gpu_windows() -> dict[str, Any]:
    """Layers with windows among those with full attention, which choose single tokens; eager, with the sampled oracle.

    Heads as large as the kernels scan by bits.
    """
    return family("gemma3_wide", make_gpu_llm, SKETCH, enforce_eager=True, **GPU_ORACLE)


def gpu_sinks() -> dict[str, Any]:
    """The same with attention sinks and experts."""
    return family("gpt_oss_wide", make_gpu_llm, SKETCH, enforce_eager=True, **GPU_ORACLE)


# A chunk holds a block, which is as large as a state. vLLM's prefill of linear attention asks for FlashInfer otherwise,
# which not every machine has.
WITH_STATES_ON_A_GPU = {
    "enforce_eager": True,
    "max_num_batched_tokens": 2048,
    "additional_config": {"gdn_prefill_backend": "triton"},
    **GPU_ORACLE,
}


def gpu_states() -> dict[str, Any]:
    """Linear attention beside full layers by bounds, whose blocks hold several pages."""
    return family("qwen3_next", make_gpu_llm, {"metadata": "bounds"}, **WITH_STATES_ON_A_GPU)


def gpu_states_by_sketches() -> dict[str, Any]:
    """The same where single tokens are chosen."""
    return family("qwen3_next", make_gpu_llm, SKETCH, **WITH_STATES_ON_A_GPU)


def gpu_two_ranks() -> dict[str, Any]:
    """The same on two GPUs, a KV head each."""
    return gpu_graphs(2)


SCENARIOS = [
    stock,
    api,
    off,
    budget_of_the_context,
    own_budgets,
    own_budgets_of_sketches,
    own_budgets_in_the_adapter_of_a_gpu,
    prefix_and_chunks,
    bfloat16,
    one_token_more_than_blocks,
    stock_prefixes,
    prefixes,
    sketch_prefixes,
    preemption,
    moments,
    auto,
    speculation,
    sketch_budget_of_the_context,
    sketch_prefix_and_chunks,
    sketch_preemption,
    sketch_pages,
    sketch_speculation,
    sparse_verification,
    sparse_verification_of_sketches,
    sparse_verification_in_the_adapter_of_a_gpu,
    sparse_verification_of_sketches_in_the_adapter_of_a_gpu,
    sparse_verification_in_8_bits,
    sparse_verification_of_sketches_in_8_bits,
    eagle,
    sparse_eagle,
    sparse_eagle3,
    eagle_of_the_context,
    sparse_mtp,
    drafts_by_quest,
    drafts_by_sketches,
    without_drafts,
    drafts_in_the_adapter_of_a_gpu,
    replayed_drafts_in_the_adapter_of_a_gpu,
    drafts_where_blocks_run_out,
    without_drafts_where_blocks_run_out,
    stock_verification,
    sparse_verification_of_the_context,
    sparse_verification_of_the_context_by_sketches,
    sparse_verification_of_own_budgets,
    sparse_verification_of_gpt_oss,
    sparse_verification_of_gemma2,
    windowed,
    with_states,
    adapter_of_a_gpu,
    adapter_of_a_gpu_with_sketches,
    adapter_of_a_gpu_in_8_bits,
    checkpoint_in_8_bits,
    adapter_of_a_gpu_with_windows,
    offloading,
    fetched_by_nixl,
    tensor_parallel,
    one_rank,
    gpu_stock,
    gpu_budget_of_the_context,
    gpu_eager,
    gpu_moments,
    gpu_8_bits,
    gpu_sketch_budget_of_the_context,
    gpu_sketch,
    gpu_sketch_preemption,
    gpu_sketch_graphs,
    gpu_preemption,
    gpu_offloading,
    gpu_sleep,
    gpu_speculation,
    gpu_graphs,
    gpu_sparse_verification,
    gpu_sparse_verification_of_sketches,
    gpu_sparse_verification_graphs,
    gpu_sparse_verification_of_sketches_graphs,
    gpu_stock_verification,
    gpu_sparse_verification_of_the_context,
    gpu_drafts_by_quest,
    gpu_own_budgets,
    gpu_windows,
    gpu_sinks,
    gpu_states,
    gpu_states_by_sketches,
    gpu_two_ranks,
]

if __name__ == "__main__":
    sys.path.append(str(HELPERS))  # workers take the path over
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    (run,) = [scenario for scenario in SCENARIOS if scenario.__name__ == sys.argv[1]]
    is_several = run in (tensor_parallel, fetched_by_nixl) or run.__name__.startswith("gpu_")
    os.environ |= engine_environment(is_one_process=not is_several)
    if run is tensor_parallel:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(core) for core in own_cores()[:2])
    print("\n" + json.dumps(run()), flush=True)
