"""`quest eval`: the plan, the folder that goes on where a run stopped, and what is measured, on the bundled model."""

from __future__ import annotations

import functools
import json
import operator
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quest_attention import QuestConfig, QuestStateError, QuestValueError
from quest_attention.cli.app import integers, run, split_list
from quest_attention.eval.context import read_context
from quest_attention.eval.excerpt import SOUTH
from quest_attention.eval.journal import SAMPLES, SETTINGS, Journal
from quest_attention.eval.methods import Full, Quest
from quest_attention.eval.perplexity import BUCKET, predict_tokens
from quest_attention.eval.plan import Arm, Job, Plan, Work, divide
from quest_attention.eval.pool import run_jobs
from quest_attention.eval.recall import TOP_TOKENS, measure_recall
from quest_attention.eval.rounds import make_rounds
from quest_attention.eval.runner import CONTINUATION_STEPS, RECALL_STEPS, Runner
from quest_attention.eval.tasks import CONTINUATION, GRID, PERPLEXITY, RECALL
from quest_attention.hf import cache_argument
from quest_attention.models import bundled_model_path

LENGTH = 1024
Row = dict[str, Any]


def make_plan(**options: Any) -> Plan:
    given = {"tasks": ("passkey",), "methods": ("full", "quest"), "token_budgets": ("64",), "lengths": (LENGTH,)}
    return Plan(**{**given, "num_samples": 2, **options})


def make_runner(plan: Plan) -> Runner:
    path = bundled_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    return Runner(model, AutoTokenizer.from_pretrained(path), plan)


@functools.cache
def loaded() -> Runner:
    return make_runner(make_plan())


def runner(**options: Any) -> Runner:
    return Runner(loaded().model, loaded().tokenizer, make_plan(**options))


def rows(used: Runner) -> list[Row]:
    jobs = [(job, used.plan.arms(job.task, job.length)) for job in used.jobs]
    return [row for found in run_jobs(used, [jobs]) for row in found.rows]


def without_time(found: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def assert_recall_is_alike(one: Row, other: Row) -> None:
    """Equal but for the last of the five decimals, which a batch may round differently."""
    for name in ("mass", "top10"):
        torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(other[name]), rtol=0, atol=2e-5)
    assert {**one, "mass": 0, "top10": 0} == {**other, "mass": 0, "top10": 0}


def test_batch_that_finds_too_little_memory_is_measured_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    used = runner(tasks=(RECALL,), methods=("quest", "oracle"), lengths=(256,), num_samples=5)  # of any shape
    arms = tuple(used.plan.arms(RECALL, 256))
    whole, sizes = Runner._recall, []

    def short_of_memory(self: Runner, work: Work) -> Iterator[Row]:
        sizes.append(len(work.jobs))
        if len(work.jobs) > 2:
            raise torch.OutOfMemoryError("no more")
        yield from whole(self, work)

    expected = without_time(list(used.measure(Work(tuple(used.jobs), arms))))
    monkeypatch.setattr(Runner, "_recall", short_of_memory)
    found = without_time(list(used.measure(Work(tuple(used.jobs), arms))))
    key = operator.itemgetter("index", "method")
    for one, other in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        assert_recall_is_alike(one, other)
    assert sizes == [5, 2, 3, 1, 2]

    asked: list[tuple[int, list[str]]] = []

    def short_of_memory_later(self: Runner, work: Work) -> Iterator[Row]:
        asked.append((len(work.jobs), [arm.method for arm in work.arms]))
        for row in whole(self, work):
            if len(work.jobs) > 3 and row["method"] == "oracle":
                raise torch.OutOfMemoryError("no more")
            yield row

    monkeypatch.setattr(Runner, "_recall", short_of_memory_later)
    found = without_time(list(used.measure(Work(tuple(used.jobs), arms))))
    for one, other in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        assert_recall_is_alike(one, other)
    assert asked == [(5, ["quest", "oracle"]), (2, ["oracle"]), (3, ["oracle"])]  # what quest answered stays
    monkeypatch.setattr(Runner, "_recall", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError, match="none at all"):
        list(used.measure(Work(tuple(used.jobs), arms)))


