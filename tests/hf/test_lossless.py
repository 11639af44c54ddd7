"""Lossless decoding: what is written is what the model writes without Quest, whatever Quest drafts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from families import FAMILIES, build
from quest_attention import QuestConfig, QuestStateError, QuestValueError, UnsupportedModelError, enable_quest
from quest_attention.hf import QuestCache, QuestLayer, cache_argument
from quest_attention.hf.counters import LayerCounter
from quest_attention.hf.draft_length import DraftLength
from quest_attention.hf.drafting import Drafting
from quest_attention.hf.naming import CACHE
from quest_attention.hf.storage import KEPT_TOKENS, KVStorage
from quest_attention.hf.workspaces import Workspaces
from quest_attention.models import bundled_model_path
from quest_attention.ops import Selection, reference, update_page_metadata
from quest_attention.pages import PagedKV
from tiny import make_llama, prompt

LOW = QuestConfig(token_budget=16, page_size=4, num_dense_layers=0, metadata="bounds")
"""So little that a tiny random model seldom agrees with itself."""
HIGH = replace(LOW, token_budget=64)
"""Nearly everything: most drafts stay."""
FORMS = {
    "bounds": LOW,
    "fp8": replace(LOW, metadata_dtype="fp8"),
    "moments": replace(LOW, metadata="moments", num_sink_pages=1),
    "sketch": QuestConfig(16, 4, num_dense_layers=0, metadata="sketch", selection_unit="token"),
}
FULL = [name for name, family in FAMILIES.items() if set(family.kinds) <= {"dense", "quest"}]
FULL = [name for name in FULL if len(FAMILIES[name].kinds) == 4]  # the others have linear layers too
PARTLY = [name for name in FAMILIES if name not in FULL]


@pytest.fixture(autouse=True)
def always_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tiny model's steps take says nothing, so time decides nothing here."""
    monkeypatch.setattr(DraftLength, "next", lambda length: (length._length, "measuring"))


def generate(model: Any, ids: Tensor, new: int = 24, **options: Any) -> Any:
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "attention_mask": (ids != 0).long()}
    return model.generate(ids, **settings | options)


def both(model: Any, ids: Tensor, config: QuestConfig = LOW, drafts: Any = None, **options: Any) -> tuple[Any, ...]:
    """What the model writes alone, what it writes with Quest's drafts, and what became of them."""
    alone = generate(model, ids, **options)
    with enable_quest(model, config, lossless=True, draft_tokens=drafts) as quest:
        return alone, generate(model, ids, **options), quest.counters


def padded(batch: int = 3, padding: Sequence[int] = (13, 0, 40)) -> Tensor:
    ids = prompt(batch)
    for row, count in enumerate(padding):
        ids[row, :count] = 0
    return ids


@pytest.mark.every_value
@pytest.mark.parametrize("config", [LOW, HIGH], ids=["low", "high"])
@pytest.mark.parametrize("name", FULL)
def test_every_family_writes_what_it_writes_alone(name: str, config: QuestConfig) -> None:
    model = build(FAMILIES[name])
    alone, ours, counters = both(model, prompt(), config)
    assert torch.equal(alone, ours)
    assert counters.sparse_steps > 0
    assert counters.bypassed_steps == 0
    assert counters.drafts.drafted > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [prompt(1), prompt(3), padded()], ids=["one", "three", "padded"])
@pytest.mark.parametrize("drafts", [1, 4, 15])
def test_batches_and_forms(form: str, ids: Tensor, drafts: int) -> None:
    alone, ours, counters = both(make_llama(), ids, replace(FORMS[form], token_budget=44), drafts)
    assert torch.equal(alone, ours)
    found = counters.drafts
    assert 0 < found.accepted < found.drafted
    assert found.tokens_a_check == (found.accepted + found.checks) / found.checks


def test_more_drafts_stay_with_more_budget() -> None:
    """How many, random weights do not say."""
    model = make_llama()
    low, high = (both(model, prompt(3), config)[2].drafts.acceptance for config in (LOW, HIGH))
    assert low < high


