"""The command line: what goes to which stream, what a mistake looks like, and what the demonstration measures."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from huggingface_hub import constants as hub_constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quest_attention import __version__
from quest_attention import models as models_package
from quest_attention.cli import run
from quest_attention.cli.failures import INTERRUPTED, PIPE_CLOSED, reports_failures
from quest_attention.cli.prompt import read_prompt
from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.eval.excerpt import SOUTH
from quest_attention.hf import attention
from quest_attention.models import bundled_model_path

POSITIONS = 2048
COMMAND = [sys.executable, "-m", "quest_attention.cli"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random Llama with a tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SOUTH.text()[:20_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


class Cli:
    """Runs a command line in this process and gives what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str, stdin: bytes = b"") -> Result:
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self._capsys.readouterr()
        code = run(arguments)
        out, err = self._capsys.readouterr()
        return Result(code, out, err)


@pytest.fixture
def quest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    return Cli(capsys, monkeypatch)


def refused(result: Result) -> str:
    """The one line of an error, once it is sure that there is nothing but that line."""
    assert result.code == 2, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("quest: error: ")
    return lines[0].removeprefix("quest: error: ")


# ---------------------------------------------------------------------------------------------------------- first steps


def test_without_arguments_the_help_is_shown(quest: Cli) -> None:
    result = quest()
    assert result.code == 0 and result.err == ""
    for word in ("demo", "generate", "env", "--version"):
        assert word in result.out


@pytest.mark.parametrize("command", ["demo", "generate", "env"])
def test_every_command_explains_itself(quest: Cli, command: str) -> None:
    result = quest(command, "--help")
    assert result.code == 0
    assert "--json" in result.out and f"quest {command}" in result.out


def test_version(quest: Cli) -> None:
    assert quest("--version") == Result(0, f"quest-attention {__version__}\n", "")


def test_help_does_not_import_transformers() -> None:
    code = "import sys; from quest_attention.cli import run; run(['--help']); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------- generate


def test_standard_output_carries_the_text_and_nothing_else(quest: Cli, model_folder: str) -> None:
    arguments = ("generate", "-m", model_folder, "--prompt", "South of the ice", "-n", "8")
    streamed, whole = quest(*arguments), quest(*arguments, "--json")
    assert streamed.code == whole.code == 0
    assert whole.err == ""
    assert streamed.out == json.loads(whole.out)["text"] != ""
    assert "decode   8 tokens" in streamed.err and "Quest never ran" in streamed.err


def test_json_says_that_quest_ran_and_what_it_read(quest: Cli, model_folder: str) -> None:
    result = quest("generate", "-m", model_folder, "-b", "64", "-n", "5", "--json", stdin=SOUTH.text()[:2000].encode())
    report = json.loads(result.out)
    assert report["new_tokens"] == 5 and report["quest"]["token_budget"] == 64
    assert report["counters"]["sparse_steps"] == 4, (
        "one layer of three is sparse, and the prefill gives the first token"
    )
    assert 0 < report["counters"]["share_read"] < 1


