"""The methods that Quest is compared with: what they keep, against loops; what they read, against their budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from families import FAMILIES, build
from quest_attention import QuestConfig, QuestStateError, QuestValueError
from quest_attention.eval.context import read_context
from quest_attention.eval.decode import decode_answer
from quest_attention.eval.methods import METHODS, Full, Method, PageCeiling, Quest, Session, make_method, spell_out
from quest_attention.eval.methods.evicting import Policy
from quest_attention.eval.methods.h2o import H2O
from quest_attention.eval.methods.page_ceiling import true_scores
from quest_attention.eval.methods.snapkv import _KERNEL, SnapKV
from quest_attention.eval.methods.streaming_llm import StreamingLLM
from quest_attention.eval.methods.token_ceiling import heaviest_tokens
from quest_attention.eval.methods.tova import TOVA
from quest_attention.eval.observation import WINDOW, Observation, attention_weights
from quest_attention.hf import cache_argument, layer_kinds
from tiny import VOCABULARY, make_llama

LAYERS, DENSE, HEADS, KV_HEADS, DIM = 3, 1, 4, 2, 8
EVICTING = ("streaming_llm", "h2o", "tova", "snapkv")
CONTEXT, QUESTION, NEW = 90, 5, 6


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama(heads=HEADS, kv_heads=KV_HEADS, dim=DIM, layers=LAYERS)


def tokens(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()


def method(name: str, budget: int, **options: Any) -> Method:
    return make_method(name, token_budget=budget, num_dense_layers=DENSE, page_size=4, **options)


def answer(model: LlamaForCausalLM, used: Method) -> tuple[list[int], Session]:
    """The answer of a method to a fixed question, and its session."""
    context = read_context(model, tokens(CONTEXT), observe=used.observes, chunk_size=32)
    with used.session(model) as session:
        session.load(context)
        return decode_answer(model, session.cache, tokens(QUESTION, 2), NEW).tokens, session


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_a_budget_beyond_the_length_gives_the_answer_of_full_attention(model: LlamaForCausalLM, name: str) -> None:
    expected, _ = answer(model, Full())
    assert answer(model, method(name, 4 * CONTEXT))[0] == expected


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("budget", [16, 40])
def test_every_step_reads_the_budget(model: LlamaForCausalLM, name: str, budget: int) -> None:
    _, session = answer(model, method(name, budget))
    steps = QUESTION + NEW - 1  # the last token of the answer is not fed
    for reads in session.reads():
        assert reads.steps == steps
        if reads.layer < DENSE:
            assert not reads.is_sparse
            assert reads.tokens_read == reads.tokens_held
        else:
            assert reads.is_sparse
            assert reads.tokens_read == budget * steps


def test_the_model_is_as_it_was_after_a_session(model: LlamaForCausalLM) -> None:
    before = model.config._attn_implementation, model.config, set(vars(model))
    for name in METHODS:
        answer(model, method(name, 16))
    assert (model.config._attn_implementation, model.config, set(vars(model))) == before


def true_attention(model: LlamaForCausalLM, ids: list[int]) -> list[Tensor]:
    """Weights of full attention of each layer, `[HQ, T, T]`, as the model's own eager attention gives them."""
    eager = LlamaForCausalLM(model.config)
    eager.set_attn_implementation("eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = eager.eval()(torch.tensor([ids]), output_attentions=True).attentions
    return [layer[0] for layer in found]


def kept_positions(model: LlamaForCausalLM, used: Method) -> list[list[list[int]]]:
    """Positions in the cache after the first decode step, by layer past the dense ones and KV head, the new one too."""
    ids = tokens(CONTEXT)
    everything = DynamicCache(config=model.config)
    context = read_context(model, ids, observe=used.observes, num_dense_layers=DENSE, chunk_size=32)
    with torch.no_grad(), used.session(model) as session:
        session.load(context)
        model(torch.tensor([tokens(1, 2)]), **cache_argument(session.cache))
        layers = [layer.keys for layer in session.cache.layers]
    with torch.no_grad():
        model(torch.tensor([[*ids]]), **cache_argument(everything))
    found = []
    for index in range(DENSE, LAYERS):
        mine, full = layers[index], everything.layers[index].keys
        assert mine is not None and full is not None
        heads = []
        for head in range(KV_HEADS):
            gaps = (mine[0, head, :-1, None] - full[0, head, None]).abs().sum(-1)  # [kept, T]
            assert float(gaps.min(1).values.max()) < 1e-4
            heads.append([*gaps.argmin(1).tolist(), CONTEXT])
        found.append(heads)
    return found


def largest(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def expected_positions(name: str, weights: Tensor, budget: int) -> list[int]:
    """What stays of the context for one KV head, in loops over the weights `[G, T, T]` of its query heads.

    For TOVA the weights are those of all query heads of the layer.
    """
    room = budget - 1
    length = weights.shape[1]
    if name == "streaming_llm":
        return [*range(4), *range(length - room + 4, length)]
    if name == "h2o":
        recent = room // 2
        received = [float(weights[:, :, t].sum()) for t in range(length)]
        return [*largest(received[: length - recent], room - recent), *range(length - recent, length)]
    if name == "tova":
        last = [float(weights[:, -1, t].mean()) for t in range(length)]
        return [*largest(last[:-1], room - 1), length - 1]
    window = min(WINDOW, budget // 2)
    votes = [float(weights[:, -window:, t].mean(0).sum()) for t in range(length)]
    half = _KERNEL // 2
    pooled = []
    for t in range(length):
        near = votes[max(0, t - half) : t + half + 1]
        pooled.append(sum(near) / len(near))
    recent = min(window, room)
    return [*largest(pooled[: length - recent], room - recent), *range(length - recent, length)]


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("budget", [12, 33])
def test_what_is_kept_of_a_context(model: LlamaForCausalLM, name: str, budget: int) -> None:
    truth = true_attention(model, tokens(CONTEXT))
    found = kept_positions(model, method(name, budget))
    group = HEADS // KV_HEADS
    for offset, heads in enumerate(found):
        for head, positions in enumerate(heads):
            weights = truth[DENSE + offset]
            mine = weights if name == "tova" else weights[head * group : (head + 1) * group]
            assert positions == [*expected_positions(name, mine, budget), CONTEXT]


@pytest.mark.parametrize("name", EVICTING)
def test_a_context_read_by_the_session_itself(model: LlamaForCausalLM, name: str) -> None:
    expected, _ = answer(model, method(name, 16))
    used = method(name, 16)
    with torch.no_grad(), used.session(model) as session:
        for start in range(0, CONTEXT, 32):
            model(torch.tensor([tokens(CONTEXT)[start : start + 32]]), **cache_argument(session.cache))
        session.reset_counts()
        assert decode_answer(model, session.cache, tokens(QUESTION, 2), NEW).tokens == expected


def test_observing_in_pieces() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, HEADS, 70, DIM, generator=generator), torch.randn(2, 2, 70, DIM, generator=generator)
    whole, pieces = Observation(), Observation()
    whole.observe(query, key)
    for start, stop in ((0, 3), (3, 40), (40, 69), (69, 70)):
        pieces.observe(query[:, :, start:stop], key[:, :, :stop])
    assert whole.received is not None and pieces.received is not None
    torch.testing.assert_close(pieces.received, whole.received)
    torch.testing.assert_close(pieces.window, whole.window)
    torch.testing.assert_close(whole.received.sum(), torch.tensor(2.0 * HEADS * 70))  # each query gives 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "length", "dim"), [(1, 1, 8), (70, 70, 8), (5, 130, 24), (129, 200, 16)])
def test_received_attention_of_the_kernel(dtype: torch.dtype, count: int, length: int, dim: int) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    from quest_attention.ops.triton.received import received_attention  # noqa: PLC0415 - needs triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(2, count, HEADS, dim, generator=generator).to(device, dtype).transpose(1, 2)  # as models do
    key = torch.randn(2, length, 2, dim, generator=generator).to(device, dtype).transpose(1, 2)
    weights = attention_weights(query, key, first_position=length - count, scaling=0.4)
    torch.testing.assert_close(received_attention(query, key, 0.4), weights.sum((2, 3)))


def test_attention_weights_with_softcap_and_sinks() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key = torch.randn(1, 4, 1, DIM, generator=generator), torch.randn(1, 2, 9, DIM, generator=generator)
    sinks = torch.randn(4, generator=generator)
    found = attention_weights(query, key, scaling=0.7, softcap=1.5, s_aux=sinks)
    for head in range(4):
        logits = [1.5 * torch.tanh((query[0, head, 0] @ key[0, head // 2, t]) * 0.7 / 1.5) for t in range(9)]
        total = sum(logit.exp() for logit in logits) + sinks[head].exp()
        expected = torch.stack([logit.exp() / total for logit in logits])
        torch.testing.assert_close(found[0, head // 2, head % 2, 0], expected)


@pytest.mark.parametrize("used", [H2O(9, 0), TOVA(9, 0), SnapKV(9, 0), StreamingLLM(9, 0)], ids=lambda used: used.name)
def test_policies_over_many_steps(used: Any) -> None:
    """Twenty decode steps with made-up weights, against lists of (position, score)."""
    generator = torch.Generator().manual_seed(5)
    room, start = used.token_budget - 1, 14
    received = torch.rand(1, 1, start, generator=generator)
    observation: Any = SimpleNamespace(received=received, window=torch.rand(1, 1, 9, start, generator=generator))
    policy: Policy = used.policy()
    scores = policy.start(observation) if policy.observes else torch.zeros(1, 1, start)
    position = torch.arange(start)[None, None]
    mine = list(zip(range(start), scores[0, 0].tolist(), strict=True))
    for step in range(start, start + 20):
        if scores.shape[2] > room:
            index = policy.keep(scores, room)
            scores, position = scores.gather(2, index), position.gather(2, index)
            mine = _keep(used, mine, room)
        assert position[0, 0].tolist() == [place for place, _ in mine]
        scores = torch.nn.functional.pad(scores, (0, 1))
        position = torch.cat((position, torch.tensor([[[step]]])), 2)
        mine.append((step, 0.0))
        weights = torch.rand(1, 1, 2, scores.shape[2], generator=generator)
        scores = policy.step(scores, weights) if policy.observes else scores
        given = weights[0, 0].tolist()
        if used.name == "h2o":
            mine = [(place, old + given[0][i] + given[1][i]) for i, (place, old) in enumerate(mine)]
        elif used.name == "tova":
            mine = [(place, (given[0][i] + given[1][i]) / 2) for i, (place, _) in enumerate(mine)]


def _keep(used: Any, mine: list[tuple[int, float]], room: int) -> list[tuple[int, float]]:
    if used.name == "streaming_llm":
        return mine[:4] + mine[len(mine) - room + 4 :]
    recent = {"h2o": room // 2, "tova": 1, "snapkv": min(WINDOW, used.token_budget // 2)}[used.name]
    older = sorted(mine[: len(mine) - recent], key=lambda pair: -pair[1])[: room - recent]
    return sorted(older) + mine[len(mine) - recent :]


def test_true_scores() -> None:
    generator = torch.Generator().manual_seed(6)
    query, keys = torch.randn(1, 4, DIM, generator=generator), torch.randn(1, 2, 11, DIM, generator=generator)
    found = true_scores(query, keys, 4)
    for head in range(2):
        for page in range(3):
            places = range(4 * page, min(4 * page + 4, 11))
            logits = [float(query[0, 2 * head + g] @ keys[0, head, t]) for g in range(2) for t in places]
            assert float(found[0, head, page]) == pytest.approx(max(logits), rel=1e-5)


def test_the_oracle_reads_the_pages_of_the_largest_logits(model: LlamaForCausalLM) -> None:
    """And so at least as much attention mass as Quest, which only bounds the logits."""
    seen: list[tuple[int, list[list[int]]]] = []
    used = method("oracle", 16)
    assert isinstance(used, PageCeiling)
    used.on_select = lambda layer, selected, _: seen.append((layer, selected.units[0].tolist()))
    answer(model, used)
    assert {layer for layer, _ in seen} == set(range(DENSE, LAYERS))
    assert all(len(pages) == 4 and pages == sorted(pages) for _, heads in seen for pages in heads)


def test_further_tokens_come_one_by_one(model: LlamaForCausalLM) -> None:
    with torch.no_grad(), method("h2o", 16).session(model) as session:
        model(torch.tensor([tokens(30)]), **cache_argument(session.cache))
        model(torch.tensor([tokens(1)]), **cache_argument(session.cache))
        with pytest.raises(QuestStateError, match="one by one"):
            model(torch.tensor([tokens(3)]), **cache_argument(session.cache))


def test_a_context_that_nobody_observed(model: LlamaForCausalLM) -> None:
    context = read_context(model, tokens(30))
    with method("snapkv", 16).session(model) as session, pytest.raises(QuestValueError, match="which snapkv needs"):
        session.load(context)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qest", "got 'qest', expected one of full, quest"),
        ("h2o:page_size=4", "h2o without options"),
        ("quest:page_sise=4", "did you mean page_size"),
        ("quest:page_size", "option=value"),
        ("quest:token_budget=4", "an option of its own"),
        ("quest:metadata=mean", "another metadata: one of bounds, moments, sketch, auto, not 'mean'"),
        ("quest:metadata=moments,moments_coefficient=-0.5", "another moments_coefficient: a number from 0 to 100"),
    ],
)
def test_wrong_methods(spec: str, message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        method(spec, 16)


@pytest.mark.parametrize("name", EVICTING)
def test_too_small_a_budget(name: str) -> None:
    with pytest.raises(QuestValueError, match="token_budget: got 1, expected at least"):
        method(name, 1)


def test_options_of_quest() -> None:
    used = method("quest:page_size=8,num_sink_pages=1", 64)
    assert isinstance(used, Quest)
    assert (used.config.page_size, used.config.num_sink_pages, used.config.token_budget) == (8, 1, 64)


def test_moments_as_options_of_quest(model: LlamaForCausalLM) -> None:
    used = method("quest:metadata=moments,moments_coefficient=0.5", 16)
    assert isinstance(used, Quest)
    assert (used.config.metadata, used.config.moments_coefficient, used.config.num_sink_pages) == ("moments", 0.5, 1)
    _, session = answer(model, used)
    for reads in session.reads()[DENSE:]:
        assert reads.is_sparse and reads.tokens_read == 16 * reads.steps
    everything = method("quest:metadata=moments", 4 * CONTEXT)
    assert answer(model, everything)[0] == answer(model, Full())[0]


@pytest.mark.parametrize("metadata", ["bounds", "moments"])
def test_tokens_ranked_by_keys_as_an_option_of_quest(model: LlamaForCausalLM, metadata: str) -> None:
    used = method(f"quest:metadata={metadata},selection_unit=token,candidate_factor=2,page_size=4", 16)
    assert isinstance(used, Quest) and used.unit == 1
    _, session = answer(model, used)
    for reads in session.reads()[DENSE:]:
        assert reads.is_sparse and reads.tokens_read == 16 * reads.steps
    with pytest.raises(QuestValueError, match="metadata: got 'auto', expected a form by name"):
        method("quest:metadata=auto", 16)  # a table says what was read, before any device is known


@pytest.mark.parametrize(
    ("spec", "device", "spelt"),
    [
        ("full", "cpu", "full"),
        ("quest", "cuda", "quest"),
        ("quest:metadata=moments", "cuda", "quest:metadata=moments"),
        ("quest:metadata=auto", "cpu", "quest:metadata=moments,selection_unit=page"),
        ("quest:metadata=auto", "cuda", "quest:metadata=sketch,selection_unit=token"),
        ("quest:num_sink_pages=2,metadata=auto", "cuda", "quest:num_sink_pages=2,metadata=sketch,selection_unit=token"),
        ("quest:metadata=auto,selection_unit=4", "cpu", "quest:metadata=moments,selection_unit=4"),
        (
            "quest:metadata=auto,metadata_dtype=fp8",
            "cuda",
            "quest:metadata=bounds,metadata_dtype=fp8,selection_unit=page",
        ),
    ],
)
def test_a_table_names_the_form_that_auto_is(spec: str, device: str, spelt: str) -> None:
    assert spell_out(spec, device) == spelt
    assert spell_out(spelt, "mps") == spelt
    assert method(spelt, 64).name == spec.partition(":")[0], "it can be made"


def test_a_form_that_auto_is_and_that_takes_no_such_option() -> None:
    with pytest.raises(QuestValueError, match=r'another group_reduction: max or mean for .*; metadata "auto"'):
        spell_out("quest:metadata=auto,group_reduction=mass,metadata_dtype=fp8", "cpu")


def test_the_token_oracle_against_loops(model: LlamaForCausalLM) -> None:
    """It reads the tokens with the largest mean weight over the heads of a group, and the one being written."""
    seen: list[Tensor] = []
    weights: list[Tensor] = []

    def on_read(_: int, selected: Any, query: Tensor, keys: Tensor, **kwargs: Any) -> None:
        seen.append(selected.units[0])
        weights.append(attention_weights(query, keys, **kwargs)[0, :, :, 0])  # [HKV, G, T]

    context = read_context(model, tokens(CONTEXT))
    with torch.inference_mode(), method("token_oracle", 16).session(model) as session:
        session.load(context)
        for layer in session.cache.layers:
            if hasattr(layer, "on_read"):
                layer.on_read = on_read
        model(torch.tensor([tokens(1)]), **cache_argument(session.cache))
    assert len(seen) == LAYERS - DENSE
    for selected, each in zip(seen, weights, strict=True):
        for head in range(KV_HEADS):
            mass = [sum(float(w) for w in each[head, :, t]) / (HEADS // KV_HEADS) for t in range(CONTEXT + 1)]
            older = sorted(range(CONTEXT), key=lambda t: -mass[t])[:15]
            assert selected[head].tolist() == sorted([*older, CONTEXT])


def test_heaviest_tokens_normalise_each_head_before_they_compare() -> None:
    """One head with large logits everywhere does not speak for the others: its weights sum to one as theirs do."""
    weights = torch.tensor([[[[0.8, 0.1, 0.05, 0.05], [0.0, 0.6, 0.4, 0.0]]]])
    assert heaviest_tokens(weights, 2).tolist() == [[[0, 3]]]
    assert heaviest_tokens(weights, 3).tolist() == [[[0, 1, 3]]]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss", "qwen3_next"])
def test_models_with_other_layers_choose_in_their_full_ones(family: str, name: str) -> None:
    """Windowed and linear layers go along as they are: with everything read, the answer is full attention's."""
    used = build(FAMILIES[family])
    kinds = layer_kinds(used.config, QuestConfig(num_dense_layers=DENSE))
    assert set(kinds.values()) > {"quest"} or family == "qwen3_next"
    expected, full = answer(used, Full())
    assert answer(used, method(name, 4 * CONTEXT))[0] == expected
    _, session = answer(used, method(name, 16))
    choosing = [reads for reads in session.reads() if kinds[reads.layer] == "quest"]
    assert [reads.layer for reads in choosing] == [index for index, kind in kinds.items() if kind == "quest"]
    assert {reads.layer for reads in full.reads()} >= {reads.layer for reads in choosing}
    for reads in choosing:
        assert reads.is_sparse and reads.tokens_read == 16 * (QUESTION + NEW - 1)


@pytest.mark.parametrize("unit", ["token", "4"])
def test_the_oracle_of_pages_takes_no_other_unit(unit: str) -> None:
    with pytest.raises(QuestValueError, match="selection_unit=page: it reads whole pages, and token_oracle tokens"):
        make_method(f"oracle:metadata=sketch,selection_unit={unit}", token_budget=64, num_dense_layers=0)
