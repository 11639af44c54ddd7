"""Quest inside vLLM's engine on a CPU: each test runs scenarios of `scenario.py`, each in a process of its own.

For the environment that has vLLM: `make test-vllm`. Engines of several processes are in `test_processes.py`.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

from engine import MINUTES, NUM_SPARSE_LAYERS, assert_checked, scenario, thorough
from mixed_models import ALL, FAMILIES, WITH_STATES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES)]


def test_nothing_changes_where_nobody_asks() -> None:
    assert scenario("off") == {"backend": "CPUAttentionBackend", "impl": "CPUAttentionBackendImpl"}


def test_what_clients_ask_for_beside_plain_answers() -> None:
    found = scenario("api")
    (oracle,) = found["oracle"]
    assert oracle["failures"] == []
    given = {name: one["given"] for name, one in found["tried"].items()}
    rows = {name: one["counters"]["sparse_rows"] for name, one in found["tried"].items()}
    assert oracle["seen"]["rows past the budget"] == NUM_SPARSE_LAYERS * sum(rows.values())
    assert rows.pop("beam search") == 0, "each step is a prompt"
    assert rows.pop("three answers") == 3 * rows["plain"]
    assert rows.pop("structured output") > 0
    assert rows.pop("prompt logprobs") == rows["plain"] / 2
    assert set(rows.values()) == {2 * (10 - 1)}, "an answer's first token is the prompt's"
    assert all(text.startswith(f" {48213 + index}") for index, text in enumerate(given["plain"]))
    assert given["LoRA"] != given["plain"] != given["penalties"]
    assert given["logprobs"] == [10, 10]
    assert given["prompt logprobs"][0] > 400
    assert given["structured output"] == [" 48213.", " 48214."]
    assert [len(one) for one in given["three answers"]] == [len(one) for one in given["beam search"]] == [3, 3]


@pytest.mark.parametrize(
    "name", ["own_budgets", thorough("own_budgets_of_sketches"), "own_budgets_in_the_adapter_of_a_gpu"]
)
def test_requests_with_budgets_of_their_own(name: str) -> None:
    found = scenario(name)
    (oracle,) = found["oracle"]
    assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
    together, alone = found["together"], found["alone"]
    assert together["answers"] == alone["answers"]
    for some, one in zip(together["logprobs"], alone["logprobs"], strict=True):
        assert some == pytest.approx(one, abs=1e-4)  # of rows that took each other's budgets they are 0.01 apart
    asked = [128, 64, None, 96, 64]  # as the scenario asks
    size = 32 if name == "own_budgets" else 1
    steps = [[length + step for step in range(1, 10)] for length in together["lengths"]]  # the prompt gives the first
    read = sum(budget or -(-length // size) * size for budget, row in zip(asked, steps, strict=True) for length in row)
    for one in (together["counters"], alone["counters"]):
        assert (one["sparse_rows"], one["dense_rows"], one["tokens_read"]) == (4 * 9, 9, read)
    assert together["counters"]["eager_steps"] < alone["counters"]["eager_steps"]
    assert oracle["seen"]["rows past the budget"] == 2 * NUM_SPARSE_LAYERS * 4 * 9
    assert [text.split(", expected")[0] for text in found["refused"]] == [
        f"quest_token_budget: got {asked!r}" for asked in (129, 1, "all")
    ]


def test_a_budget_of_the_context_gives_the_stock_backends_tokens() -> None:
    found = scenario("budget_of_the_context")
    assert len(found) == 2
    for one in found.values():
        assert one["answers"] == scenario("stock")["answers"]
    inactive, active = (one["counters"][0] for one in found.values())
    assert inactive == {}
    assert active["sparse_rows"] == 0 < active["dense_rows"]  # Quest was there, and no row was past the budget


def test_prefix_cache_chunked_prefill_and_mixed_batches() -> None:
    found = scenario("prefix_and_chunks")
    assert_checked(found)
    first, again = found["answers"]
    assert first == again
    assert found["metrics"]["prefix_cache_hits"] > 1000
    (seen,) = (oracle["seen"] for oracle in found["oracle"])
    assert seen["rows within it"] > 0  # short rows in the same batches
    assert seen["pages with exact bounds"] == seen["pages"]


def test_the_last_token_of_a_prompt_is_no_decode_row() -> None:
    found = scenario("one_token_more_than_blocks")
    first, again = found["logprobs"]
    assert found["metrics"]["prefix_cache_hits"] > 0
    assert again == pytest.approx(first, abs=1e-4)  # other sums, the same numbers
    assert found["counters"][0]["sparse_rows"] == 0


@pytest.mark.parametrize("name", [thorough("stock_prefixes"), "prefixes", thorough("sketch_prefixes")])
def test_prefixes_at_odd_lengths_answer_as_prompts_from_nothing_do(name: str) -> None:
    """Lengths at, under and over a block's end and the budget; `QUEST_PREFIXES` names others.

    Keys that were computed in other chunks are a rounding apart. Of those a sketch may have another sign, and a token
    at the edge of the choice make room for its neighbour: which prompt that happens to depends on the processor.
    """
    found = scenario(name)
    fresh, reused, together = (found[way] for way in ("fresh", "reused", "together"))
    assert [one["hits"] for one in fresh] == [0] * len(fresh)
    assert [one["hits"] for one in reused] == found["expected"]
    assert together["tokens"] == [one["tokens"] for one in reused] == [one["tokens"] for one in fresh]
    apart = 0
    for first, again, beside in zip(fresh, reused, together["logprobs"], strict=True):
        for one in (again["logprobs"], beside):
            assert one == pytest.approx(first["logprobs"], abs=2e-3)  # of a prompt with another budget they are 0.01
        is_same = [one == pytest.approx(first["logprobs"], abs=1e-4) for one in (again["logprobs"], beside)]
        apart += not all(is_same)  # other sums, the same numbers
    assert apart <= (len(fresh) // 8 if name == "sketch_prefixes" else 0)
    assert all(found["emptied"]), "no block was in use after any answer"
    if name != "stock_prefixes":
        assert_checked(found)
        assert found["counters"][0]["dense_rows"] > 0  # rows that began within the budget and ended past it


def test_preempted_rows_and_blocks_used_again() -> None:
    found = scenario("preemption")
    assert_checked(found)
    assert found["metrics"]["num_preemptions"] > 0
    assert all(oracle["seen"]["pages with exact bounds"] == oracle["seen"]["pages"] for oracle in found["oracle"])


def test_moments_in_chunks_after_preemption_and_out_of_the_prefix_cache() -> None:
    found = scenario("moments")
    assert_checked(found)
    first, again = found["answers"]
    assert first[2:] == again
    assert found["metrics"]["num_preemptions"] > 0
    assert found["metrics"]["prefix_cache_hits"] > 0
    (seen,) = (oracle["seen"] for oracle in found["oracle"])
    assert seen["pages"] > 0 and "pages with exact bounds" not in seen  # the oracle took them for moments


def test_auto_is_moments_of_pages_on_a_cpu() -> None:
    found = scenario("auto")
    assert_checked(found)
    assert found["form"] == ["Moments(coefficient=1.0)"]
    assert found["answers"][0] == found["answers"][1]
    (counters,) = found["counters"]
    assert counters["tokens_read"] == 32 * counters["pages_read"]


def test_speculated_tokens_that_are_taken_back_leave_bounds_that_bound() -> None:
    found = scenario("speculation")
    assert_checked(found)
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert accepted < drafted
    assert found["counters"][0]["verified_rows"] == found["metrics"]["spec_decode_num_drafts"] > 0
    (seen,) = (oracle["seen"] for oracle in found["oracle"])
    assert seen["pages with exact bounds"] < seen["pages"]  # wider ones were there, and held


def test_sketches_with_a_budget_of_the_context_give_the_stock_backends_tokens() -> None:
    found = scenario("sketch_budget_of_the_context")
    assert found["answers"] == scenario("stock")["answers"]
    (counters,) = found["counters"]
    assert counters["sparse_rows"] == 0 < counters["dense_rows"]
    assert counters["tokens_read"] == counters["tokens_held"] > 0 and "pages_read" not in counters


def test_single_tokens_by_sketches_in_chunks_and_out_of_the_prefix_cache() -> None:
    found = scenario("sketch_prefix_and_chunks")
    assert_checked(found)
    first, again = found["answers"]
    assert first == again
    assert found["metrics"]["prefix_cache_hits"] > 1000
    (counters,), (oracle,) = found["counters"], found["oracle"]
    assert counters["tokens_read"] < counters["tokens_held"] / 4
    assert oracle["seen"]["selections"] > 0 < oracle["seen"]["rows within it"]


def test_runs_of_four_tokens_after_preemption_and_in_blocks_used_again() -> None:
    found = scenario("sketch_preemption")
    assert_checked(found)
    first, again = found["answers"]
    assert first[2:] == again
    assert found["metrics"]["num_preemptions"] > 0
    assert found["metrics"]["prefix_cache_hits"] > 0
    (counters,), (oracle,) = found["counters"], found["oracle"]
    assert counters["tokens_read"] == 128 * counters["sparse_rows"]  # the budget, and no row was within it
    assert counters["dense_rows"] == 0 < oracle["seen"]["selections"]


def test_whole_pages_by_sketches() -> None:
    found = scenario("sketch_pages")
    assert_checked(found)
    (counters,) = found["counters"]
    assert counters["tokens_read"] == 32 * counters["pages_read"]


def test_speculated_tokens_that_are_taken_back_are_in_no_sketch() -> None:
    found = scenario("sketch_speculation")
    assert_checked(found)
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert accepted < drafted


SPARSE_VERIFICATION = (
    "sparse_verification",
    thorough("sparse_verification_of_sketches"),
    thorough("sparse_verification_in_the_adapter_of_a_gpu"),
    "sparse_verification_of_sketches_in_the_adapter_of_a_gpu",
    thorough("sparse_verification_in_8_bits"),
    thorough("sparse_verification_of_sketches_in_8_bits"),
)


@pytest.mark.parametrize("name", SPARSE_VERIFICATION)
def test_rows_that_check_drafts_choose_where_the_server_asks_for_it(name: str) -> None:
    """Of different numbers of tokens, beside rows of one and prompts in chunks, and after tokens were taken back."""
    found = scenario(name)
    assert_checked(found)
    (counters,), (oracle,) = found["counters"], found["oracle"]
    assert counters["verified_sparse_rows"] > counters["verified_rows"]
    checked = counters["verified_sparse_rows"] + counters["verified_rows"]
    assert checked == found["metrics"]["spec_decode_num_drafts"]
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted
    seen = oracle["seen"]
    assert all(seen[f"rows of {count}"] > 0 for count in (1, 2, 4))
    assert seen["selections"] > 0
    if "planned" in found:
        assert found["planned"] == [[0, 4, 0]], "a batch to be captured runs Quest whatever its lengths are"


@pytest.mark.parametrize("name", ["sparse_verification_of_gpt_oss", "sparse_verification_of_gemma2"])
def test_rows_that_check_drafts_choose_in_layers_with_full_attention_among_others(name: str) -> None:
    found = scenario(name)
    assert_checked(found, layers=1)
    assert found["counters"][0]["verified_sparse_rows"] > 5
    assert found["oracle"][0]["seen"]["rows of 4"] > 5


@pytest.mark.parametrize(
    "name", ["sparse_verification_of_the_context", "sparse_verification_of_the_context_by_sketches"]
)
def test_a_budget_of_the_context_checks_drafts_as_stock_does(name: str) -> None:
    found = scenario(name)
    assert found["answers"] == scenario("stock_verification")["answers"]
    (counters,) = found["counters"]
    assert counters["verified_sparse_rows"] == counters["sparse_rows"] == 0 < counters["verified_rows"]
    assert counters["tokens_read"] == counters["tokens_held"]


@pytest.mark.parametrize("name", [thorough("sparse_eagle"), "sparse_eagle3", "eagle_of_the_context"])
def test_the_layers_of_an_eagle_head_are_stock_and_its_drafts_are_checked(name: str) -> None:
    found = scenario(name)
    *ours, last = found["backends"].values()
    assert set(ours) == {"QuestCPUBackend"} and last == "CPUAttentionBackend"
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert (0 if name == "sparse_eagle3" else 1) <= accepted < drafted  # dummy weights keep none
    (counters,), (oracle,) = found["counters"], found["oracle"]
    checked = counters["verified_sparse_rows"] + counters["verified_rows"]
    assert checked == found["metrics"]["spec_decode_num_drafts"]
    if name != "eagle_of_the_context":
        assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
        rows = counters["sparse_rows"] + counters["verified_sparse_rows"]
        assert oracle["seen"]["rows past the budget"] == NUM_SPARSE_LAYERS * rows > 0
    else:
        assert found["answers"] == scenario("eagle")["answers"]
        assert counters["verified_sparse_rows"] == 0


def test_the_layer_of_a_model_that_predicts_tokens_is_stock_and_its_drafts_are_checked() -> None:
    found = scenario("sparse_mtp")
    *ours, last = found["backends"].values()
    assert set(ours) == {"QuestCPUBackend"} and last == "CPUAttentionBackend"
    (counters,), (oracle,) = found["counters"], found["oracle"]
    assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
    assert oracle["seen"]["rows past the budget"] == 3 * counters["verified_sparse_rows"] > 0
    checked = counters["verified_sparse_rows"] + counters["verified_rows"]
    assert checked == found["metrics"]["spec_decode_num_drafts"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        thorough("drafts_by_quest", "without_drafts"),
        ("drafts_by_sketches", "without_drafts"),
        ("drafts_where_blocks_run_out", "without_drafts_where_blocks_run_out"),
    ],
)
def test_a_model_that_drafts_with_quest_answers_as_stock_does(name: str, plain: str) -> None:
    found = scenario(name)
    assert found["answers"] == scenario(plain)["answers"]
    (counters,), (oracle,) = found["counters"], found["oracle"]
    assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
    assert oracle["seen"]["rows past the budget"] == NUM_SPARSE_LAYERS * counters["sparse_rows"] > 0
    assert counters["verified_sparse_rows"] == 0, "what is kept was read whole"
    # The runner of the last step near the longest sequence drafts in Quest's place.
    assert 0 < counters["verified_rows"] <= found["metrics"]["spec_decode_num_drafts"] < counters["sparse_rows"]
    drafted, accepted = (found["metrics"][f"spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert drafted / 2 < accepted <= drafted
    if "run_out" in name:
        assert found["metrics"]["num_preemptions"] > 0


@pytest.mark.parametrize(
    "name", [thorough("drafts_in_the_adapter_of_a_gpu"), "replayed_drafts_in_the_adapter_of_a_gpu"]
)
def test_drafts_with_quest_in_the_adapter_of_a_gpu(name: str) -> None:
    found = scenario(name)
    (counters,), (oracle,) = found["counters"], found["oracle"]
    assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
    assert oracle["seen"]["rows past the budget"] == NUM_SPARSE_LAYERS * counters["sparse_rows"] > 0
    assert counters["verified_sparse_rows"] == 0 < counters["verified_rows"]


def test_rows_that_check_drafts_with_budgets_of_their_own() -> None:
    found = scenario("sparse_verification_of_own_budgets")
    (oracle,), counters = found["oracle"], found["counters"]
    assert oracle["failures"] == [] and 0 < oracle["worst"] <= 1
    rows = counters["sparse_rows"] + counters["verified_sparse_rows"]
    assert oracle["seen"]["rows past the budget"] == NUM_SPARSE_LAYERS * rows
    assert counters["verified_sparse_rows"] > 0 < counters["verified_rows"], "one asks to be read whole"
    assert counters["verified_sparse_rows"] + counters["verified_rows"] == found["metrics"]["spec_decode_num_drafts"]
    assert counters["tokens_read"] < counters["tokens_held"]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_with_full_attention_among_others(name: str) -> None:
    """What is full runs Quest and is held to the oracle, all else is vLLM's: with a budget of the context all is."""
    check_family(name, scenario("windowed")[name])
    assert scenario("windowed")[name]["metrics"]["prefix_cache_hits"] > 500