def test_rows_accept_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as many as the least of the batch."""
    seen = []
    settle = QuestCache.settle

    def watch(cache: Any, before: Any, after: Any, **options: Any) -> None:
        seen.append(tuple(end - start for start, end in zip(before, after, strict=True)))
        settle(cache, before, after, **options)

    monkeypatch.setattr(QuestCache, "settle", watch)
    alone, ours, counters = both(make_llama(), prompt(4), replace(LOW, token_budget=40))
    assert torch.equal(alone, ours)
    assert any(len(set(gains)) > 2 for gains in seen)
    assert counters.drafts.checks == sum(
        gain > 0 for gains in seen for gain in gains
    ) - counters.drafts.plain_steps.get("the end", 0)


def test_a_row_does_not_depend_on_memory_that_nobody_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a short row is what the allocator left there, NaN perhaps, where a longer row has tokens."""
    empty = Tensor.new_empty

    def poisoned(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = empty(like, *shape, **options)
        return made.fill_(float("nan")) if made.dtype.is_floating_point and made.dim() > 3 else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    alone, ours, _ = both(make_llama(), padded())
    assert torch.equal(alone, ours)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [prompt(1), padded()], ids=["one", "padded"])
def test_metadata_is_that_of_the_tokens_that_stayed(form: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every check, row by row, as the oracle has it of the keys in the cache, and before drafts of all held."""
    settle, draft, checks, resumed = QuestCache.settle, Drafting._draft, [], []

    def watch(cache: Any, before: Any, after: Any, **options: Any) -> None:
        settle(cache, before, after, **options)
        checks.append(after)
        for layer in cache.layers:
            assert_metadata_is_of_keys(layer, after)

    def watch_draft(drafting: Any, fed: Tensor, count: int) -> Any:
        if count:
            resumed.append(drafting.held)
            for layer in drafting._cache.layers:
                assert_metadata_is_of_keys(layer, drafting.held)
        return draft(drafting, fed, count)

    pattern = itertools.cycle([3, 0, 0, 2, 0, 0, 0, 0, 0, 1])
    monkeypatch.setattr(DraftLength, "next", lambda _: (next(pattern), "drafting does not pay"))
    monkeypatch.setattr(Drafting, "_draft", watch_draft)
    monkeypatch.setattr(QuestCache, "settle", watch)
    alone, ours, counters = both(make_llama(), ids, FORMS[form], new=50)
    assert torch.equal(alone, ours)
    plain = counters.drafts.plain_steps["drafting does not pay"]
    assert plain > 10 and len(resumed) > 5
    assert len(checks) < 3 * len(resumed), "several plain steps are taken in at once"


def assert_metadata_is_of_keys(layer: QuestLayer, lengths: Sequence[int]) -> None:
    stored, form = layer.paged.contiguous, layer.paged.form
    assert stored is not None
    kv = PagedKV.from_contiguous(stored.keys, stored.values, torch.zeros_like(stored.metadata), form=form)
    assert kv.contiguous is not None
    held = torch.tensor(lengths, dtype=torch.int32)
    # The oracle rounds the levels of sketches in float64, to other bits.
    update_page_metadata(kv, held, held, backend="torch" if form.takes_whole_pages else "reference")
    for row, length in enumerate(lengths):
        pages = length // 4 if form.takes_whole_pages else -(-length // 4)
        ours, expected = (of[row, :, :pages].float() for of in (stored.metadata, kv.contiguous.metadata))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ids", [prompt(1), padded()], ids=["one", "padded"])
def test_the_cache_holds_what_it_would_without_drafts(ids: Tensor) -> None:
    model = make_llama()
    alone, ours, _ = both(model, ids, return_dict_in_generate=True)
    assert torch.equal(alone.sequences, ours.sequences)
    for theirs, layer in zip(alone[CACHE].layers, ours[CACHE].layers, strict=True):
        assert layer.get_seq_length() == theirs.get_seq_length() == ours.sequences.shape[1] - 1
        torch.testing.assert_close(layer.keys, theirs.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(layer.values, theirs.values, rtol=1e-3, atol=1e-4)
        assert_metadata_is_of_keys(layer, [layer.get_seq_length()] * len(ids))


@pytest.mark.parametrize("ends", [1, 3])
def test_the_end_of_a_text_in_the_middle_of_a_check(ends: int) -> None:
    """Rows end at different tokens, and pads follow; the cache holds them too, as it does without drafts."""
    model = make_llama()
    ids = padded()
    free = generate(model, ids, 50)
    eos = [int(free[row, 60 + at]) for row, at in zip(range(ends), (9, 20, 33), strict=False)]
    options = {"eos_token_id": eos, "return_dict_in_generate": True, "new": 50}
    alone, ours, _ = both(model, ids, HIGH, **options)
    assert alone.sequences.shape[1] <= 110
    assert (alone.sequences[:, 60:] == 0).any() == (ends > 0)
    assert torch.equal(alone.sequences, ours.sequences)
    for theirs, layer in zip(alone[CACHE].layers, ours[CACHE].layers, strict=True):
        torch.testing.assert_close(layer.keys, theirs.keys, rtol=1e-3, atol=1e-4)


@pytest.mark.every_value
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": 7},
        {"max_new_tokens": None, "max_length": 77},
        {"min_new_tokens": 20, "eos_token_id": list(range(1, 40))},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [3, 4, 5]},
        {"bad_words_ids": [[5, 6], [7]]},
        {"forced_eos_token_id": 9, "eos_token_id": 9},
        pytest.param(
            {"prefix_allowed_tokens_fn": lambda row, ids: [(len(ids) * 7 + row * 3 + n) % 97 for n in range(9)]},
            id="prefix_allowed_tokens_fn",
        ),
        {"prefill_chunk_size": 16},
        {"prefill_chunk_size": 59},
        {"num_return_sequences": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("ids", [prompt(1), padded()], ids=["one", "padded"])
def test_what_generate_takes(ids: Tensor, options: dict[str, Any]) -> None:
    """Ends, processors that look at the tokens before or at a row's number, prompts in pieces: one of one token too."""
    alone, ours, _ = both(make_llama(), ids, **options)
    assert torch.equal(alone, ours)


def test_embeddings_for_a_prompt() -> None:
    model: Any = make_llama()
    embeddings = model.get_input_embeddings()(prompt(2)).detach()
    options = {"inputs_embeds": embeddings, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(**options)
    with enable_quest(model, LOW, lossless=True) as quest:
        assert torch.equal(model.generate(**options), alone)
        assert quest.counters.drafts.checks > 0


class Seen:
    """A streamer, or a stopping criterion, that notes what it is given."""

    def __init__(self) -> None:
        self.given: list[list[Any]] = []
        self.is_over = False

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.is_over = True

    def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        self.given.append(ids.tolist())
        return torch.full((len(ids),), False)


@pytest.mark.parametrize("ids", [prompt(1), padded()], ids=["one", "padded"])
def test_streamers_and_criteria_see_each_column_once(ids: Tensor) -> None:
    model = make_llama()
    seen = []
    for is_ours in (False, True):
        streamer, criterion = Seen(), Seen()
        options = {"streamer": streamer, "stopping_criteria": [criterion], "eos_token_id": [5, 17]}
        if is_ours:
            with enable_quest(model, HIGH, lossless=True):
                generate(model, ids, **options)
        else:
            generate(model, ids, **options)
        assert streamer.is_over
        seen.append((streamer.given, criterion.given))
    assert seen[0] == seen[1]


def test_rows_that_go_on_behind_their_ends() -> None:
    """Where a criterion ends a row and no end-of-text token is known, generate() writes on until all have ended."""

    class Ends(Seen):
        def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.tensor([len(ids[0]) > 70 + 7 * row for row in range(len(ids))])

    alone, ours, _ = both(make_llama(), padded(), HIGH, stopping_criteria=[Ends()])
    assert alone.shape[1] < 110
    assert torch.equal(alone, ours)


def test_scores_and_logits() -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    alone, ours, _ = both(make_llama(), padded(), repetition_penalty=1.3, **options)
    assert torch.equal(alone.sequences, ours.sequences)
    assert len(ours.scores) == len(ours.logits) == 24
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(ours[name]), torch.stack(alone[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ids", [prompt(1), padded()], ids=["one", "padded"])
def test_turns(ids: Tensor) -> None:
    """A cache that goes on with the next generate(), also where one row has ended before the other."""
    model: Any = make_llama()
    eos = int(generate(model, ids)[0, 75])

    def talk(cache: Any) -> list[list[int]]:
        told, mask = ids, (ids != 0).long()
        for turn in range(3):
            told = model.generate(
                told, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=eos,
                **cache_argument(cache),
            )  # fmt: skip
            told = torch.cat([told, prompt(len(ids), 9, seed=turn + 5)], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(ids), told.shape[1] - mask.shape[1])], dim=1)
        found: list[list[int]] = told.tolist()
        return found

    alone = talk(DynamicCache(config=model.config))
    with enable_quest(model, HIGH, lossless=True) as quest:
        assert talk(quest.make_cache()) == alone
        assert quest.counters.drafts.accepted > 5


def test_a_check_that_fails_leaves_a_cache_that_can_be_used() -> None:
    model: Any = make_llama()
    ids = padded()

    class Fails(Seen):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.given) == 20:
                raise RuntimeError("no more")

    with enable_quest(model, LOW, lossless=True) as quest:
        cache = quest.make_cache()
        with pytest.raises(RuntimeError, match="no more"):
            generate(model, ids, streamer=Fails(), **cache_argument(cache))
        length = cache.get_seq_length()
        assert 60 <= length < 80
        assert cache.rows.lengths is None
        for layer in cache.layers:
            assert_metadata_is_of_keys(layer, [length] * 3)


def test_a_pass_that_fails_between_layers() -> None:
    """Some layers have its tokens and some do not; all have the same afterwards, and the text can go on from there."""
    model: Any = make_llama()
    ids, passes = padded(), []
    alone = generate(model, ids, 50)

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 30:
            raise RuntimeError("no memory")

    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(fail)
    with enable_quest(model, LOW, lossless=True) as quest:
        cache = quest.make_cache()
        with pytest.raises(RuntimeError, match="no memory"):
            generate(model, ids, 50, **cache_argument(cache))
        hook.remove()
        (length,) = {layer.get_seq_length() for layer in cache.layers}
        assert 60 <= length < 110
        mask = torch.cat([(ids != 0).long(), torch.ones(3, length + 1 - 60).long()], dim=1)
        options = {"attention_mask": mask, "max_new_tokens": 110 - length - 1, **cache_argument(cache)}
        assert torch.equal(generate(model, alone[:, : length + 1], **options), alone)


# Sampling


def test_sampled_tokens_have_the_models_distribution() -> None:
    """Joint, of the three tokens after a prompt, over all that there are, against the model's own probabilities."""
    torch.manual_seed(0)
    model: Any = make_llama(vocab=6)
    ids = prompt(1, 40) % 5 + 1
    options = {"temperature": 1.4, "top_k": 5, "top_p": 0.98}
    expected = torch.zeros(6, 6, 6, dtype=torch.float64)
    one = {"do_sample": True, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, **options}
    for first in range(6):
        for second in range(6):
            ahead = torch.cat([ids, torch.tensor([[first, second]])], dim=1)
            chances = [
                model.generate(ahead[:, : 40 + n], pad_token_id=0, attention_mask=torch.ones(1, 40 + n).long(), **one)
                .scores[0][0].double().softmax(-1)
                for n in range(3)
            ]  # fmt: skip
            expected[first, second] = chances[0][first] * chances[1][second] * chances[2]
    draws, batch = 12, 500
    counts = torch.zeros(6, 6, 6, dtype=torch.float64)
    with enable_quest(model, replace(LOW, token_budget=8), lossless=True) as quest:
        for _ in range(draws):
            made = generate(model, ids.expand(batch, -1), 8, **options, do_sample=True)[:, 40:43]
            counts += torch.bincount(made[:, 0] * 36 + made[:, 1] * 6 + made[:, 2], minlength=216).view(6, 6, 6)
        assert 0.1 < quest.counters.drafts.acceptance < 0.9  # both branches of the rejection are taken
    assert chi_square_is_plausible(counts, expected * draws * batch)


def chi_square_is_plausible(counts: Tensor, expected: Tensor) -> bool:
    """Within five deviations; cells of fewer than five are one. `counts` and `expected` have the same sum."""
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare])]
    if expected[rare].sum() >= 5:
        cells.append((counts[rare].sum()[None], expected[rare].sum()[None]))
    else:
        assert counts[rare].sum() < 20
    statistic = sum(float(((got - wanted) ** 2 / wanted).sum()) for got, wanted in cells)
    freedom = sum(len(got) for got, _ in cells) - 1
    return abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_chi_square_finds_another_distribution() -> None:
    """What Quest alone would draw, without a check, is refused by the same numbers."""
    torch.manual_seed(0)
    wanted = torch.rand(216).softmax(0).double() * 6000
    shifted = (wanted.log() + 0.5 * torch.randn(216)).exp()
    drawn = torch.multinomial(shifted, 6000, replacement=True)
    counts = torch.bincount(drawn, minlength=216).double()
    assert not chi_square_is_plausible(counts, wanted)
    drawn = torch.multinomial(wanted, 6000, replacement=True)
    assert chi_square_is_plausible(torch.bincount(drawn, minlength=216).double(), wanted)


