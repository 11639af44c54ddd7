"""`generate()` under Quest: the model's own tokens within the budget, the oracle's past it."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

from quest_attention import QuestCache, QuestConfig, enable_quest
from quest_attention.hf import cache_argument
from quest_attention.hf.naming import CACHE
from tiny import (
    LARGE,
    PAGE_SIZE,
    SMALL,
    assert_metadata_is_exact,
    generate,
    logits_of_steps,
    make_llama,
    prompt,
    quest_layers,
)

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams of a batch": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 16},
    "chunks of one token": {"prefill_chunk_size": 59},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_the_budget_it_is_the_model_itself(way: str, dtype: torch.dtype) -> None:
    model = make_llama().to(dtype)
    ids = prompt(batch=1 if "lookup" in way else 2)
    stock = generate(model, ids, **WAYS[way])
    with enable_quest(model, LARGE) as quest:
        ours = generate(model, ids, **WAYS[way])
        assert quest.counters.dense_steps > 0, "Quest's attention was reached"
        assert quest.counters.sparse_steps == 0
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("returned", [1, 3])
def test_sampling_with_a_seed(returned: int) -> None:
    model, ids = make_llama(), prompt(batch=2)
    options: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "num_return_sequences": returned}
    torch.manual_seed(7)
    stock = generate(model, ids, **options)
    with enable_quest(model, LARGE):
        torch.manual_seed(7)
        assert torch.equal(generate(model, ids, **options), stock)


def test_left_padding_within_the_budget() -> None:
    model, ids = make_llama(), prompt(batch=3)
    ids[0, :20] = 0
    ids[2, :57] = 0
    mask = (ids != 0).long()
    stock = generate(model, ids, attention_mask=mask)
    with enable_quest(model, LARGE):
        assert torch.equal(generate(model, ids, attention_mask=mask), stock)


def test_inputs_embeds() -> None:
    model, ids = make_llama(), prompt()
    embedded = model.get_input_embeddings()(ids)
    runner: Any = model
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    stock = runner.generate(inputs_embeds=embedded, **options)
    with enable_quest(model, LARGE):
        assert torch.equal(runner.generate(inputs_embeds=embedded, **options), stock)
    with enable_quest(model, SMALL) as quest:
        runner.generate(inputs_embeds=embedded, **options)
        assert quest.counters.sparse_steps > 0


def test_assisted_decoding() -> None:
    model, assistant, ids = make_llama(), make_llama(layers=1, seed=3), prompt()
    stock = generate(model, ids, assistant_model=assistant)
    with enable_quest(model, LARGE):
        assert torch.equal(generate(model, ids, assistant_model=assistant), stock)
    with enable_quest(assistant, SMALL.__class__(24, 4, 0)) as quest:  # an assistant may guess with Quest: lossless
        assert torch.equal(generate(model, ids, assistant_model=assistant), stock)
        assert quest.counters.sparse_steps > 0


def test_multi_turn_reuse_of_the_cache() -> None:
    model, ids = make_llama(), prompt()
    runner: Any = model
    more = prompt(length=9, seed=5)

    def converse() -> tuple[torch.Tensor, Any]:
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        first = runner.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
        both = torch.cat([first.sequences, more], 1)
        second = runner.generate(both, attention_mask=torch.ones_like(both), **cache_argument(first[CACHE]), **options)
        return second, first[CACHE]

    stock, _ = converse()
    with enable_quest(model, LARGE):
        ours, cache = converse()
        assert isinstance(cache, QuestCache)
        assert torch.equal(ours, stock)
    with enable_quest(model, SMALL) as quest:
        _, cache = converse()
        assert quest.counters.sparse_steps > 0
        assert_metadata_is_exact(cache)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1), (7, 1), (14, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_past_the_budget_it_is_the_oracle(heads: int, kv_heads: int, padded: bool) -> None:
    model = make_llama(heads=heads, kv_heads=kv_heads)
    ids = prompt(batch=3)
    if padded:
        ids[0, :21] = 0
        ids[1, :50] = 0  # this row stays within the budget: all its pages are read
    ours, counters = logits_of_steps(model, ids, SMALL)
    oracle, _ = logits_of_steps(model, ids, dataclasses.replace(SMALL, backend="reference"))
    dense, _ = logits_of_steps(model, ids, LARGE)
    assert counters.layers[1].sparse_steps == counters.layers[2].sparse_steps == 5
    assert counters.layers[0].sparse_steps == 0
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[1:], dense[1:], atol=1e-2), "something was left out"
    if padded:
        torch.testing.assert_close(ours[:, 1], dense[:, 1], rtol=1e-4, atol=1e-4)


def test_left_padding_does_not_change_a_row() -> None:
    """A padded row alone selects among its own pages; with page-aligned padding they are the same pages."""
    model = make_llama()
    alone = prompt(length=60)
    padded = torch.cat([torch.zeros(1, 5 * 4, dtype=torch.long), alone], 1)
    full = prompt(length=80, seed=9)
    single, _ = logits_of_steps(model, alone, SMALL)
    batched, counters = logits_of_steps(model, torch.cat([padded, full]), SMALL)
    assert counters.sparse_steps > 0
    torch.testing.assert_close(batched[:, 0], single[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["beams", "beams of a batch", "prompt lookup", "chunked prefill"])
def test_past_the_budget_every_way_is_the_oracle(way: str) -> None:
    model = make_llama()
    ids = prompt(batch=1 if "lookup" in way else 2)
    with enable_quest(model, SMALL) as quest:
        ours = generate(model, ids, **WAYS[way])
        assert quest.counters.sparse_steps > 0
    with enable_quest(model, dataclasses.replace(SMALL, backend="reference")):
        assert torch.equal(generate(model, ids, **WAYS[way]), ours)


def test_beam_search_keeps_bounds_with_their_keys() -> None:
    model, ids = make_llama(), prompt(batch=2)
    runner: Any = model
    with enable_quest(model, SMALL) as quest:
        made = runner.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=4,
            max_new_tokens=14,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        assert quest.counters.sparse_steps > 0
    assert_metadata_is_exact(made[CACHE])


def test_a_budget_of_one_token_less_than_the_length_is_sparse() -> None:
    model, ids = make_llama(), prompt(length=64)
    with enable_quest(model, QuestConfig(token_budget=68, page_size=4, num_dense_layers=0)) as quest:
        generate(model, ids, new=8)
    layer = quest.counters.layers[0]
    assert layer.dense_steps_by_reason == {"within budget": 4}, "lengths 65 to 68"
    assert layer.sparse_steps == 3, "lengths 69 to 71"
    assert layer.pages_read == 17 * 7
    assert layer.pages_held == 17 * 4 + 18 * 3


def test_two_threads_share_a_model() -> None:
    model = make_llama()
    prompts = [prompt(length=70, seed=1), prompt(length=90, seed=2)]
    made: dict[int, torch.Tensor] = {}
    with enable_quest(model, SMALL):
        alone = [generate(model, ids, new=20) for ids in prompts]

        def work(number: int) -> None:
            made[number] = generate(model, prompts[number], new=20)

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, expected in enumerate(alone):
        assert torch.equal(made[number], expected)


def test_interleaved_caches() -> None:
    model = make_llama()
    runner: Any = model
    prompts = [prompt(length=70, seed=1), prompt(length=90, seed=2)]
    with enable_quest(model, SMALL) as quest, torch.inference_mode():

        def decode(order: list[int]) -> dict[int, list[torch.Tensor]]:
            caches = [quest.make_cache() for _ in prompts]
            for ids, cache in zip(prompts, caches, strict=True):
                runner(ids, **cache_argument(cache))
            out: dict[int, list[torch.Tensor]] = {0: [], 1: []}
            for which in order:
                token = torch.tensor([[5 + len(out[which])]])
                out[which].append(runner(token, **cache_argument(caches[which])).logits)
            return out

        apart, mixed = decode([0, 0, 0, 1, 1, 1]), decode([0, 1, 1, 0, 1, 0])
        assert quest.counters.sparse_steps > 0
    for which in (0, 1):
        torch.testing.assert_close(torch.cat(mixed[which]), torch.cat(apart[which]), rtol=0, atol=0)


def test_selection_is_shown_to_an_observer() -> None:
    model, ids = make_llama(), prompt()
    seen: list[tuple[int, list[int], int]] = []
    with enable_quest(
        model, SMALL, on_select=lambda layer, chosen, pages: seen.append((layer, list(chosen.units.shape), pages))
    ):
        generate(model, ids, new=3)
    assert seen == [(1, [1, 2, 6], 16), (2, [1, 2, 6], 16)] * 2


def test_metadata_is_a_sixteenth_of_the_cache() -> None:
    model, ids = make_llama().bfloat16(), prompt(length=200)
    config = QuestConfig(token_budget=64, page_size=16, num_dense_layers=0)
    with enable_quest(model, config) as quest, torch.inference_mode():
        cache = quest.make_cache()
        model(ids, **cache_argument(cache))
    for layer in quest_layers(cache):
        stored = layer.paged.contiguous
        assert stored is not None
        assert stored.metadata.nbytes * 16 == stored.keys.nbytes + stored.values.nbytes


@pytest.mark.parametrize("budget", [24, 30])
@pytest.mark.parametrize("metadata_dtype", ["kv", "fp8"])
def test_the_triton_backend(budget: int, metadata_dtype: str) -> None:
    """In Triton's interpreter, or on the GPU: the tokens and the counters of the PyTorch path."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_llama().to(device)
    ids = prompt(2, 60).to(device)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    made = {}
    for backend in ("torch", "triton"):
        options = {"token_budget": budget, "page_size": PAGE_SIZE, "num_dense_layers": 1, "backend": backend}
        config = QuestConfig.from_dict({**options, "metadata_dtype": metadata_dtype})
        with enable_quest(model, config, cuda_graphs=False) as quest:
            tokens = [generate(model, ids, new=4).tolist(), generate(model, ids, new=4, attention_mask=mask).tolist()]
            made[backend] = (tokens, quest.counters.to_dict())
    assert made["triton"] == made["torch"]


def test_beams_over_bounds_in_8_bits() -> None:
    model = make_llama()
    for metadata_dtype in ("kv", "fp8"):
        config = QuestConfig(token_budget=4096, page_size=PAGE_SIZE, metadata_dtype=metadata_dtype)
        with enable_quest(model, config) as quest:
            wide = generate(model, prompt(2), num_beams=3, num_return_sequences=2).tolist()
        small = QuestConfig(token_budget=24, page_size=PAGE_SIZE, num_dense_layers=1, metadata_dtype=metadata_dtype)
        with enable_quest(model, small) as quest:
            generate(model, prompt(2), num_beams=3)
            assert quest.counters.sparse_steps == 2 * 11
    assert wide == generate(model, prompt(2), num_beams=3, num_return_sequences=2).tolist()