@pytest.mark.parametrize("name", WITH_STATES)
def test_layers_with_full_attention_among_states(name: str) -> None:
    check_family(name, scenario("with_states")[name])


def check_family(name: str, found: dict[str, Any]) -> None:
    """See `scenario.family`."""
    family = ALL[name]
    stock, whole, sparse = (found[way] for way in ("stock", "whole", "sparse"))
    assert whole["tokens"] == stock["tokens"]
    for ours, theirs in zip(whole["logprobs"], stock["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    (counters,) = whole["counters"]
    assert counters["sparse_rows"] == 0 < counters["dense_rows"]
    assert sparse["logprobs"] != stock["logprobs"]
    assert found["again"]["tokens"] == sparse["tokens"]  # in blocks used again, or out of the prefix cache
    assert_checked(found, layers=len(family.sparse))
    (groups,) = found["groups"]
    assert sorted(int(layer.split(".")[2]) for group in groups for layer in group["layers"]) == list(family.sparse)
    for group in groups:  # a row reads as much in each
        assert {name: number for name, number in group.items() if name != "layers"} == found["counters"][0]


def test_full_attention_in_several_groups_of_layers() -> None:
    (groups,) = scenario("windowed")["gemma3_full"]["groups"]
    assert len(groups) == 3


def test_bfloat16_forced_pages_and_bounds_in_8_bits() -> None:
    assert_checked(scenario("bfloat16"), layers=6)


def test_the_adapter_of_a_gpu_over_pytorchs_verbs() -> None:
    found = scenario("adapter_of_a_gpu")
    assert_checked(found)
    assert found["answers"][0] == found["answers"][1]
    (seen,) = (oracle["seen"] for oracle in found["oracle"])
    assert seen["rows within it"] > 0
    assert seen["pages with exact bounds"] == seen["pages"]


def test_the_adapter_of_a_gpu_with_sketches() -> None:
    found = scenario("adapter_of_a_gpu_with_sketches")
    assert_checked(found)
    assert found["answers"][0] == found["answers"][1]
    (seen,) = (oracle["seen"] for oracle in found["oracle"])
    assert seen["rows within it"] > 0 < seen["selections"]


@pytest.mark.thorough  # four minutes; in `.ci/run` rows that check drafts are read in 8 bits
@pytest.mark.parametrize("form", ["bounds", "sketch"])
def test_the_adapter_of_a_gpu_with_keys_and_values_in_8_bits(form: str) -> None:
    """By scales that are not 1: the oracle stores every token a second time, rounded by its own arithmetic."""
    found = scenario("adapter_of_a_gpu_in_8_bits")[form]
    assert_checked(found)
    assert found["answers"][0] == found["answers"][1]
    assert found["metrics"]["prefix_cache_hits"] > 0


def test_a_checkpoint_that_asks_for_8_bits_is_read_so_or_refused_by_name() -> None:
    found = scenario("checkpoint_in_8_bits")
    assert "kv_cache_dtype: got 'fp8', expected one of 'auto', 'bfloat16'" in found["refusal"]
    assert found["stored"] == "fp8"
    assert_checked(found)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_pages"])
def test_the_adapter_of_a_gpu_with_windows(name: str) -> None:
    check_family(name, scenario("adapter_of_a_gpu_with_windows")[name])


@pytest.mark.parametrize("name", ["adapter_of_a_gpu", "adapter_of_a_gpu_with_sketches"])
def test_a_captured_batch_of_a_gpu_runs_quest_whatever_its_lengths_were(name: str) -> None:
    assert scenario(name)["planned"] == [[0, 4, 0]]


@pytest.mark.parametrize("form", ["bounds", "sketch"])
def test_blocks_that_the_offloading_connector_saved_and_loaded_elsewhere(form: str) -> None:
    found = scenario("offloading")[form]
    assert_checked(found)
    first, _, again = found["answers"]
    assert first == again
    (moved,) = found["moved"]
    assert found["metrics"]["external_prefix_cache_hits"] == 32 * moved["blocks"] > 1000  # none was computed again
    assert moved["elsewhere"] > moved["blocks"] / 2
    assert moved["other bits"] == 0