def test_sampling_at_no_temperature_is_greedy() -> None:
    model = make_llama()
    greedy = generate(model, padded())
    with enable_quest(model, LOW, lossless=True):
        assert torch.equal(generate(model, padded(), do_sample=True, temperature=1e-5, top_k=0), greedy)


# Counters, reading, undoing


def test_counters() -> None:
    model = make_llama()
    ids = prompt(2)
    with enable_quest(model, LOW, lossless=True, draft_tokens=3) as quest:
        generate(model, ids)
        drafts = quest.counters.drafts
        assert drafts.accepted + drafts.checks + sum(drafts.plain_steps.values()) >= 2 * 23
        for layer in quest.counters.layers:
            assert layer.prefill_tokens == 60
            assert set(layer.dense_steps_by_reason) == {"check"}
        counted = json.loads(json.dumps(quest.counters.to_dict()))["drafts"]
        assert counted["drafted"] == drafts.drafted
        assert set(counted) == {"drafted", "accepted", "acceptance", "checks", "tokens_a_check", "plain_steps"}
        assert f"{drafts.accepted} of {drafts.drafted} drafted tokens accepted" in quest.counters.summary()
        quest.counters.reset()
        assert quest.counters.drafts.to_dict()["drafted"] == 0
        assert "nothing drafted" in quest.counters.summary()
    with enable_quest(model, LOW) as quest:
        assert quest.counters.drafts is None
        assert "drafts" not in quest.counters.to_dict()