def test_arms_and_budgets() -> None:
    plan = make_plan(methods=("full", "quest", "h2o"), token_budgets=("64", "1/8", "128"), tasks=("passkey", RECALL))
    budgets = [64, LENGTH // 8]
    expected = [Arm("full", None), *(Arm(name, budget) for name in ("quest", "h2o") for budget in budgets)]
    assert plan.arms("passkey", LENGTH) == expected
    assert plan.arms(RECALL, LENGTH) == [Arm("quest", budget) for budget in budgets]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("paskey",)}, "task: got 'paskey', expected one of passkey"),
        ({"tasks": ()}, "task: got 'nothing', expected at least one"),
        ({"tasks": ("longbench_qasper",)}, "longbench: got None, expected the folder"),
        ({"tasks": (RECALL,), "methods": ("full", "h2o")}, "expected quest or an oracle, for recall"),
        ({"methods": ("quest", "oracel")}, "method: got 'oracel'"),
        ({"token_budgets": ()}, "token_budget: got 'nothing', expected at least one, for quest"),
        ({"token_budgets": ("1/0",)}, "a number of tokens, or a share"),
        ({"token_budgets": ("many",)}, "a number of tokens, or a share"),
        ({"token_budgets": ("1024",)}, "less than the length, 1024"),
        ({"token_budgets": ("1/128",)}, "token_budget: got '1/128', expected at least a page"),
        ({"num_samples": 0}, "num_samples: got 0"),
        ({"question": "skip"}, "question: got 'skip', expected one of decode, prefill"),
    ],
)
def test_plans_that_are_refused(options: Row, message: str) -> None:
    with pytest.raises(QuestValueError, match=message):
        make_plan(**options)


def test_lists_on_the_command_line() -> None:
    assert split_list("full, quest:page_size=32,num_sink_pages=1,h2o") == (
        "full",
        "quest:page_size=32,num_sink_pages=1",
        "h2o",
    )
    assert integers("length", "10,20") == [10, 20]
    with pytest.raises(QuestValueError, match="length: got 'ten'"):
        integers("length", "10,ten")


def test_lengths_that_the_model_or_the_texts_lack(tmp_path: Path) -> None:
    with pytest.raises(QuestValueError, match="at most 32768, the model's positions"):
        _ = runner(lengths=(40000,)).jobs
    (tmp_path / "short.txt").write_text("A short text.")
    with pytest.raises(QuestValueError, match="the tokens of the longest text"):
        _ = runner(tasks=(PERPLEXITY,), books=tmp_path).jobs
    with pytest.raises(QuestValueError, match=r"books: .* expected a folder with \*\.txt files"):
        _ = runner(books=tmp_path / "nowhere").jobs


def test_every_method_answers_and_reads_its_budget() -> None:
    methods = ("full", "quest", "oracle", "streaming_llm", "h2o", "tova", "snapkv")
    found = rows(runner(methods=methods, num_samples=1))
    assert [row["method"] for row in found] == list(methods)
    layers = loaded().model.config.num_hidden_layers - 2
    full, *others = found
    assert full["score"] == 1.0
    assert full["tokens_read"] == full["tokens_held"]
    assert full["sparse_steps"] == 0
    for row in others:
        assert row["tokens_read"] == 64 * row["sparse_steps"]
        assert row["sparse_steps"] % layers == 0
    assert {row["method"]: row["score"] for row in others} | {"quest": 1.0, "streaming_llm": 0.0} == {
        row["method"]: row["score"] for row in others
    }


def test_a_sample_is_the_same_whoever_answers_it() -> None:
    both = rows(runner(lengths=(256,)))
    alone = rows(runner(methods=("quest",), lengths=(256,)))
    assert without_time(alone) == [row for row in without_time(both) if row["method"] == "quest"]


def test_a_prefilled_question() -> None:
    """The last token of the question is decoded, and the answer; the others came with the context."""
    used = runner(num_samples=1)
    question = used._tail(used._sample(used.jobs[0]))
    decoded, prefilled = (rows(runner(num_samples=1, question=how))[1]["sparse_steps"] for how in ("decode", "prefill"))
    assert decoded - prefilled == 4 * (question - 1)


def test_the_needle_grid_has_fixed_depths() -> None:
    found = rows(runner(tasks=(GRID,), methods=("full",), num_samples=11))
    assert [round(row["depth"], 1) for row in found] == [index / 10 for index in range(11)]


