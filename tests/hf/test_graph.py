"""Captured decode steps. Without a GPU a stand-in for the capture runs the step again at each replay."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_attention import BackendError, QuestConfig, QuestStateError, QuestWarning, enable_quest
from quest_attention.hf import cache_argument, enable, graph
from quest_attention.hf.draft_length import DraftLength
from quest_attention.hf.naming import CACHE
from quest_attention.hf.offload import Offload
from quest_attention.hf.reading import Reading
from tiny import make_llama, prompt

SMALL = QuestConfig(token_budget=32, page_size=8, num_dense_layers=1, metadata="bounds")

in_any_dtype = pytest.mark.parametrize("stored", ["auto", "fp8"])
"""For tests of caches whose keys and values may be in 8 bits."""


def run_again(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """As `graph._capture` for a CPU: the outputs are refilled by running the step again."""
    del device
    outputs = run()

    def replay() -> None:
        for name, value in run().items():
            if isinstance(value, Tensor):
                outputs[name].copy_(value)

    return replay, outputs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(graph, "_capture", run_again)
        wrapped = graph._CapturedStep.replay

        def replay(step: Any, inputs: dict[str, Tensor], what: Any) -> Any:
            layers = [layer for layer in step.cache_for_test() if not isinstance(layer, int)]
            for layer in layers:
                layer.captured_lengths = step.lengths
            try:
                return wrapped(step, inputs, what)
            finally:
                for layer in layers:
                    layer.captured_lengths = None

        made = graph._CapturedStep.__init__

        def init(step: Any, forward: Any, cache: Any, *args: Any) -> None:
            alive = weakref.ref(cache)
            step.cache_for_test = lambda: alive().layers
            made(step, forward, cache, *args)

        monkeypatch.setattr(graph._CapturedStep, "__init__", init)
        monkeypatch.setattr(graph._CapturedStep, "replay", replay)
    return str(request.param)


def enabled(model: Any, device: str, config: QuestConfig = SMALL, **options: Any) -> Any:
    if device == "cuda":
        return enable_quest(model, config, **options)
    drafts = 4 if options.pop("lossless", False) else None
    stored = options.get("kv_cache_dtype", "auto")
    return enable.QuestHandle(
        model, config, options.get("on_select"), capture=True, draft_tokens=drafts, kv_cache_dtype=stored
    )


def generate(model: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    settings = {"min_new_tokens": 40, "max_new_tokens": 40, "pad_token_id": 0, "do_sample": False, **options}
    return model.generate(ids, **settings).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("metadata", [
    {}, {"metadata_dtype": "fp8"}, {"metadata": "moments"}, {"metadata": "sketch", "selection_unit": "token"},
    {"metadata": "sketch", "selection_unit": "token", "candidate_factor": 0},
], ids=str)  # fmt: skip
@in_any_dtype
def test_the_tokens_of_eager_steps(device: str, stored: str, batch: int, metadata: dict[str, Any]) -> None:
    """Across page boundaries, from below the budget to above it, and over storage that grows."""
    config = replace(SMALL, **metadata)
    model: Any = make_llama().to(device)
    ids = prompt(batch, 21).to(device)
    with enable_quest(model, config, cuda_graphs=False, kv_cache_dtype=stored) as quest:
        assert quest.graphs is None
        expected = generate(model, ids)
        counted = quest.counters.to_dict()
    with enabled(model, device, config, kv_cache_dtype=stored) as quest:
        assert generate(model, ids) == expected
        assert quest.graphs.replayed_steps > 20
        assert quest.graphs.eager_steps == {"the storage is full and grows in this step": 1}
        assert quest.graphs.captures == 2
        replayed = quest.counters.to_dict()
    assert replayed == counted
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("fails", [False, True])
def test_a_token_that_is_written_before_a_capture_is_in_no_mean_twice(
    device: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture runs its step several times first; moments would take the token in at each."""
    capture = graph._capture

    def fail_late(run: Callable[[], Any], device: torch.device) -> Any:
        capture(run, device)
        raise RuntimeError("operation not permitted")

    model: Any = make_llama().to(device)
    ids = prompt(1, 50).to(device)
    config = replace(SMALL, metadata="moments")
    with torch.inference_mode(), enabled(model, device, config) as quest:
        cache, plain = quest.make_cache(200), quest.make_cache(200)
        for one in (cache, plain):
            model(ids, **cache_argument(one))
        steps(model, plain, ids, 3, output_hidden_states=True)  # which no graph holds
        if fails:
            monkeypatch.setattr(graph, "_capture", fail_late)
            with pytest.warns(QuestWarning, match="cannot be captured"):
                steps(model, cache, ids, 3)
        else:
            steps(model, cache, ids, 3)
            assert quest.graphs.replayed_steps == 3
        for ours, expected in zip(cache.layers[1:], plain.layers[1:], strict=True):
            pages = ours.num_pages
            torch.testing.assert_close(
                ours.storage.metadata[:, :, :pages], expected.storage.metadata[:, :, :pages], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", ["bounds", "moments", "sketch"])
@in_any_dtype
def test_drafts_and_checks_are_replayed(
    device: str, stored: str, batch: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lossless decoding: rows of their own lengths, checks of several sizes, tokens and counts of eager passes."""
    monkeypatch.setattr(DraftLength, "next", lambda length: (length._length, "measuring"))
    config = replace(SMALL, metadata=form)
    if form == "sketch":
        config = QuestConfig(32, 8, num_dense_layers=1, metadata="sketch", selection_unit="token", candidate_factor=0)
    model: Any = make_llama().to(device)
    ids = prompt(batch, 50).to(device)
    with enable_quest(model, replace(SMALL, token_budget=4096), kv_cache_dtype=stored):
        alone = generate(model, ids)
    with enable_quest(model, config, cuda_graphs=False, lossless=True, kv_cache_dtype=stored) as quest:
        assert generate(model, ids) == alone
        eagerly = quest.counters.drafts.accepted
    with enabled(model, device, config, lossless=True, kv_cache_dtype=stored) as quest:
        assert generate(model, ids) == alone
        drafts, graphs = quest.counters.drafts, quest.graphs
        assert drafts.drafted > drafts.accepted > 0
        # With graphs nothing is drafted at the very end. A GPU's kernels round otherwise in a graph.
        assert eagerly - 3 * batch <= drafts.accepted <= eagerly or device == "cuda"
        eager = sum(graphs.eager_steps.values())
        assert set(graphs.eager_steps) <= {"the storage is full and grows in this step"}
        assert graphs.replayed_steps > 20 > eager
        for layer in quest.counters.layers:
            checks = layer.dense_steps_by_reason["check"]
            assert layer.sparse_steps + layer.dense_steps == graphs.replayed_steps + eager
            passes, rest = divmod(layer.sparse_steps or layer.dense_steps - checks, 4)
            # The end counts the rows that are not done, of which a pass has one or more.
            assert rest == 0 and checks - drafts.plain_steps["the end"] <= passes < checks
        assert quest.counters.bypassed_steps == 0


def test_a_padded_batch_is_drafted_without_graphs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftLength, "next", lambda length: (length._length, "measuring"))
    model: Any = make_llama().to(device)
    ids = prompt(2, 50).to(device)
    ids[0, :9] = 0
    alone = generate(model, ids, attention_mask=(ids != 0).long())
    with enabled(model, device, lossless=True) as quest:
        assert generate(model, ids, attention_mask=(ids != 0).long()) == alone
        assert set(quest.graphs.eager_steps) == {"a batch with padding"}


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("new", [12, 45])
def test_what_follows_the_end_of_a_row_is_in_a_cache_that_is_kept(
    device: str, new: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fed in one pass: of more tokens than a check has, and over the padding of the prompt."""
    monkeypatch.setattr(DraftLength, "next", lambda length: (length._length, "measuring"))
    model: Any = make_llama().to(device)
    ids = prompt(2, 50).to(device)
    ids[0, :padding] = 0
    settings = {
        "attention_mask": (ids != 0).long(), "max_new_tokens": new, "pad_token_id": 0, "do_sample": False,
        "return_dict_in_generate": True,
    }  # fmt: skip
    first, second = model.generate(ids, **settings).sequences[:, 50:].tolist()
    settings["eos_token_id"] = next(token for token in first[:-4] if token not in second)
    alone = model.generate(ids, **settings)
    assert alone.sequences.shape[1] == 50 + new and not alone.sequences[0, -4:].any()
    with enabled(model, device, lossless=True):
        ours = model.generate(ids, **settings)
    assert torch.equal(ours.sequences, alone.sequences)
    for layer, theirs in zip(ours[CACHE].layers, alone[CACHE].layers, strict=True):
        torch.testing.assert_close(layer.keys, theirs.keys, rtol=1e-3, atol=1e-4)


def test_metadata_that_cannot_be_captured_is_taken_eagerly(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(DraftLength, "next", lambda length: (length._length, "measuring"))
    monkeypatch.setattr(graph._CapturedTake, "__init__", fail)
    model: Any = make_llama().to(device)
    ids = prompt(2, 50).to(device)
    alone = generate(model, ids)
    with enabled(model, device, lossless=True) as quest:
        with pytest.warns(QuestWarning, match="cannot be captured: operation not permitted"):
            assert generate(model, ids) == alone
        assert quest.counters.drafts.accepted > 0


def test_storage_that_grows_is_captured_again(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(1, 40).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache, plain = quest.make_cache(), quest.make_cache()
        for kind, one in (("replayed", cache), ("eager", plain)):
            model(ids, **cache_argument(one))
            tokens = []
            token = ids[:, -1:]
            for _ in range(60):
                extra = {"output_hidden_states": True} if kind == "eager" else {}
                token = model(input_ids=token, **cache_argument(one), **extra).logits[:, -1:].argmax(-1)
                tokens.append(int(token))
            if kind == "replayed":
                expected = tokens
        assert tokens == expected
        assert quest.graphs.captures >= 2
        assert quest.graphs.eager_steps["the storage is full and grows in this step"] >= 1
        assert quest.graphs.eager_steps["the forward pass was given output_hidden_states"] == 60
        assert cache.get_seq_length() == plain.get_seq_length() == 100


@pytest.mark.parametrize("name", ["bounds", "sketch"])
@in_any_dtype
def test_hot_units_come_and_go_in_replays(device: str, stored: str, name: str) -> None:
    """Keys and values in host memory: the same tokens, also after some were taken back between two replays."""
    config = {
        "bounds": SMALL,
        "sketch": QuestConfig(24, 8, num_dense_layers=1, metadata="sketch", selection_unit="token", candidate_factor=2),
    }[name]
    model: Any = make_llama().to(device)
    ids = prompt(2, 70).to(device)
    with torch.inference_mode(), enabled(model, device, config, kv_cache_dtype=stored) as quest:
        plain = quest.make_cache(200)
        quest._offload = Offload(56)  # as enable_quest(offload="host") has it, on a CPU too
        far = quest.make_cache(200)
        made: list[list[list[int]]] = []
        for cache, extra in ((plain, {"output_hidden_states": True}), (far, {})):
            model(ids, **cache_argument(cache))
            tokens = steps(model, cache, ids, 40, **extra)
            cache.crop(-21)
            model(ids[:, :3], **cache_argument(cache))
            made.append([tokens, steps(model, cache, ids, 30, **extra)])
        assert made[1] == made[0]
        assert quest.graphs.replayed_steps == 70
        fetches = quest.counters.fetches
        slots = sum(layer.storage.hot.owners.numel() for layer in far.layers if not layer.is_dense)
        assert slots < fetches.units_fetched < fetches.units_looked_up


def test_what_a_captured_step_reads(device: str) -> None:
    """Said when it is captured, and again at each replay, of which the host sees nothing."""
    model: Any = make_llama().to(device)
    ids = prompt(1, 40).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache = quest.make_cache(max_length=64)
        model(ids, **cache_argument(cache))
        for replayed in (1, 2):
            model(input_ids=ids[:, :1], **cache_argument(cache))
            assert quest.graphs.replayed_steps == replayed
            assert [layer.reading for layer in cache.layers] == [Reading.DENSE_LAYER, Reading.SPARSE, Reading.SPARSE]
        model(ids[:, :3], **cache_argument(cache))
        assert {layer.reading for layer in cache.layers} == {Reading.SEVERAL_TOKENS}
        model(input_ids=ids[:, :1], **cache_argument(cache))
        assert [layer.reading for layer in cache.layers] == [Reading.DENSE_LAYER, Reading.SPARSE, Reading.SPARSE]
        cache.crop(-30)
        model(input_ids=ids[:, :1], **cache_argument(cache))
        assert {layer.reading for layer in cache.layers} == {Reading.WITHIN_BUDGET}
        assert (quest.graphs.replayed_steps, quest.graphs.captures, quest.graphs.eager_steps) == (3, 1, {})
        assert [counter.sparse_steps for counter in quest.counters.layers] == [0, 3, 3]


class ReusedMemory:
    """An allocator that hands out the memory of earlier tensors again, to those of the same shape in the same order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._handed: list[Tensor] = []
        self._free: list[Tensor] = []
        original = Tensor.new_empty

        def new_empty(like: Tensor, *shape: Any, **options: Any) -> Tensor:
            made = original(like, *shape, **options)
            for number, old in enumerate(self._free):
                if old.shape == made.shape and old.dtype == made.dtype:
                    return self._free.pop(number)
            self._handed.append(made)
            return made

        monkeypatch.setattr(Tensor, "new_empty", new_empty)

    def free(self) -> None:
        """All that was handed out so far is free again."""
        self._free = list(self._handed)


@pytest.mark.parametrize("dense", [0, 1])
def test_a_reset_cache_at_the_same_addresses_is_captured_again(
    device: str, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its page tables and workspaces are others, though keys, values and bounds lie where those before lay."""
    config = replace(SMALL, num_dense_layers=dense)
    model: Any = make_llama().to(device)
    first, second = prompt(1, 50).to(device), prompt(1, 50, seed=7).to(device)
    with torch.inference_mode(), enable_quest(model, config, cuda_graphs=False) as quest:
        cache = quest.make_cache(200)
        model(second, **cache_argument(cache))
        expected = steps(model, cache, second, 5)
    memory = ReusedMemory(monkeypatch)
    with torch.inference_mode(), enabled(model, device, config) as quest:
        cache = quest.make_cache(200)
        model(first, **cache_argument(cache))
        steps(model, cache, first, 5)
        assert (quest.graphs.captures, quest.graphs.replayed_steps) == (1, 5)
        addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
        cache.reset()
        memory.free()
        model(second, **cache_argument(cache))
        assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == addresses
        assert steps(model, cache, second, 5) == expected
        assert (quest.graphs.captures, quest.graphs.replayed_steps) == (2, 10)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reset(),
        lambda cache: cache.batch_select_indices(torch.tensor([0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.layers[1].update(*torch.ones(2, 2, 2, 200, 8)),  # grows
        lambda cache: cache.layers[1].update(*torch.ones(2, 2, 2, 1, 8, dtype=torch.float64)),  # is widened
        lambda cache: cache.layers.__setitem__(1, copy.deepcopy(cache.layers[1])),
    ],
    ids=["reset", "fewer", "more", "grown", "widened", "replaced"],
)
@pytest.mark.filterwarnings("ignore:a QuestCache is in use but its keys:quest_attention.QuestWarning")
def test_a_captured_step_belongs_to_the_storage_it_was_captured_over(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the keys lie does not say it: every address is the same here."""
    monkeypatch.setattr(graph, "_capture", run_again)
    monkeypatch.setattr(Tensor, "data_ptr", lambda _: 0)
    model: Any = make_llama()
    ids = prompt(2, 50)
    with torch.inference_mode(), enable.QuestHandle(model, SMALL, None, capture=True) as quest:
        cache = quest.make_cache(64)
        model(ids, **cache_argument(cache))
        steps(model, cache, ids, 1)
        (step,), weights = quest.graphs._graphs[cache].values(), quest.graphs._weights()
        inputs = dict.fromkeys(("input_ids", "position_ids"), ids[:, :1])
        assert step.fits(cache, inputs, weights)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert step.fits(cache, inputs, weights), "written in place"
        change(cache)
        assert not step.fits(cache, inputs, weights)


def test_a_captured_step_belongs_to_the_weights_it_was_captured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_capture", run_again)
    monkeypatch.setattr(Tensor, "data_ptr", lambda _: 0)
    model: Any = make_llama()
    ids = prompt(1, 50)
    with torch.inference_mode(), enable.QuestHandle(model, SMALL, None, capture=True) as quest:
        cache = quest.make_cache(200)
        model(ids, **cache_argument(cache))
        inputs = dict.fromkeys(("input_ids", "position_ids"), ids[:, :1])
        quest.graphs._replay(cache, graph._Pass((50,), 1, Reading.SPARSE), inputs)
        (step,) = quest.graphs._graphs[cache].values()
        assert step.fits(cache, inputs, quest.graphs._weights())
        first = next(model.parameters())
        first.data = first.data.clone()  # as `to()` does
        assert not step.fits(cache, inputs, quest.graphs._weights())


def test_a_dense_layer_keeps_no_bounds_in_a_captured_step(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(2, 50).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache, plain = quest.make_cache(200), quest.make_cache(200)
        for one in (cache, plain):
            model(ids, **cache_argument(one))
        steps(model, cache, ids, 3)
        dense = cache.layers[0]
        assert dense.is_dense
        assert quest.graphs.replayed_steps == 3
        placeholder = dense.paged.metadata
        assert placeholder.untyped_storage().nbytes() <= placeholder.shape[-1] * placeholder.itemsize, "one row for all"
        placeholder[0, 0, 0].fill_(float("nan"))
        steps(model, cache, ids, 3)
        assert quest.graphs.replayed_steps == 6
        assert placeholder.isnan().all(), "nobody writes it"
        for _ in range(2):
            steps(model, plain, ids, 3, output_hidden_states=True)  # which no graph holds
        torch.testing.assert_close(dense.keys, plain.layers[0].keys)
        torch.testing.assert_close(dense.values, plain.layers[0].values)


@pytest.mark.skipif(CACHE == "past_key_values", reason="there is one name")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_older_name_of_the_cache_is_replayed_too(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(1, 40).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache = quest.make_cache(100)
        model(ids, past_key_values=cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
        assert quest.graphs.replayed_steps == 1
        assert cache.get_seq_length() == 41


def test_what_a_graph_cannot_hold_runs_eagerly_and_says_why(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(2, 50).to(device)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with enable_quest(model, SMALL, cuda_graphs=False):
        expected = generate(model, ids, attention_mask=mask)
    with enabled(model, device) as quest:
        assert generate(model, ids, attention_mask=mask) == expected
        assert quest.graphs.eager_steps == {"a batch with padding": 39}
        assert quest.graphs.replayed_steps == 0
    seen: list[int] = []
    with enabled(model, device, on_select=lambda layer, *_: seen.append(layer)) as quest:
        generate(model, ids)
        assert quest.graphs.eager_steps == {"on_select or on_read is called at every step": 39}
    assert seen
    with torch.inference_mode(), enabled(model, device) as quest:
        cache = quest.make_cache(200)
        seen.clear()
        cache.layers[1].on_read = lambda layer, *_, **__: seen.append(layer)
        model(ids, **cache_argument(cache))
        steps(model, cache, ids, 3)
        assert quest.graphs.eager_steps == {"on_select or on_read is called at every step": 3}
        assert seen == [1, 1, 1]


def test_what_the_configuration_asks_for_is_each_steps_own(device: str) -> None:
    """Before a capture and after it: a graph would give the same memory at each step, or nothing."""
    model: Any = make_llama().to(device)
    ids = prompt(1, 50).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache = quest.make_cache(200)
        model(ids, **cache_argument(cache))
        for replayed in (0, 2):
            model.config.output_hidden_states = True
            first, second = (model(ids[:, :1], **cache_argument(cache)).hidden_states[-1] for _ in range(2))
            assert first.data_ptr() != second.data_ptr() and not torch.equal(first, second)
            assert quest.graphs.replayed_steps == replayed
            model.config.output_hidden_states = False
            steps(model, cache, ids, 2)
        assert quest.graphs.eager_steps == {"the forward pass was given output_hidden_states": 4}


def test_gradients_are_refused_where_a_step_would_be_captured(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(1, 50).to(device)
    with enabled(model, device) as quest:
        cache = quest.make_cache(200)
        with torch.no_grad():
            model(ids, **cache_argument(cache))
        with pytest.raises(QuestStateError, match="no_grad"):
            model(ids[:, :1], **cache_argument(cache))
        assert quest.graphs.captures == 0
        assert cache.get_seq_length() == 50


def test_two_caches_in_turn_and_a_cache_that_is_dropped(device: str) -> None:
    model: Any = make_llama().to(device)
    first, second = prompt(1, 50).to(device), prompt(1, 70).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        caches = [quest.make_cache(200), quest.make_cache(200)]
        tokens: list[list[int]] = [[], []]
        for cache, ids in zip(caches, (first, second), strict=True):
            model(ids, **cache_argument(cache))
        last = [first[:, -1:], second[:, -1:]]
        for _ in range(10):
            for i, cache in enumerate(caches):
                last[i] = model(last[i], **cache_argument(cache)).logits[:, -1:].argmax(-1)
                tokens[i].append(int(last[i]))
        assert quest.graphs.captures == 2
        alone = quest.make_cache(200)
        model(second, **cache_argument(alone))
        token, expected = second[:, -1:], []
        for _ in range(10):
            token = model(input_ids=token, **cache_argument(alone)).logits[:, -1:].argmax(-1)
            expected.append(int(token))
        assert tokens[1] == expected
        del caches, cache, alone
        gc.collect()
        if device == "cuda":  # the stand-in keeps what it runs again
            assert len(quest.graphs._graphs) == 0


def steps(model: Any, cache: Any, ids: Tensor, count: int, **options: Any) -> list[list[int]]:
    """Greedy decode steps after the cache's tokens."""
    tokens, token = [], ids[:, -1:]
    for _ in range(count):
        token = model(input_ids=token, **cache_argument(cache), **options).logits[:, -1:].argmax(-1)
        tokens.append(token.flatten().tolist())
    return tokens


def test_autocast_runs_eagerly(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(1, 50).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache, plain = quest.make_cache(200), quest.make_cache(200)
        model(ids, **cache_argument(cache))
        with torch.autocast(device, dtype=torch.bfloat16):
            steps(model, cache, ids, 5)
        assert quest.graphs.replayed_steps == 0
        assert quest.graphs.eager_steps == {"under autocast, whose copies of the weights end with it": 5}
        for one, other in zip(cache.layers, plain.layers, strict=True):
            other.update(one.keys, one.values)
        replayed = steps(model, cache, ids, 5)
        assert quest.graphs.replayed_steps == 5
        for name in ("forward", "_prepare_cache_for_generation"):
            assert name in model.__dict__
        quest.disable()
        with enable_quest(model, SMALL, cuda_graphs=False):
            assert steps(model, plain, ids, 5) == replayed


def test_a_cache_of_narrower_tokens_is_widened_before_it_is_captured(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(1, 50).to(device)
    narrow = torch.ones(1, 2, 50, 8, dtype=torch.bfloat16, device=device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache = quest.make_cache(200)
        for layer in cache.layers:
            layer.update(narrow, narrow)
        steps(model, cache, ids, 4)
        assert quest.graphs.eager_steps == {"the storage takes another dtype in this step": 1}
        assert (quest.graphs.replayed_steps, quest.graphs.captures) == (3, 1)
        assert cache.get_seq_length() == 54
        assert {layer.keys.dtype for layer in cache.layers} == {torch.float32}


def test_a_model_that_changes_is_captured_again(device: str) -> None:
    model: Any = make_llama().to(device)
    ids = prompt(1, 50).to(device)
    with torch.inference_mode(), enabled(model, device) as quest:
        cache = quest.make_cache(200)
        model(ids, **cache_argument(cache))
        steps(model, cache, ids, 3)
        assert quest.graphs.captures == 1
        model.resize_token_embeddings(105)
        logits = model(input_ids=ids[:, :1], **cache_argument(cache)).logits
        assert logits.shape[-1] == 105
        assert quest.graphs.captures == 2
        assert quest.graphs.replayed_steps == 4


def test_a_model_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Callable[[], Any], device: torch.device) -> Any:
        run()
        raise RuntimeError(f"operation not permitted when stream is capturing on {device}\nmore lines")

    monkeypatch.setattr(graph, "_capture", refuse)
    model: Any = make_llama()
    ids = prompt(1, 50)
    with enable_quest(model, SMALL) as quest:
        expected = generate(model, ids)
        counted = quest.counters.to_dict()
    with enable.QuestHandle(model, SMALL, None, capture=True) as quest:
        with pytest.warns(QuestWarning, match="cannot be captured: operation not permitted"):
            assert generate(model, ids) == expected
        assert quest.counters.to_dict() == counted
        assert list(quest.graphs.eager_steps.values()) == [39]
        assert quest.graphs.replayed_steps == quest.graphs.captures == 0
    refused = pytest.raises(QuestStateError, match="cuda_graphs: got True")
    with enable.QuestHandle(model, SMALL, None, capture=True, must_capture=True), refused:
        generate(model, ids)
    with enable_quest(model, SMALL):
        assert generate(model, ids) == expected  # left as it was


def test_graphs_are_refused_where_they_cannot_run() -> None:
    model: Any = make_llama()
    with pytest.raises(BackendError, match="cuda_graphs: got True on device cpu"):
        enable_quest(model, SMALL, cuda_graphs=True)
    with enable_quest(model, SMALL) as quest:
        assert quest.graphs is None