def test_nothing_is_drafted_within_the_budget() -> None:
    """A draft would read as much as a check; the model's own function runs, to the last bit."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    alone, ours, counters = both(make_llama(), prompt(2), replace(LOW, token_budget=1024), **options)
    assert all(torch.equal(*pair) for pair in zip(alone.logits, ours.logits, strict=True))
    assert counters.drafts.to_dict()["plain_steps"] == {"within budget": 2 * 23}
    assert counters.sparse_steps == counters.drafts.drafted == 0


def test_a_model_called_by_hand_reads_everything() -> None:
    model: Any = make_llama()
    ids = prompt()
    with enable_quest(model, LOW, lossless=True) as quest, torch.inference_mode():
        cache = quest.make_cache()
        model(ids[:, :40], **cache_argument(cache))
        ours = [model(ids[:, at : at + 1], **cache_argument(cache)).logits for at in range(40, 60)]
        assert quest.counters.sparse_steps == 0
        assert quest.counters.layers[0].dense_steps_by_reason == {"check": 20}
    with torch.inference_mode():
        torch.testing.assert_close(torch.cat(ours, dim=1), model(ids).logits[:, 40:], rtol=1e-4, atol=1e-4)


def test_on_select_hears_of_drafts() -> None:
    heard = []
    model = make_llama()
    with enable_quest(model, LOW, lossless=True, on_select=lambda *given: heard.append(given)) as quest:
        generate(model, prompt())
        assert len(heard) == quest.counters.sparse_steps > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [prompt(1), padded()], ids=["one", "padded"])
def test_drafts_read_what_the_first_one_chose(form: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the tokens since then; after `KEPT_TOKENS` of them one chooses again."""
    rounds: list[list[Any]] = []
    attend = Drafting._forward

    def follow(loop: Any, fed: Tensor, nth: int, **options: Any) -> Tensor:
        if options["is_drafting"] and nth == 0:
            rounds.append([])
        return attend(loop, fed, nth, **options)

    def listen(layer: int, selected: Selection, _: int) -> None:
        if layer == 0:
            used = selected.counts[:, 0].tolist()
            rounds[-1].append(
                [set(row[:count]) for row, count in zip(selected.units[:, 0].tolist(), used, strict=True)]
            )

    def tally(counter: LayerCounter, read: Any, *others: Any) -> None:
        if counter.layer == 0:
            counted.append(int(read))
        count(counter, read, *others)

    counted: list[int] = []
    count = LayerCounter.count_sparse
    monkeypatch.setattr(LayerCounter, "count_sparse", tally)
    monkeypatch.setattr(Drafting, "_forward", follow)
    config = FORMS[form]
    with enable_quest(make_llama(), config, lossless=True, draft_tokens=10, on_select=listen) as quest:
        generate(quest.model, ids, 20)
    has_new = False
    reads = iter(counted)
    assert any(len(found) > KEPT_TOKENS + 1 for found in rounds)
    for found in rounds:
        for nth, rows in enumerate(found):
            first = found[nth // (KEPT_TOKENS + 1) * (KEPT_TOKENS + 1)]
            since = nth % (KEPT_TOKENS + 1)
            assert next(reads) == sum(len(units) * config.unit_size + since for units in first)
            for row, units in enumerate(rows):
                chosen = first[row]
                assert chosen <= units and -1 not in units
                assert len(units - chosen) <= since
                if config.unit_size == 1:
                    assert units - chosen == {max(chosen) + 1 + n for n in range(since)}
                has_new |= units != chosen
    assert has_new


@pytest.mark.parametrize("lengths", [37, torch.tensor([37, 21])], ids=["alike", "rows"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_read_as_the_oracle_reads_it(form: str, lengths: Any) -> None:
    config = FORMS[form]
    keys, values = torch.randn(2, 2, 2, 48, 32)
    storage = KVStorage(
        keys[:, :, :0], values[:, :, :0], batch=2, length=48, dtype=torch.float32, config=config, has_metadata=True,
        workspaces=Workspaces(), has_gaps=True,
    )  # fmt: skip
    storage.write(keys, values, 0)
    step = storage.decode(torch.randn(2, 4, 32), lengths)
    storage.keep(step.selected, lengths)
    for more in range(1, KEPT_TOKENS + 1):
        query = torch.randn(2, 4, 32)
        output = storage.attend_to_kept(query, lengths + more).output
        before, now = (torch.as_tensor(length).expand(2).tolist() for length in (lengths, lengths + more))
        size = config.unit_size
        units = [
            [[*found[: int(count)], *range((old - 1) // size + 1, (new - 1) // size + 1)] for found, count in pairs]
            for old, new, pairs in zip(
                before, now, map(zip, step.selected.units.tolist(), step.selected.counts.tolist()), strict=True
            )
        ]
        expected, _ = reference.sparse_decode_attention(query, storage.paged, now, units, 32**-0.5, unit_size=size)
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_disable_restores_the_model() -> None:
    model: Any = make_llama()
    before, alone = dict(model.__dict__), generate(model, prompt())
    quest = enable_quest(model, LOW, lossless=True, draft_tokens="auto")
    assert quest.is_lossless
    assert set(model.__dict__) - set(before) >= {"generate", "_extract_generation_mode_kwargs"}
    quest.disable()
    assert set(model.__dict__) == set(before)
    assert torch.equal(generate(model, prompt()), alone)
    with enable_quest(model, LOW) as plain:
        assert not plain.is_lossless
        generate(model, prompt())
        assert plain.counters.sparse_steps > 0


# What is refused


@pytest.mark.parametrize("drafts", [0, 16, -1, True, 2.0, "many", "4"])
def test_numbers_of_drafts(drafts: Any) -> None:
    with pytest.raises(QuestValueError, match=r"draft_tokens.*1 to 15 tokens"):
        enable_quest(make_llama(), LOW, lossless=True, draft_tokens=drafts)


def test_other_arguments() -> None:
    model = make_llama()
    with pytest.raises(QuestValueError, match="lossless: got 1"):
        enable_quest(model, LOW, lossless=1)  # type: ignore[arg-type]
    with pytest.raises(QuestValueError, match="draft_tokens: got 4, expected None without lossless"):
        enable_quest(model, LOW, draft_tokens=4)
    enable_quest(model, LOW).disable()  # nothing was left behind


@pytest.mark.parametrize("name", PARTLY)
def test_models_whose_tokens_cannot_be_taken_back(name: str) -> None:
    model = build(FAMILIES[name])
    quest = replace(LOW, num_dense_layers=FAMILIES[name].num_dense_layers)
    with pytest.raises(
        UnsupportedModelError, match=r"lossless: got .*, from which drafted tokens cannot be taken back"
    ):
        enable_quest(model, quest, lossless=True)
    enable_quest(model, quest).disable()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 3}, "num_beams: got 3"),
        ({"num_beams": 2, "do_sample": True}, "num_beams: got 2"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: got 3"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: got 0.6"),
        ({"use_cache": False}, "use_cache: got False"),
        ({"guidance_scale": 2.0}, "logits_processor: got .*ClassifierFreeGuidance"),
        ({"output_attentions": True}, "output_attentions: got True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states: got True"),
        pytest.param({"custom_generate": lambda *_, **__: None}, "custom_generate: got", id="custom_generate"),
        ({"synced_gpus": True}, "synced_gpus: got True"),
        ({"cache_implementation": "static"}, "cache_implementation: got"),
        pytest.param(
            {"attention_mask": (torch.arange(65) > 3).long()[None]},
            r"attention_mask.shape: got \[1, 65\], expected \[1, 60\]",
            id="a mask of more tokens",
        ),
        pytest.param(
            {"position_ids": torch.arange(60).expand(3, 1, 60)},
            r"position_ids.shape: got \[3, 1, 60\], expected \[B, T\] with lossless=True",
            id="three positions a token",
        ),
    ],
    ids=str,
)
def test_ways_to_generate(options: dict[str, Any], named: str) -> None:
    model = make_llama()
    alone = generate(model, prompt())
    with enable_quest(model, LOW, lossless=True):
        with pytest.raises(QuestValueError, match=named):
            generate(model, prompt(), **options)
        assert torch.equal(generate(model, prompt()), alone)


def test_a_prompt_of_no_tokens() -> None:
    model = make_llama()
    with (
        enable_quest(model, LOW, lossless=True),
        pytest.raises(QuestValueError, match=r"input_ids.shape: got \[1, 0\], expected a token or more"),
    ):
        generate(model, torch.zeros(1, 0, dtype=torch.long))


def test_assistants() -> None:
    model, assistant = make_llama(), make_llama(layers=1)
    with (
        enable_quest(model, LOW, lossless=True),
        pytest.raises(QuestValueError, match="assistant_model: got 'LlamaForCausalLM', expected None"),
    ):
        generate(model, prompt(), assistant_model=assistant)
    with (
        enable_quest(assistant, LOW, lossless=True),
        pytest.raises(QuestValueError, match="is_assistant: got True, expected False"),
    ):
        generate(model, prompt(), assistant_model=assistant)


def test_other_caches() -> None:
    model = make_llama()
    with enable_quest(model, LOW) as quest:
        sparse = quest.make_cache()
    with enable_quest(model, LOW, lossless=True) as quest:
        for cache, named in ((DynamicCache(config=model.config), "DynamicCache"), (sparse, "a QuestCache of sparse")):
            with pytest.raises(QuestValueError, match=f"got '{named}.*expected a cache of the handle's make_cache"):
                generate(model, prompt(), **cache_argument(cache))
            assert cache.get_seq_length() == 0
        quest.disable()
        with pytest.raises(QuestStateError):
            quest.make_cache()


# Other attention, other dtypes, stop strings


def test_eager_attention_is_checked_by_itself() -> None:
    model = make_llama()
    model.set_attn_implementation("eager")
    alone, ours, counters = both(model, padded())
    assert torch.equal(alone, ours)
    assert counters.drafts.accepted > 0


def test_autocast() -> None:
    """Rounded sums may choose another of two near tokens, so that lengths and drafts are what is looked at."""
    with torch.autocast("cpu", torch.bfloat16):
        alone, ours, counters = both(make_llama(), padded())
    assert alone.shape == ours.shape
    assert counters.drafts.accepted > 0


def test_stop_strings() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(bundled_model_path())
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    inputs = tokenizer("The grass is green. The sky is blue. " * 12, return_tensors="pt")
    options = {"max_new_tokens": 40, "do_sample": False, "stop_strings": ["blue"], "tokenizer": tokenizer}
    alone = model.generate(**inputs, **options)
    assert alone.shape[1] - inputs.input_ids.shape[1] < 40
    with enable_quest(model, QuestConfig(64), lossless=True) as quest:
        assert torch.equal(model.generate(**inputs, **options), alone)
        assert quest.counters.drafts.checks > 0


def test_several_answers_to_a_prompt() -> None:
    model = make_llama()
    with enable_quest(model, LOW, lossless=True) as quest:
        made = generate(model, prompt(2), 20, do_sample=True, num_return_sequences=3)
        assert made.shape == (6, 80)
        assert quest.counters.drafts.accepted > 0
