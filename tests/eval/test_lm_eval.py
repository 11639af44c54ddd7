"""lm-evaluation-harness on Quest, offline: RULER's `niah_single_1` with the bundled model, and what is refused."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quest_attention import QuestConfig
from quest_attention.errors import QuestStateError, QuestValueError, QuestWarning
from quest_attention.models import bundled_model_path

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lm-eval[hf]'")
pytest.importorskip("accelerate", reason="lm_eval's adapter for transformers needs it")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from quest_attention.eval.lm_eval import QuestLM, ReadTotals

LENGTH = 4096  # the shortest that RULER has a metric for [tokens]
RULER = Path(lm_eval.tasks.__file__).parent / "ruler"  # alone: reading the names of all tasks takes seconds
SAMPLES = 2
BUDGET = 256  # [tokens]
SPARSE_LAYERS = 4  # of the six of the bundled model, the first two are dense
STORY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 20
ANSWER_TOKENS = 16  # the number that is asked for has 7 digits [tokens]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled_model_path())


@pytest.fixture(scope="module")
def ruler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """RULER without a download, and with no more samples and words than are asked for, which it makes for seconds.

    Its module downloads nltk's sentence splitter unless its folder is there; this task never uses it.
    """
    nltk = pytest.importorskip("nltk", reason="lm_eval's RULER tasks need it")
    wonderwords = pytest.importorskip("wonderwords", reason="lm_eval's RULER tasks need it")
    folder = tmp_path_factory.mktemp("nltk_data")
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(folder), *nltk.data.path])
        few = {kind: words[:50] for kind, words in wonderwords.RandomWord()._categories.items()}
        patch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=few))
        made_by = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
        whole = made_by.generate_samples
        patch.setattr(
            made_by, "generate_samples", lambda *args, **options: whole(*args, **{**options, "num_samples": SAMPLES})
        )
        yield


def answers(lm: HFLM) -> tuple[list[str], float]:
    """What a model answers to `niah_single_1`, and the share of right ones."""
    metadata = {"tokenizer": str(bundled_model_path()), "max_seq_lengths": [LENGTH]}
    results = simple_evaluate(
        model=lm,
        tasks=["niah_single_1"],
        task_manager=TaskManager(include_path=str(RULER), include_defaults=False, metadata=metadata),
        metadata=metadata,
        limit=SAMPLES,
        gen_kwargs={"max_gen_toks": ANSWER_TOKENS},
        bootstrap_iters=0,
    )
    assert results is not None
    texts = [sample["resps"][0][0] for sample in results["samples"]["niah_single_1"]]
    assert len(texts) == SAMPLES
    return texts, results["results"]["niah_single_1"][f"{LENGTH},none"]


def scoring(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0)


@pytest.mark.slow
@pytest.mark.usefixtures("ruler")
def test_a_ruler_task_is_sparse_and_with_a_budget_of_everything_the_same_as_hflm(model: Any, tokenizer: Any) -> None:
    plain, plain_right = answers(HFLM(pretrained=model, tokenizer=tokenizer))
    whole = QuestLM(model, tokenizer, config=QuestConfig(token_budget=LENGTH))
    assert answers(whole)[0] == plain
    assert whole.counters.sparse_steps == 0
    assert whole.counters.share_read == 1

    quest = QuestLM(model, tokenizer, config=QuestConfig(token_budget=BUDGET))
    _, right = answers(quest)
    assert plain_right == right == 1
    # Decode steps of a prompt: its tail, but for the last token that generate() feeds, and one for each answer token.
    steps = SAMPLES * (quest.tail_tokens - 1 + ANSWER_TOKENS)
    assert quest.counters.sparse_steps == steps * SPARSE_LAYERS
    assert quest.counters.dense_steps == steps * quest.quest_config.num_dense_layers
    # The two dense layers read everything, the others at most their budget.
    assert 1 / 3 < quest.counters.share_read < 1 / 3 + 2 / 3 * BUDGET / (LENGTH - 512)
    assert quest.get_model_info()["quest"]["counters"]["sparse_steps"] == quest.counters.sparse_steps


def test_the_dense_baseline_decodes_the_same_tail_and_answers_like_hflm(model: Any, tokenizer: Any) -> None:
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _model, args, kwargs: fed.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]),
        with_kwargs=True,
    )
    prompt = "The grass is green. The sky is blue. " * 40
    request = Instance("generate_until", {}, (prompt, {"max_gen_toks": 4, "until": []}), 0)
    try:
        dense = QuestLM(model, tokenizer, tail_tokens=8)
        answer = dense.generate_until([request], disable_tqdm=True)
    finally:
        hook.remove()
    length = len(tokenizer(prompt).input_ids)
    assert length - 8 <= 512, "one chunk"
    assert fed == [length - 8] + [1] * (8 - 1 + 4)
    assert answer == HFLM(pretrained=model, tokenizer=tokenizer).generate_until([request], disable_tqdm=True)
    assert dense.counters == ReadTotals()
    assert dense.counters.share_read == 1


@pytest.mark.parametrize("tail_tokens", [1, 24, 100_000])
def test_likelihoods_are_those_of_hflm_when_everything_is_read_and_sparse_when_not(
    model: Any, tokenizer: Any, tail_tokens: int
) -> None:
    # Likely, unlikely, without a context (no decode step of it is past the budget), and one token.
    story = STORY[:320]
    assert len(tokenizer(story).input_ids) > 64
    pairs = [(story, " The sky is blue."), (story, " Purple!"), ("", "The sky"), (story, " The")]
    requests = [scoring(*pair) for pair in pairs]
    expected = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    for config in (None, QuestConfig(token_budget=4096)):
        lm = QuestLM(model, tokenizer, config=config, tail_tokens=tail_tokens)
        got = lm.loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        # float32, in other orders of summation: logits of about 10 differ by some 1e-5, and a sum has 8 of them.
        torch.testing.assert_close([s for s, _ in got], [s for s, _ in expected], rtol=1e-4, atol=1e-3)
        assert lm.counters.sparse_steps == 0
    sparse = QuestLM(model, tokenizer, config=QuestConfig(token_budget=64), tail_tokens=tail_tokens)
    assert sparse.loglikelihood(requests, disable_tqdm=True) != expected
    assert sparse.counters.sparse_steps > 0


def test_a_rolling_likelihood_decodes_the_text_from_its_first_token(model: Any, tokenizer: Any) -> None:
    text = STORY[:600]
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    lm = QuestLM(model, tokenizer, config=QuestConfig(token_budget=64))
    (score,) = lm.loglikelihood_rolling([request], disable_tqdm=True)
    past_budget = len(tokenizer(text).input_ids) - 64  # a text of T tokens takes T steps, at lengths of 1 to T
    assert past_budget > 0
    assert lm.counters.sparse_steps == past_budget * SPARSE_LAYERS
    assert score < 0


def test_pages_are_counted_where_pages_are_read(model: Any, tokenizer: Any) -> None:
    pages = QuestLM(model, tokenizer, config=QuestConfig(token_budget=64))
    tokens = QuestLM(
        model, tokenizer, config=QuestConfig(token_budget=64, metadata="sketch", selection_unit="token"), tail_tokens=8
    )
    for lm in (pages, tokens, tokens):  # what was read is summed over calls
        lm.loglikelihood([scoring(STORY[:600], " The")], disable_tqdm=True)
        assert lm.counters.sparse_steps > 0 and 0 < lm.counters.tokens_read < lm.counters.tokens_held
    assert pages.counters.pages_read is not None and 16 * pages.counters.pages_read == pages.counters.tokens_read
    assert tokens.counters.pages_read is None and tokens.counters.pages_held is None
    written = tokens.get_model_info()["quest"]["counters"]
    assert "pages_read" not in written and written["tokens_read"] == tokens.counters.tokens_read


def test_it_leaves_the_model_as_it_was(model: Any, tokenizer: Any) -> None:
    before = set(vars(model)), model.config
    QuestLM(model, tokenizer, config=QuestConfig(token_budget=64)).loglikelihood([scoring(STORY, " The")], True)
    assert (set(vars(model)), model.config) == before


@pytest.mark.parametrize("call", ["loglikelihood", "generate_until"])
def test_a_long_prompt_without_a_sparse_step_is_an_error(model: Any, tokenizer: Any, call: str) -> None:
    lm = QuestLM(model, tokenizer, config=QuestConfig(token_budget=64, num_dense_layers=6))
    arguments: tuple[str, Any] = (STORY, " The") if call == "loglikelihood" else (STORY, {"max_gen_toks": 2})
    request = Instance(call, {}, arguments, 0)
    error = pytest.raises(QuestStateError, match=f"{call}: 1 prompts .* longer than the budget of 64")
    with pytest.warns(QuestWarning, match="num_dense_layers=6 leaves no layer"), error:
        getattr(lm, call)([request], disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "argument", "expected"),
    [
        ({"batch_size": 2}, "batch_size", "1: decode steps"),
        ({"batch_size": "auto"}, "batch_size", "1: decode steps"),
        ({"tail_tokens": 0}, "tail_tokens", "a positive integer"),
        ({"tail_tokens": "64"}, "tail_tokens", "a positive integer"),
        ({"tail_tokens": True}, "tail_tokens", "a positive integer"),
        ({"token_budgt": 64}, "token_budgt", "did you mean token_budget"),
        ({"token_budget": 64, "backend": "seq2seq"}, "backend", "one of auto"),
        ({"max_batch_size": 8}, "max_batch_size", "a known option"),
        ({"token_budget": 8}, "token_budget", "at least 32"),
        ({"page_size": 16}, "page_size", "token_budget beside it"),
        ({"config": {"token_budget": 64}}, "config", "a QuestConfig"),
        ({"config": QuestConfig(), "token_budget": 64}, "token_budget", "nothing beside config"),
    ],
)
def test_a_wrong_argument_is_named(
    model: Any, tokenizer: Any, options: dict[str, Any], argument: str, expected: str
) -> None:
    with pytest.raises(QuestValueError, match=re.escape(expected)) as caught:
        QuestLM(model, tokenizer, **options)
    assert caught.value.argument == argument
    assert caught.value.got == options[argument]


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_several_answers_are_refused(model: Any, tokenizer: Any, name: str) -> None:
    request = Instance("generate_until", {}, (STORY, {"max_gen_toks": 2, name: 2}), 0)
    with pytest.raises(QuestValueError, match=f"{name}: got 2, expected 1"):
        QuestLM(model, tokenizer).generate_until([request], disable_tqdm=True)


def test_by_name_it_takes_what_the_command_line_gives() -> None:
    given = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    arguments = f"pretrained={bundled_model_path()},token_budget=128,page_size=8,num_dense_layers=1,tail_tokens=32"
    lm = get_model("quest").create_from_arg_string(arguments, given)
    assert isinstance(lm, QuestLM)
    assert lm.quest_config == QuestConfig(token_budget=128, page_size=8, num_dense_layers=1).resolved("cpu")
    assert lm.get_model_info()["quest"]["config"]["metadata"] == "moments", "the record says what auto was"
    assert lm.tail_tokens == 32
    assert QuestLM.create_from_arg_obj({"pretrained": str(bundled_model_path()), "dense": True}).quest_config is None


@pytest.mark.parametrize("options", [{}, {"dense": False}, {"dense": True, "token_budget": 64}])
def test_by_name_it_is_never_dense_unasked(options: dict[str, Any]) -> None:
    with pytest.raises(QuestValueError, match=r"token_budget: got .*, expected a budget in tokens, or dense=True"):
        QuestLM.create_from_arg_obj({"pretrained": str(bundled_model_path()), **options})


def test_lm_eval_is_asked_for_only_here() -> None:
    code = (
        "import sys, quest_attention, quest_attention.eval; assert not any('lm_eval' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_lm_eval_missing_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("lm_eval.", "quest_attention.eval.lm_eval")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'lm-eval[hf]")):
        importlib.import_module("quest_attention.eval.lm_eval")