def test_budgets_that_are_not_kept_are_noticed() -> None:
    class Greedy(Quest):
        name = "greedy"

    used = runner()
    method = Greedy(QuestConfig.paper(64, num_dense_layers=2))
    context = read_context(used.model, list(range(200)))
    with torch.inference_mode(), method.session(used.model) as session:
        session.load(context)
        used.model(torch.tensor([[5]]), **cache_argument(session.cache))
        reads = session.reads()
    assert used._check(reads, method) == reads[2:]
    method.token_budget = 48
    with pytest.raises(QuestStateError, match="more than its budget of 48 a step"):
        used._check(reads, method)
    with pytest.raises(QuestStateError, match="took no sparse step in layer 1"):
        used._check(reads[:2] * 2, Quest(QuestConfig.paper(64, num_dense_layers=1)))


def model_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(tokens).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none")


def test_perplexity_by_position() -> None:
    used = runner()
    tokens = torch.tensor([used.texts.tokens[0][: BUCKET + 300]])
    truth = model_loss(used.model, tokens)
    full = predict_tokens(used.model, Full(), tokens)
    assert full.count == [BUCKET - 1, 300]
    expected = torch.tensor([[truth[: BUCKET - 1].sum(), truth[BUCKET - 1 :].sum()]], dtype=torch.float64)
    torch.testing.assert_close(full.nll, expected, rtol=1e-4, atol=0)
    wide = predict_tokens(used.model, Quest(QuestConfig.paper(BUCKET + 240, num_dense_layers=0)), tokens)
    torch.testing.assert_close(wide.nll[0, 0], full.nll[0, 0], rtol=1e-4, atol=0)
    assert 0 < abs(float(wide.nll[0, 1] - full.nll[0, 1])) < 0.05 * float(full.nll[0, 1])
    assert all(layer.steps == 60 and layer.is_sparse for layer in wide.reads)


def test_perplexity_rows() -> None:
    (row,) = rows(runner(tasks=(PERPLEXITY,), methods=("quest",), lengths=(256,), num_samples=3))
    assert row["count"] == [256 - 1]
    assert row["sparse_steps"] == (256 - 64) * 4
    assert row["book"].startswith("South")


def side_by_side(used: Runner) -> list[Row]:
    """Rows of a plan whose samples are all measured in as few batches as there can be."""
    jobs = [(job, used.plan.arms(job.task, job.length)) for job in used.jobs]
    works = divide(jobs, lambda _: 99, [used.shape(job) for job, _ in jobs])
    assert max(len(work.jobs) for work in works) > 1
    return [row for work in works for row in used.measure(work)]


def in_order(found: list[Row]) -> list[Row]:
    return sorted(found, key=lambda row: (row["index"], row["method"]))


@pytest.mark.parametrize("method", ["full", "quest", "oracle", "tova", "snapkv"])
def test_perplexity_of_books_side_by_side_is_that_of_each(tmp_path: Path, method: str) -> None:
    words = SOUTH.text().split()
    for start in (0, 900):
        (tmp_path / f"{start}.txt").write_text(" ".join(words[start : start + 900]))
    used = runner(tasks=(PERPLEXITY,), methods=(method,), token_budgets=("224",), lengths=(256,), books=tmp_path)
    for both, one in zip(in_order(side_by_side(used)), in_order(rows(used)), strict=True):
        assert both["nll"] == pytest.approx(one["nll"], rel=1e-4)
        assert {**both, "nll": None} == {**one, "nll": None}


@pytest.mark.parametrize("question", ["decode", "prefill"])
def test_samples_side_by_side_are_answered_as_each(question: str) -> None:
    methods = ("full", "quest", "oracle", "streaming_llm", "h2o", "tova", "snapkv")
    used = runner(tasks=("niah_multiquery",), methods=methods, lengths=(256,), num_samples=3, question=question)
    ends = {"tokens_read": None, "tokens_held": None, "sparse_steps": None}  # a batch goes on until its last has ended
    assert sorted(Counter(map(used.shape, used.jobs)).values()) == [1, 2], "a batch of several, and one of one"
    for both, one in zip(in_order(side_by_side(used)), in_order(rows(used)), strict=True):
        assert {**both, "seconds": 0, **ends} == {**one, "seconds": 0, **ends}
        assert both["tokens_read"] >= one["tokens_read"]