def test_the_summary_tells_the_share_of_the_layers_with_quest(quest: Cli, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(SOUTH.text()[:2000], encoding="utf-8")
    result = quest("generate", "-m", model_folder, "-f", str(file), "-b", "64", "-n", "5")
    assert "in the 1 of 3 layers with Quest, 64 tokens a step" in result.err


def test_dense_runs_without_quest(quest: Cli, model_folder: str) -> None:
    report = json.loads(quest("generate", "-m", model_folder, "-p", "ice", "-n", "2", "--dense", "--json").out)
    assert report["quest"] is None and report["counters"] is None


def test_a_budget_that_holds_everything_gives_the_text_of_dense(quest: Cli, model_folder: str) -> None:
    arguments = ("generate", "-m", model_folder, "-n", "6")
    text = SOUTH.text()[:800].encode()
    assert quest(*arguments, stdin=text).out == quest(*arguments, "--dense", stdin=text).out


def test_sampling_follows_the_seed(quest: Cli, model_folder: str) -> None:
    arguments = ("generate", "-m", model_folder, "-p", "ice", "-n", "12", "--temperature", "1", "--seed")
    assert quest(*arguments, "1").out == quest(*arguments, "1").out != quest(*arguments, "2").out


def test_a_byte_order_mark_is_no_part_of_the_prompt(quest: Cli, model_folder: str) -> None:
    arguments = ("generate", "-m", model_folder, "-n", "4", "-f", "-")
    assert quest(*arguments, stdin=b"\xef\xbb\xbfice").out == quest(*arguments, stdin=b"ice").out


# ------------------------------------------------------------------------------------------------------------ bad input


def test_prompt_files_that_cannot_be_used(quest: Cli, tmp_path: Path) -> None:
    empty, blank, latin = tmp_path / "empty", tmp_path / "blank", tmp_path / "latin"
    empty.write_bytes(b"")
    blank.write_bytes(b" \n")
    latin.write_bytes("Weddell Südmeer".encode("latin-1"))
    said = {
        str(tmp_path / "none"): "a file that exists",
        str(tmp_path): "a file, not a folder",
        str(empty): "(0 bytes)', expected text",
        str(blank): "(2 bytes)', expected text",
        str(latin): "byte 0xfc at offset 9', expected text in UTF-8",
    }
    for path, words in said.items():
        line = refused(quest("generate", "-f", path))
        assert line.startswith("--prompt-file: got ") and words in line and path in line


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_prompt_file(quest: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("ice", encoding="utf-8")
    secret.chmod(0)
    assert "Permission denied" in refused(quest("generate", "-f", str(secret)))


def test_a_read_that_fails_says_why(quest: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert refused(quest("generate", "-f", "x")) == (
        "--prompt-file: got 'x', expected a readable file: Permission denied"
    )


def test_an_empty_standard_input(quest: Cli) -> None:
    assert "standard input (0 bytes)" in refused(quest("generate"))


def test_two_prompts_at_once(quest: Cli) -> None:
    assert "only one of --prompt and --prompt-file" in refused(quest("generate", "-p", "x", "-f", "y"))


def test_no_prompt_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(QuestValueError, match="prompt: got None, expected a prompt"):
        read_prompt(None, None)


def test_a_prompt_longer_than_the_positions_of_the_model(quest: Cli, model_folder: str) -> None:
    line = refused(quest("generate", "-m", model_folder, "-n", "48", stdin=SOUTH.text().encode()))
    assert line.startswith("--prompt: got '") and "expected at most 2000: the model's 2048 positions" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--token-budget", "0"], "--token-budget: got 0, expected a positive integer"),
        (["--token-budget=-5"], "--token-budget: got -5, expected a positive integer"),
        (
            ["-b", "32", "--sink-pages", "2"],
            "--token-budget: got 32, expected at least 48: 3 forced pages of 16 tokens",
        ),
        (["-b", "abc"], "-b: got 'abc', expected a valid integer"),
        (["--page-size", "0"], "--page-size: got 0, expected a positive integer"),
        (["--dense-layers", "-1"], "--dense-layers: got -1, expected a non-negative integer"),
        (["--group-reduction", "sum"], "--group-reduction: got 'sum', expected one of max, mean"),
        (["--backend", "cuda"], "--backend: got 'cuda', expected one of auto, torch, triton, reference"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0, expected a positive integer"),
        (["--temperature", "-1"], "--temperature: got -1.0, expected 0 (the likeliest token) or more"),
        (["--top-p", "0"], "--top-p: got 0.0, expected a probability above 0 and at most 1"),
        (["--threads", "0"], "--threads: got 0, expected a positive integer"),
        (["--device", "abacus"], "--device: got 'abacus', expected auto, cpu, or a device that `quest env` lists"),
        (["--dtype", "int3"], "--dtype: got 'int3', expected one of auto, float32, bfloat16, float16"),
        (["--token-bugdet", "64"], "--token-bugdet: got an unknown option, expected --token-budget"),
        (["--zzz"], "--zzz: got an unknown option, expected one that --help lists"),
    ],
)
def test_wrong_options(quest: Cli, model_folder: str, arguments: list[str], line: str) -> None:
    assert refused(quest("generate", "-m", model_folder, "-p", "ice", *arguments)) == line


def test_chat_without_a_template(quest: Cli, model_folder: str) -> None:
    assert "--chat: got True" in refused(quest("generate", "-m", model_folder, "-p", "ice", "--chat"))


def test_an_extra_argument(quest: Cli, model_folder: str) -> None:
    assert "(extra)" in refused(quest("generate", "-m", model_folder, "-p", "ice", "extra"))


def test_an_unknown_command(quest: Cli) -> None:
    assert "frobnicate" in refused(quest("frobnicate"))


def test_model_folders_that_hold_no_model(quest: Cli, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{", encoding="utf-8")
    said = {
        str(tmp_path / "none"): "a folder that exists",
        "./none": "a folder that exists",
        str(file): "a folder with a model in it, not a file",
        str(tmp_path): "a folder with a config.json",
        str(broken): "a causal language model that transformers can load",
    }
    for path, words in said.items():
        line = refused(quest("generate", "-p", "ice", "-m", path))
        assert line.startswith(f"--model: got {path!r}, expected ") and words in line


def test_an_unknown_hub_id_offline_fails_at_once(quest: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    started = time.perf_counter()
    line = refused(quest("generate", "-p", "ice", "-m", "nobody/no-such-model"))
    assert time.perf_counter() - started < 5
    assert line.startswith("--model: got 'nobody/no-such-model', expected a folder that exists, or a model on the Hub")


# ----------------------------------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="session")
def demo_arguments(model_folder: str) -> list[str]:
    return ["demo", "-m", model_folder, "--length", "1024", "--token-budget", "64"]


def test_the_demo_measures_three_methods_with_equal_budgets(quest: Cli, demo_arguments: list[str]) -> None:
    report = json.loads(quest(*demo_arguments, "--json").out)
    full, sparse, window = report["results"]
    assert [full["method"], sparse["method"], window["method"]] == ["full", "quest", "sliding window"]
    assert sparse["tokens_per_step"] == window["tokens_per_step"] == 64
    assert full["share_read"] == full["share_read_all_layers"] == 1
    assert sparse["share_read"] < 0.1 < sparse["share_read_all_layers"] < 1
    assert sparse["sparse_layer_steps"] > 0
    assert all(result["ms_per_token"] > 0 for result in report["results"])
    assert report["length"] == 1024


def test_the_demo_records_the_pages_of_the_answer_alone(quest: Cli, demo_arguments: list[str]) -> None:
    pages = json.loads(quest(*demo_arguments, "--json").out)["page_reads"]
    assert list(pages["layers"]) == ["2"]
    shares = pages["layers"]["2"]
    assert len(shares) == pages["num_pages"] == 64
    assert shares[-1] > 0 and sum(shares) == pytest.approx(4), "4 pages a step and head"
    assert pages["num_steps"] <= 16


def test_the_fact_lies_where_the_demo_says(quest: Cli, demo_arguments: list[str]) -> None:
    for depth in (0, 30, 100):
        report = json.loads(quest(*demo_arguments, "--depth", str(depth), "--json").out)
        start, stop = report["fact"]["tokens"]
        assert report["fact"]["pages"] == list(range(start // 16, (stop - 1) // 16 + 1))
        assert report["expected"] in report["fact"]["text"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_picture_fits_the_terminal(
    quest: Cli, demo_arguments: list[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = quest(*demo_arguments)
    assert result.code == 0 and result.err == "", "no progress bar where there is no terminal"
    assert "\x1b" not in result.out
    assert max(map(len, result.out.splitlines())) <= width
    for word in ("South", "pass key", "layer 2", "window", "the fact: read in"):
        assert word in result.out


def test_a_model_that_cannot_answer_is_said_to_be_one(quest: Cli, demo_arguments: list[str]) -> None:
    assert "this run says nothing about what a method" in " ".join(quest(*demo_arguments).out.split())


def test_the_bundled_model_shows_the_point(quest: Cli) -> None:
    full, sparse, window = json.loads(quest("demo", "--length", "4096", "--json").out)["results"]
    assert full["is_right"] and sparse["is_right"] and not window["is_right"]


def test_the_picture_is_ascii_where_it_must_be(demo_arguments: list[str]) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    result = subprocess.run([*COMMAND, *demo_arguments], capture_output=True, env=environment, check=True)
    assert b"the fact: read in" in result.stdout and b"^" in result.stdout
    assert result.stdout.isascii()


def test_the_demo_fails_where_the_sparse_path_was_not_taken(
    quest: Cli, demo_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_sparse(dense: attention.AttentionForward, *args: object, **kwargs: object) -> object:
        return dense(*args, **kwargs)

    monkeypatch.setattr(attention, "_attend", never_sparse)
    result = quest(*demo_arguments)
    assert result.code == 1
    assert "Quest took no sparse step" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "64000"], "--length: got 64000, expected at most 2048, the model's positions"),
        (["--length", "20", "--token-budget", "16"], "--length: got 20, expected"),
        (["--depth", "101"], "--depth: got 101.0, expected a percentage from 0 to 100"),
        (["--token-budget", "4096"], "--token-budget: got 4096, expected less than the length, 1024"),
        (["--dense-layers", "3"], "--dense-layers: got 3, expected less than the model's 3 layers"),
        (["--token-budget", "8"], "--token-budget: got 8, expected at least 16"),
    ],
)
def test_wrong_demos(quest: Cli, demo_arguments: list[str], arguments: list[str], words: str) -> None:
    assert words in refused(quest(*demo_arguments, *arguments))


def test_without_a_bundled_model_the_demo_says_so(quest: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models_package, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(QuestStateError):
        bundled_model_path()
    assert refused(quest("demo")) == "model: this installation has no bundled model: name one with --model"


# --------------------------------------------------------------------------------------------------------------- ending


def test_an_unexpected_error_is_one_line_and_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @reports_failures
    def broken() -> None:
        raise KeyError("lost")

    with pytest.raises(typer.Exit) as ended:
        broken()
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "quest: internal error: KeyError: 'lost' (QUEST_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("QUEST_TRACEBACK", "1")
    with pytest.raises(KeyError):
        broken()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and pipes")
def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(model_folder: str) -> None:
    # Sampled text has spaces, so it is streamed; the dense run is fed through the same code.
    command = [*COMMAND, "generate", "-m", model_folder, "-p", "ice", "-n", "2000", "--temperature", "3"]
    # A shell starts what it puts in the background with the signal ignored, and a child keeps that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    assert interrupted.stdout is not None
    interrupted.stdout.read(1)
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=30)
    assert interrupted.returncode == INTERRUPTED
    assert err.decode().strip() == "quest: interrupted"

    closed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert closed.stdout is not None and closed.stderr is not None
    closed.stdout.read(1)
    closed.stdout.close()
    err = closed.stderr.read()
    closed.stderr.close()
    assert closed.wait(timeout=30) == PIPE_CLOSED
    assert err == b""