def test_work_is_divided_by_shape_and_perplexity_by_arm_longest_first() -> None:
    arms = [Arm("full", None), Arm("quest", 64), Arm("quest", 32)]
    jobs = [(Job(task, LENGTH, index), arms) for index in range(4) for task in ("passkey", PERPLEXITY)]
    shapes = [None if job.task == PERPLEXITY else job.index % 2 for job, _ in jobs]
    works = divide(jobs, lambda _: 3, shapes)
    assert [([job.index for job in work.jobs], [arm.token_budget for arm in work.arms]) for work in works] == [
        *((indices, [budget]) for budget in (32, 64, None) for indices in ([0, 1, 2], [3])),
        ([0, 2], [None, 64, 32]),
        ([1, 3], [None, 64, 32]),
    ]
    assert [len(work.jobs) for work in divide(jobs, lambda _: 3)] == [1] * 16


def test_recall_against_loops() -> None:
    used = runner()
    tokens = used.texts.tokens[0][:400]
    context, following = read_context(used.model, tokens[:-1]), torch.tensor([tokens[-1:]])
    seen: dict[int, torch.Tensor] = {}
    method = Quest(
        QuestConfig.paper(64, num_dense_layers=2), lambda layer, selected, _: seen.update({layer: selected.units})
    )
    (found,) = measure_recall(used.model, method, context, following)
    eager = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        weights = eager.eval()(torch.tensor([tokens]), output_attentions=True).attentions
    first = found.layers[0]  # later layers have inputs of their own, since those before read less
    truth = weights[first][0, :, -1]  # [HQ, T]
    for head, (mass, top) in enumerate(zip(found.mass[0], found.top[0], strict=True)):
        group = truth.shape[0] // 2
        read = {int(page) for page in seen[first][0, head]}
        masses, tops = [], []
        for one in truth[head * group : (head + 1) * group]:
            masses.append(sum(float(one[t]) for t in range(400) if t // 16 in read))
            best = sorted(range(400), key=lambda t: -float(one[t]))[:TOP_TOKENS]
            tops.append(sum(t // 16 in read for t in best) / TOP_TOKENS)
        assert mass == pytest.approx(sum(masses) / group, abs=1e-4)
        assert top == pytest.approx(sum(tops) / group, abs=1e-4)
    with pytest.raises(QuestValueError, match="quest or an oracle"):
        measure_recall(used.model, Full(), context, following)
    with pytest.raises(QuestStateError, match="within the budget"):
        measure_recall(used.model, Quest(QuestConfig.paper(512)), context, following)


def test_the_oracle_recalls_more_than_quest() -> None:
    found = rows(runner(tasks=(RECALL,), methods=("quest", "oracle"), num_samples=2))
    shares = {
        name: [sum(map(sum, row["top10"])) for row in found if row["method"] == name] for name in ("quest", "oracle")
    }
    assert all(oracle > quest for oracle, quest in zip(shares["oracle"], shares["quest"], strict=True))
    assert RECALL_STEPS < LENGTH


SETTINGS_OF = {"model": "m", "dtype": "float32", "page_size": 16, "seed": 0}
ROW = {"task": "passkey", "length": LENGTH, "index": 0, "method": "quest", "token_budget": 64, "score": 1.0}


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", SETTINGS_OF)
    arms = [Arm("full", None), Arm("quest", 64)]
    assert journal.missing(Job("passkey", LENGTH, 0), arms) == arms
    journal.add([ROW])
    assert journal.missing(Job("passkey", LENGTH, 0), arms) == arms[:1]
    file = tmp_path / "run" / SAMPLES
    whole = file.read_text()
    file.write_text(whole + '{"task": "passkey", "len')  # interrupted while it wrote
    again = Journal(tmp_path / "run", {**SETTINGS_OF, "num_samples": 9})
    assert again.missing(Job("passkey", LENGTH, 0), arms) == arms[:1]
    assert again.missing(Job("passkey", LENGTH, 1), arms) == arms
    assert file.read_text() == whole


def test_a_folder_remembers_the_runs_that_filled_it(tmp_path: Path) -> None:
    def settings() -> Row:
        return json.loads((tmp_path / "run" / SETTINGS).read_text())

    first = {**SETTINGS_OF, "command": "quest eval passkey", "machine": {"cpu": "one"}}
    second = {**first, "command": "quest eval passkey --method h2o"}
    for given in (first, first):
        Journal(tmp_path / "run", given)
        assert settings().get("earlier", []) == []
    for _ in range(2):
        Journal(tmp_path / "run", second)
        assert settings()["command"] == second["command"]
        assert settings()["earlier"] == [{"command": first["command"], "machine": first["machine"]}]
    for task, samples in (("passkey", 9), ("recall", 3), ("passkey", 20)):  # of each task what was asked for at last
        Journal(tmp_path / "run", {**second, "tasks": [task], "num_samples": samples})
    assert settings()["samples"] == {"passkey": 20, "recall": 3}


def test_folders_that_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "run", SETTINGS_OF).add([ROW])
    before = (tmp_path / "run" / SETTINGS).read_text()
    with pytest.raises(QuestValueError, match="a folder of a run with seed=1: this has 0"):
        Journal(tmp_path / "run", {**SETTINGS_OF, "seed": 1})
    assert (tmp_path / "run" / SETTINGS).read_text() == before
    with pytest.raises(QuestValueError, match="a new or empty folder"):
        Journal(tmp_path, SETTINGS_OF)
    with pytest.raises(QuestValueError, match="a folder, not a file"):
        Journal(tmp_path / "run" / SETTINGS, SETTINGS_OF)
    with (tmp_path / "run" / SAMPLES).open("a") as file:
        file.write("nothing\n")
    with pytest.raises(QuestValueError, match=r"samples\.jsonl, line 2"):
        Journal(tmp_path / "run", SETTINGS_OF)


def command(folder: Path, *more: str) -> list[str]:
    given = ["eval", "passkey", "-o", str(folder), "--method", "full,quest", "-b", "64", "-l", str(LENGTH)]
    return [*given, "--threads", "1", *more]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(tmp_path / "run", "-n", "1")) == 0
    assert run(command(tmp_path / "run", "-n", "2")) == 0
    shown = capsys.readouterr()
    assert "2 of 4 answers are in" in shown.err
    assert "100.0 %" in shown.out
    resumed = [json.loads(line) for line in (tmp_path / "run" / SAMPLES).read_text().splitlines()]
    assert run(command(tmp_path / "whole", "-n", "2", "--dtype", "float32")) == 0
    whole = [json.loads(line) for line in (tmp_path / "whole" / SAMPLES).read_text().splitlines()]
    assert without_time(resumed) == without_time(whole)
    settings = json.loads((tmp_path / "whole" / SETTINGS).read_text())
    assert str(tmp_path) not in json.dumps(settings)
    assert settings["command"].startswith("quest ")
    assert settings["command"].endswith(" --dtype float32")  # it was asked for, so it is part of the command


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "qest"), "--method: got 'qest'"),
        (("--token-budget", "2048"), "--token-budget: got '2048', expected less than the length"),
        (("--length", "x"), "--length: got 'x'"),
        (("--page-size", "0"), "--page-size: got 0"),
        (("--num-samples", "0"), "--num-samples: got 0"),
        (("--books", "nowhere"), "--books: got 'nowhere'"),
        (("--workers", "0"), "--workers: got 0"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert run(command(tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / SAMPLES).exists()


@pytest.mark.slow
def test_several_processes_find_the_same() -> None:
    plan = make_plan(num_samples=3)
    alone = rows(Runner(loaded().model, loaded().tokenizer, plan))
    jobs = [(job, plan.arms(job.task, job.length)) for job in loaded().jobs if job.index < 3]
    jobs += [(Job("passkey", LENGTH, 2), plan.arms("passkey", LENGTH))]
    found = [
        row
        for some in run_jobs(loaded(), [jobs], workers=2, make_runner=functools.partial(make_runner, plan))
        for row in some.rows
    ]
    key = lambda row: (row["index"], row["method"])  # noqa: E731
    assert sorted(without_time(found), key=key) == sorted(without_time(alone), key=key)


def test_one_process_gives_each_row_when_it_is_made() -> None:
    """So that an interruption loses nothing but the arm at work."""
    used = runner(methods=("full", "quest"), token_budgets=("64",), num_samples=1)
    job = used.jobs[0]
    measured = run_jobs(used, [[(job, used.plan.arms(job.task, job.length))]])
    first = next(measured)
    assert [row["method"] for row in first.rows] == ["full"] and not first.is_batch_done
    measured.close()


METHODS_OF_A_STEP = ("full", "quest", "oracle", "token_oracle", "streaming_llm", "h2o", "tova", "snapkv")


def test_continuation_follows_full_attention() -> None:
    """The loss is that of the model and every next token agrees; with fewer tokens read, fewer do."""
    used = runner(tasks=(CONTINUATION,), methods=METHODS_OF_A_STEP, token_budgets=("64", "880"), num_samples=1)
    found = {(row["method"], row["token_budget"]): row for row in rows(used)}
    tokens = used._stretch(used.jobs[0])
    truth = float(model_loss(used.model, torch.tensor([tokens]))[-CONTINUATION_STEPS:].sum())
    full = found["full", None]
    assert full["nll"] == pytest.approx(truth, rel=1e-4)
    assert full["agreed"] == full["count"] == CONTINUATION_STEPS and full["sparse_steps"] == 0
    for name in METHODS_OF_A_STEP[1:]:
        assert found[name, 880]["agreed"] >= found[name, 64]["agreed"]
        assert found[name, 64]["sparse_steps"] == 4 * CONTINUATION_STEPS
        assert found[name, 64]["tokens_read"] <= 64 * 4 * CONTINUATION_STEPS
    assert found["token_oracle", 64]["nll"] < found["streaming_llm", 64]["nll"]


def test_recall_of_stretches_side_by_side_is_that_of_each() -> None:
    used = runner(tasks=(RECALL,), methods=("quest", "oracle", "token_oracle"), num_samples=3, lengths=(512,))
    for both, one in zip(in_order(side_by_side(used)), in_order(rows(used)), strict=True):
        assert_recall_is_alike(both, one)


@pytest.mark.parametrize(
    ("task", "length", "budget", "least"),
    [(CONTINUATION, 100, "32", 161), (CONTINUATION, 193, "64", 193), (RECALL, 97, "64", 97)],
)
def test_a_length_that_leaves_nothing_before_what_is_decoded(task: str, length: int, budget: str, least: int) -> None:
    with pytest.raises(QuestValueError, match=f"length: got {length}, expected more than {least} for {task}"):
        runner(tasks=(task,), methods=("quest",), token_budgets=(budget,), lengths=(length,)).jobs  # noqa: B018
    assert runner(tasks=(task,), methods=("quest",), token_budgets=(budget,), lengths=(least + 1,)).jobs


def test_least_full_looks_at_each_length(tmp_path: Path) -> None:
    plan = make_plan(lengths=(512, LENGTH), num_samples=1, least_full=60)
    jobs = [(Job("passkey", length, 0), plan.arms("passkey", length)) for length in plan.lengths]
    said: list[str] = []
    rounds = make_rounds(plan, jobs, tmp_path, said.append)
    first = next(rounds)
    assert [(job.length, [arm.method for arm in arms]) for job, arms in first] == [(512, ["full"]), (LENGTH, ["full"])]
    settings = {"model": "m", "description": "d", "seed": 0, "num_samples": 1, "command": "c", "machine": {}}
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    answers = [
        {**ROW, "method": "full", "token_budget": None, "length": length, "score": score}
        for length, score in ((512, 0.0), (LENGTH, 1.0))
    ]
    more = {"answer": "", "depth": None, "tokens_read": 1, "tokens_held": 1, "sparse_steps": 0}
    (tmp_path / SAMPLES).write_text("".join(json.dumps({**row, **more}) + "\n" for row in answers))
    assert [(job.length, [arm.method for arm in arms]) for job, arms in next(rounds)] == [(LENGTH, ["quest"])]
    assert said == ["quest: full attention is right in less than 60 % of passkey at 512 tokens: left to it alone"]


def test_methods_are_asked_where_full_attention_can_do_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model finds a pass key and counts no words; a run that goes on asks nobody again."""
    given = ["eval", "passkey", "common_words", "continuation", "-o", str(tmp_path / "run"), "--method", "full,quest"]
    given += ["-b", "64", "-l", str(LENGTH), "-n", "2", "--threads", "1", "--least-full", "60"]
    assert run(given) == 0
    said = capsys.readouterr().err
    assert f"full attention is right in less than 60 % of common_words at {LENGTH} tokens" in said
    assert "fewer where full attention cannot do a task" in said
    rows_of = [json.loads(line) for line in (tmp_path / "run" / SAMPLES).read_text().splitlines()]
    asked = {(row["task"], row["method"]) for row in rows_of}
    assert asked == {
        ("passkey", "full"),
        ("passkey", "quest"),
        ("common_words", "full"),
        (CONTINUATION, "full"),
        (CONTINUATION, "quest"),
    }
    assert run(given) == 0
    assert len((tmp_path / "run" / SAMPLES).read_text().splitlines()) == len(rows_of) == 10
