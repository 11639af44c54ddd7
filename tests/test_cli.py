"""The command line: what goes to which stream, what a mistake looks like, and what the demonstration measures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
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

from quest_attention import QuestConfig, __version__
from quest_attention import models as models_package
from quest_attention.cli import run
from quest_attention.cli.failures import INTERRUPTED, PIPE_CLOSED, reports_failures
from quest_attention.cli.pace import Pace
from quest_attention.cli.page_picture import LABEL, MARGIN, _groups, _label
from quest_attention.cli.prompt import read_prompt
from quest_attention.errors import QuestStateError, QuestValueError
from quest_attention.eval.excerpt import SOUTH
from quest_attention.hf import attention
from quest_attention.models import bundled_model_path
from quest_attention.ops import dispatch

POSITIONS = 2048
TWICE = "quest:metadata=moments,selection_unit=page,num_recent_pages=2,quest:metadata=moments,num_recent_pages=2"
"""The first begins with what auto is on a CPU, spelled out."""
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


def test_the_package_is_the_command_too() -> None:
    said = subprocess.run([sys.executable, "-m", "quest_attention", "-V"], capture_output=True, check=True).stdout
    assert said.decode() == f"quest-attention {__version__}\n"


@pytest.mark.parametrize(
    ("shell", "typed"),
    [
        ("bash", {"COMP_WORDS": "quest gen", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "quest gen"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "quest gen", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_a_shell_completes_without_heavy_imports(shell: str, typed: dict[str, str]) -> None:
    code = (
        "import sys; from quest_attention.cli import run\n"
        "try: run([])\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"_QUEST_COMPLETE": f"complete_{shell}"} | typed
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "generate" in done.stdout and "demo" not in done.stdout
    assert done.stderr == "[]\n"


def test_completion_keeps_out_of_the_help(quest: Cli) -> None:
    """It is for the shell that asks: one is started here, since the suite may have been started from none."""
    assert "completion" not in quest("--help").out
    line = f"{shlex.quote(sys.executable)} -m quest_attention.cli --show-completion; echo"
    shown = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert "_QUEST_COMPLETE=complete_bash" in shown.stdout


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


def test_moments_are_asked_for_by_name(quest: Cli, model_folder: str) -> None:
    given = ("generate", "-m", model_folder, "-b", "64", "-n", "5", "--json")
    options = ("--metadata", "moments", "--moments-coefficient", "0.5")
    report = json.loads(quest(*given, *options, stdin=SOUTH.text()[:2000].encode()).out)
    found = {name: report["quest"][name] for name in ("metadata", "moments_coefficient", "num_sink_pages")}
    assert found == {"metadata": "moments", "moments_coefficient": 0.5, "num_sink_pages": 1}
    assert report["counters"]["sparse_steps"] == 4


def test_sketches_are_asked_for_by_name(quest: Cli, model_folder: str) -> None:
    given = ("generate", "-m", model_folder, "-b", "64", "-n", "5")
    options = ("--metadata", "sketch", "--selection-unit", "token", "--candidate-factor", "2")
    text = SOUTH.text()[:2000].encode()
    report = json.loads(quest(*given, *options, "--json", stdin=text).out)
    found = {name: report["quest"][name] for name in ("metadata", "selection_unit", "candidate_factor")}
    assert found == {"metadata": "sketch", "selection_unit": "token", "candidate_factor": 2}
    counters = report["counters"]
    assert counters["sparse_steps"] == 4 and "pages_read" not in counters
    assert counters["share_read"] == counters["tokens_read"] / counters["tokens_held"] < 1
    runs = json.loads(quest(*given, *options[:2], "--selection-unit", "4", "--json", stdin=text).out)
    assert runs["quest"]["selection_unit"] == 4 and runs["quest"]["candidate_factor"] == 32
    ranked = "single tokens by the keys of about 128 candidates, which each step reads too"
    assert f"chosen   by sketch, {ranked}\n" in quest(*given, *options, stdin=text).err
    pages = quest(*given, *options[:2], stdin=text).err
    assert "chosen   by sketch, pages by the keys of about 2,048 candidates, which each step reads too\n" in pages
    alone = quest(*given, *options[:2], "--selection-unit", "4", "--candidate-factor", "0", stdin=text).err
    assert "chosen   by sketch, runs of 4 tokens by estimates alone\n" in alone


def test_a_demonstration_by_tokens(quest: Cli, model_folder: str) -> None:
    options = ("--metadata", "sketch", "--selection-unit", "token")
    given = ("demo", "-m", model_folder, "--length", "1024", "--token-budget", "64")
    report = json.loads(quest(*given, *options, "--json").out)
    assert report["config"]["selection_unit"] == "token"
    found = next(result for result in report["results"] if result["method"] == "quest")
    assert found["tokens_per_step"] == 64 and 0 < found["share_read"] < 0.07
    shares = [share for layer in report["page_reads"]["layers"].values() for share in layer]
    pages = report["page_reads"]["num_pages"]
    assert report["page_reads"]["unit_size"] == 1 and len(shares) % pages == 0 and max(shares) <= 1
    layers = len(shares) // pages
    assert 16 * sum(shares) == pytest.approx(64 * layers), "64 tokens a step and head"
    assert all(shares[layer * pages] == 1 for layer in range(layers)), "the first page is read always"
    shown = quest(*given, *options).out
    assert "(2 pages always, the others chosen one by one by sketch)" in " ".join(shown.split())
    assert "Tokens of each page read" in shown and "the sketches of" in shown
    assert "the fact: read in" in shown and "seldom" not in shown
    assert "the bounds" not in shown


def test_a_demonstration_and_a_text_with_auto_say_what_it_is(quest: Cli, model_folder: str, tmp_path: Path) -> None:
    shown = quest("demo", "-m", model_folder, "--length", "1024", "--token-budget", "64", "--metadata", "auto").out
    assert "(4 pages of 16, by moments (auto on cpu))" in " ".join(shown.split())
    assert "the moments of all" in " ".join(shown.split())
    file = tmp_path / "prompt.txt"
    file.write_text(SOUTH.text()[:2000], encoding="utf-8")
    given = ("generate", "-m", model_folder, "-f", str(file), "-b", "64", "-n", "5", "--metadata", "auto")
    assert "64 tokens a step)\nchosen   by moments (auto on cpu)\n" in quest(*given).err
    report = json.loads(quest(*given, "--json").out)
    assert report["quest"]["metadata"] == report["counters"]["metadata"] == "moments"


def test_the_summary_tells_the_share_of_the_layers_with_quest(quest: Cli, model_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(SOUTH.text()[:2000], encoding="utf-8")
    result = quest("generate", "-m", model_folder, "-f", str(file), "-b", "64", "-n", "5")
    assert "in the 1 of 3 layers with Quest, 64 tokens a step)\nchosen   by moments (auto on cpu)\n" in result.err


def test_a_quiet_run_writes_the_text_alone(quest: Cli, model_folder: str) -> None:
    arguments = ("generate", "-m", model_folder, "-p", "South of the ice", "-n", "8")
    assert quest(*arguments, "--quiet") == Result(0, quest(*arguments).out, "")
    assert "--top-p" in refused(quest(*arguments, "-q", "--top-p", "2"))


def test_one_of_a_thing_is_one(quest: Cli, model_folder: str) -> None:
    said = quest("generate", "-m", model_folder, "-p", "i", "-n", "1", "--threads", "1").err
    assert "prefill  1 token in" in said and "2,048 tokens" in said
    assert refused(quest("generate", "-b", "8", "--metadata", "bounds")).endswith(
        "at least 16: 1 forced page of 16 tokens"
    )


def test_the_default_budget_is_that_of_the_config(quest: Cli, model_folder: str) -> None:
    report = json.loads(quest("generate", "-m", model_folder, "-p", "ice", "-n", "2", "--json").out)
    assert report["quest"] == dataclasses.asdict(QuestConfig().resolved("cpu"))


def test_dense_runs_without_quest(quest: Cli, model_folder: str) -> None:
    report = json.loads(quest("generate", "-m", model_folder, "-p", "ice", "-n", "2", "--dense", "--json").out)
    assert report["quest"] is None and report["counters"] is None


def test_lossless_gives_the_text_of_dense(quest: Cli, model_folder: str) -> None:
    few = ("-m", model_folder, "-p", "ice " * 200, "-n", "40")
    dense = json.loads(quest("generate", *few, "--dense", "--json").out)
    arguments = ("generate", *few, "--token-budget", "64", "--lossless", "--draft-tokens", "2")
    report = json.loads(quest(*arguments, "--json").out)
    assert report["text"] == dense["text"]
    drafts = report["counters"]["drafts"]
    assert drafts["checks"] > 0
    assert drafts["accepted"] + drafts["checks"] + sum(drafts["plain_steps"].values()) >= 39
    shown = quest(*arguments)
    assert shown.out.strip() == dense["text"].strip()
    assert "drafts   " in shown.err and "tokens a check" in shown.err
    assert "nothing drafted; 39 steps" in quest("generate", *few, "--lossless").err


def test_offload_is_refused_on_a_cpu(quest: Cli, model_folder: str) -> None:
    line = refused(quest("generate", "-m", model_folder, "-p", "ice", "--offload", "host", "--device", "cpu"))
    assert line.startswith(
        "--offload: got 'host', expected none on device cpu, where keys and values lie in host memory"
    )


def test_offload_reads_the_prompt_in_chunks_and_says_what_came(
    quest: Cli, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quest_attention.cli import generate  # noqa: PLC0415 - loads transformers
    from quest_attention.hf.offload import Offload  # noqa: PLC0415 - likewise

    few = ("-m", model_folder, "-p", "ice " * 200, "-n", "12", "--token-budget", "64")
    plain = json.loads(quest("generate", *few, "--json").out)
    tokens = plain["prompt_tokens"]
    monkeypatch.setattr(generate, "_CHUNK", tokens // 3)
    monkeypatch.setattr(Offload, "asked", lambda *_: Offload(128))  # as on a GPU
    report = json.loads(quest("generate", *few, "--offload", "host", "--json").out)
    assert report["text"] == plain["text"]
    fetches = report["counters"]["fetches"]
    assert 0 < fetches["units_fetched"] < fetches["units_looked_up"]
    assert report["counters"]["layers"][0]["prefill_tokens"] == tokens
    summary = quest("generate", *few, "--offload", "host").err
    assert "offload  keys and values in host memory; " in summary
    held, mib = report["cache_bytes"], 1 << 20
    line = f"{held['host'] / mib:,.1f} MiB in host memory, {held['device'] / mib:,.1f} MiB on the device"
    assert f"memory   of the cache: {line}" in summary and held["host"] > 0 < held["device"]
    assert plain["cache_bytes"] is None
    narrow = json.loads(quest("generate", *few, "--offload", "host", "--kv-cache-dtype", "fp8", "--json").out)
    assert 4 * narrow["cache_bytes"]["host"] == held["host"]


def test_keys_and_values_in_8_bits(quest: Cli, model_folder: str) -> None:
    few = ("generate", "-m", model_folder, "-p", "ice " * 200, "-n", "12", "--token-budget", "64", "--kv-cache-dtype")
    texts = {name: json.loads(quest(*few, name, "--json").out)["text"] for name in ("auto", "fp8")}
    assert json.loads(quest(*few, "fp8", "--lossless", "--json").out)["counters"]["drafts"]["checks"] > 0
    assert texts["auto"] and texts["fp8"]


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
        (["--draft-tokens", "4"], "--draft-tokens: got '4', expected none without --lossless"),
        (["--lossless", "--draft-tokens", "16"], '--draft-tokens: got 16, expected 1 to 15 tokens, or "auto"'),
        (["--lossless", "--dense"], "--lossless: got True, expected False with --dense"),
        (["--offload", "host", "--dense"], "--offload: got 'host', expected none with --dense"),
        (["--offload", "host", "--lossless"], "--offload: got 'host', expected none with --lossless, whose checks"),
        (["--hot-tokens", "64"], "--hot-tokens: got 64, expected none without --offload"),
        (["--kv-cache-dtype", "int4"], "--kv-cache-dtype: got 'int4', expected one of 'auto', 'fp8'"),
        (["--kv-cache-dtype", "fp8", "--dense"], "--kv-cache-dtype: got 'fp8', expected auto with --dense"),
        (["--dense-layers", "-1"], "--dense-layers: got -1, expected a non-negative integer"),
        (["--metadata", "mean"], "--metadata: got 'mean', expected one of bounds, moments"),
        (["--moments-coefficient=-1"], "--moments-coefficient: got -1.0, expected a number from 0 to 100"),
        (["--moments-coefficient", "nan"], "--moments-coefficient: got nan, expected a number from 0 to 100"),
        (["--moments-coefficient", "half"], "--moments-coefficient: got 'half', expected a valid "),
        (
            ["--metadata", "moments", "--metadata-dtype", "fp8"],
            "--metadata-dtype: got 'fp8', expected kv for moments: fp8 is for bounds",
        ),
        (["--metadata", "moments", "-b", "16"], "--token-budget: got 16, expected at least 32: 2 forced pages of 16"),
        (
            ["--metadata", "bounds", "--selection-unit", "token", "--candidate-factor", "0"],
            "--candidate-factor: got 0, expected at least 1 for bounds, which scores pages",
        ),
        (
            ["--metadata", "bounds", "--moments-coefficient", "1"],
            "--moments-coefficient: got 1.0, expected none for bounds: it is for moments",
        ),
        (["--metadata", "sketch", "--selection-unit", "3"], "--selection-unit: got 3, expected one of page, token, 4"),
        (
            ["--metadata", "bounds", "--candidate-factor", "2"],
            "--candidate-factor: got 2, expected 0 for whole pages by bounds",
        ),
        (
            ["--metadata", "sketch", "--candidate-factor=-1"],
            "--candidate-factor: got -1, expected a non-negative integer",
        ),
        (["--group-reduction", "sum"], "--group-reduction: got 'sum', expected one of max, mean"),
        (["--backend", "cuda"], "--backend: got 'cuda', expected one of auto, torch, triton, reference"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0, expected a positive integer"),
        *(
            (
                ["--temperature", given],
                f"--temperature: got {float(given)}, expected 0 (the likeliest token), or a finite number from 1e-06",
            )
            for given in ("-1", "nan", "inf", "1e-40")
        ),
        (["--top-p", "0"], "--top-p: got 0.0, expected a probability above 0 and at most 1"),
        (["--top-p", "nan"], "--top-p: got nan, expected a probability above 0 and at most 1"),
        (["--threads", "0"], "--threads: got 0, expected a positive integer"),
        *(
            (
                ["--threads", str(given)],
                f"--threads: got {given}, expected at most {os.cpu_count()}, the logical cores of ",
            )
            for given in (20_000, 100_000)  # a crash, and an error that blamed the model
        ),
        *(
            (["--seed", str(given)], f"--seed: got {given}, expected an integer from 0 to {2**64 - 1}")
            for given in (-1, 2**64)
        ),
        *(
            (["--device", name], f"--device: got {name!r}, expected auto, cpu, or a device that `quest env` lists")
            for name in ("abacus", "meta", "hpu", "cpu:3", "")
        ),
        (["--dtype", "int3"], "--dtype: got 'int3', expected one of auto, float32, bfloat16, float16"),
        (["--token-bugdet", "64"], "--token-bugdet: got an unknown option, expected --token-budget"),
        (["--zzz"], "--zzz: got an unknown option, expected one that --help lists"),
    ],
)
def test_wrong_options(quest: Cli, model_folder: str, arguments: list[str], line: str) -> None:
    assert refused(quest("generate", "-m", model_folder, "-p", "ice", *arguments)).startswith(line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-o", ""], "--output: got '', expected a path"),
        (["-o", "/proc/nope"], "--output: got '/proc/nope', expected a folder that can be written: "),
        (["--books", ""], "--books: got '', expected a path"),
        (["--books", "nowhere"], "--books: got 'nowhere', expected a folder with *.txt"),
        (["--longbench", ""], "--longbench: got '', expected a path"),
        (["--num-samples", "0"], "--num-samples: got 0, expected a positive integer"),
        (["--workers", "0"], "--workers: got 0, expected a positive integer"),
        (["--workers", "20000"], "--workers: got 20000, expected at most "),
        (["--threads", "20000"], "--threads: got 20000, expected at most "),
        (["--seed", str(10**22)], f"--seed: got {10**22}, expected an integer from 0 to "),
        (["--seed=-1"], "--seed: got -1, expected an integer from 0 to "),
        (["--device", "meta"], "--device: got 'meta', expected auto, cpu"),
        (["--dtype", "int3"], "--dtype: got 'int3', expected one of auto"),
        (
            ["--method", "quest:page_size=0"],
            "--method: got 'quest:page_size=0', expected another page_size: a positive",
        ),
        (
            ["--method", "quest:metadata=mean"],
            "--method: got 'quest:metadata=mean', expected another metadata: one of bounds, moments, sketch, auto, not",
        ),
        (
            ["--method", "quest:metadata=moments,moments_coefficient=half"],
            "--method: got 'quest:metadata=moments,moments_coefficient=half', expected another moments_coefficient: ",
        ),
        (
            ["--method", "quest:metadata=moments,metadata_dtype=fp8"],
            "--method: got 'quest:metadata=moments,metadata_dtype=fp8', expected another metadata_dtype: kv for",
        ),
        (
            ["--method", "quest:metadata=auto,moments_coefficient=1.0,metadata_dtype=fp8", "--device", "cpu"],
            "--method: got 'quest:metadata=auto,moments_coefficient=1.0,metadata_dtype=fp8', expected another metadata",
        ),
        (
            ["--method", "quest:metadata=auto,quest:metadata=moments", "--device", "cpu"],
            "--method: got 'quest:metadata=moments', expected methods that differ: it is quest:metadata=auto, which is",
        ),
        (
            ["--method", "quest:metadata=moments,quest:metadata=auto", "--device", "cpu"],
            "--method: got 'quest:metadata=auto', expected methods that differ: it is quest:metadata=moments",
        ),
        (
            ["--method", f"quest:metadata=auto,{TWICE}", "--device", "cpu"],
            "--method: got 'quest:metadata=moments,num_recent_pages=2', expected methods that differ: it is quest:meta",
        ),
        (
            ["--method", "quest:metadata=sketch,candidate_factor=-1"],
            "--method: got 'quest:metadata=sketch,candidate_factor=-1', expected another candidate_factor: a non-",
        ),
        (["--method", "quest:"], "--method: got 'quest:', expected option=value behind the colon"),
        (["--method", ""], "--method: got 'nothing', expected at least one"),
        (["--method", "quest,quest:page_size=16"], "--method: got 'quest:page_size=16', expected methods that differ"),
        (["--length", "1024,1024"], "--length: got 1024, expected each once"),
        (["--method", "h2o", "--page-size", "0", "-b", "1/16"], "--page-size: got 0, expected a positive integer"),
        (["--method", "h2o", "--dense-layers=-1"], "--dense-layers: got -1, expected a non-negative integer"),
    ],
)
def test_eval_refuses_before_it_loads_or_writes(
    quest: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], line: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("no model is needed to know that")

    monkeypatch.setattr("quest_attention.cli.eval.load_model", never)
    monkeypatch.chdir(tmp_path)
    assert refused(quest("eval", "passkey", "-o", "run", "-l", "1024", "-b", "64", *arguments)).startswith(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("generate", "-p", "ice", "--backend", "triton"),
            "--backend: got 'triton', expected 'auto' or 'torch' here: ",
        ),
        (
            ("eval", "passkey", "-o", "run", "--backend", "triton"),
            "--backend: got 'triton', expected 'auto' or 'torch' ",
        ),
        (
            ("eval", "passkey", "-o", "run", "--method", "quest:backend=triton"),
            "--method: got 'quest:backend=triton', expected another backend: 'auto' or 'torch' here: ",
        ),
    ],
)
def test_a_backend_that_cannot_run_is_named_before_a_model_is_loaded(
    quest: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda _: "there is no GPU")  # tests have Triton's interpreter
    monkeypatch.chdir(tmp_path)
    assert refused(quest(*arguments, "-m", "no-such-model")).startswith(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--dense-layers", "3"], "--dense-layers: got 3, expected less than the model's 3 layers"),
        (
            ["--method", "quest:num_dense_layers=3"],
            "--method: got 'quest:num_dense_layers=3', expected num_dense_layers",
        ),
        (["-l", "4096"], "--length: got 4096, expected at most 2048, the model's positions"),
    ],
)
def test_eval_refuses_what_the_model_cannot_and_leaves_nothing(
    quest: Cli, monkeypatch: pytest.MonkeyPatch, model_folder: str, tmp_path: Path, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("eval", "passkey", "-m", model_folder, "-o", "a/run", "-l", "1024", "-b", "64", *arguments)
    assert refused(quest(*given)).startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_books_that_are_no_text_are_named(quest: Cli, model_folder: str, tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    (books / "latin.txt").write_bytes("Südmeer".encode("latin-1"))
    given = ("eval", "passkey", "-m", model_folder, "-l", "1024", "-b", "64", "-o", str(tmp_path / "run"))
    line = refused(quest(*given, "--books", str(books)))
    assert line == f"--books: got '{books / 'latin.txt'}, byte 0xfc at offset 1', expected text in UTF-8"
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_for_a_report(quest: Cli) -> None:
    assert refused(quest("report", "")) == "folder: got '', expected a path"


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


def test_the_demo_measures_methods_with_equal_budgets(quest: Cli, demo_arguments: list[str]) -> None:
    report = json.loads(quest(*demo_arguments, "--json").out)
    full, sparse, window, lossless = report["results"]
    assert [full["method"], sparse["method"], window["method"]] == ["full", "quest", "sliding window"]
    assert lossless["method"] == "lossless" and report["without_lossless"] is None
    assert lossless["answer"] == full["answer"]
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


def test_labels_of_deep_models_have_room() -> None:
    for count in (4, 24, 40, 126, 1000):
        labels = [_label(layers) for layers in _groups(range(2, count))]
        assert max(map(len, labels)) <= LABEL - MARGIN, labels


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_picture_fits_the_terminal(
    quest: Cli, demo_arguments: list[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = quest(*demo_arguments)
    assert result.code == 0 and result.err == "", "no progress bar where there is no terminal"
    assert "\x1b" not in result.out
    assert max(map(len, result.out.splitlines())) <= width
    assert "…" not in result.out, "nothing is cut"
    for word in ("South", "pass key", "layer 2", "window", "steps\n", "a column", "seldom"):
        assert word in result.out
    headings = ("tokens read per step", "ms per token") if width < 80 else ("tokens read", "ms per")
    for word in headings:
        assert word in result.out


def test_a_quiet_demo_shows_the_table_alone(quest: Cli, demo_arguments: list[str]) -> None:
    whole, table = quest(*demo_arguments), quest(*demo_arguments, "-q")
    assert table.code == 0 and table.err == ""
    assert [line.split("  ")[0] for line in table.out.splitlines()[2:]] == [
        "full",
        "quest",
        "sliding window",
        "lossless",
    ]
    assert len(table.out.splitlines()) == 6 < len(whole.out.splitlines())


def test_a_model_that_cannot_answer_is_said_to_be_one(quest: Cli, demo_arguments: list[str]) -> None:
    assert "this run says nothing about what a method" in " ".join(quest(*demo_arguments).out.split())


@pytest.mark.slow
def test_the_bundled_model_shows_the_point(quest: Cli) -> None:
    report = json.loads(quest("demo", "--json").out)
    full, sparse, window, lossless = report["results"]
    assert lossless["answer"] == full["answer"]
    assert full["is_right"] and sparse["is_right"] and not window["is_right"]
    assert report["length"] == 8192 and report["config"] == dataclasses.asdict(QuestConfig().resolved("cpu"))


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
        (["--length", "0"], "--length: got 0, expected a positive integer"),
        (["--length=-5"], "--length: got -5, expected a positive integer"),
        (["--depth", "nan"], "--depth: got nan, expected a percentage from 0 to 100"),
        (["--seed=-1"], "--seed: got -1, expected an integer from 0"),
        (["--length", "64000"], "--length: got 64000, expected at most 2048, the model's positions"),
        (["--length", "20", "--token-budget", "16", "--metadata", "bounds"], "--length: got 20, expected"),
        (["--depth", "101"], "--depth: got 101.0, expected a percentage from 0 to 100"),
        (["--token-budget", "4096"], "--token-budget: got 4096, expected less than the length, 1024"),
        (["--dense-layers", "3"], "--dense-layers: got 3, expected less than the model's 3 layers"),
        (
            ["--token-budget", "8"],
            '--token-budget: got 8, expected at least 32: 2 forced pages of 16 tokens; metadata "auto" is',
        ),
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


# ----------------------------------------------------------------------------------------------------------------- eval


def test_eval_says_how_much_there_is_to_do(quest: Cli, model_folder: str, tmp_path: Path) -> None:
    given = ("eval", "passkey", "-m", model_folder, "-o", str(tmp_path / "run"), "-l", "512")
    given = (*given, "--method", "full,quest", "-b", "64,128")
    first = quest(*given, "-n", "2")
    assert first.err == "quest: 6 answers to make, for 2 samples by 2 methods (3 with their budgets)\n"
    more = quest(*given, "-n", "3")
    already = f"6 of 9 answers are in {tmp_path / 'run'} already"
    assert more.err == f"quest: {already}; 3 answers to make, for 1 sample by 2 methods (3 with their budgets)\n"
    assert quest(*given, "-n", "3").err == f"quest: all 9 answers are in {tmp_path / 'run'} already\n"
    assert quest(*given, "-n", "4", "-q") == Result(0, "", "")
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 12


def test_a_method_with_moments_is_a_row_of_the_tables(quest: Cli, model_folder: str, tmp_path: Path) -> None:
    name, folder = "quest:metadata=moments,moments_coefficient=0.5", tmp_path / "run"
    given = ("eval", "passkey", "-m", model_folder, "-o", str(folder), "-l", "512", "-b", "64", "-n", "1", "-q")
    assert quest(*given, "--method", f"full,quest,{name}").code == 0
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["full", "quest", name]
    shown = quest("report", str(folder))
    assert shown.code == 0
    assert any(name in file.read_text(encoding="utf-8") for file in folder.rglob("*.html"))


def test_a_method_with_sketches_is_a_row_of_the_tables(quest: Cli, model_folder: str, tmp_path: Path) -> None:
    name, folder = "quest:metadata=sketch,selection_unit=token,candidate_factor=2", tmp_path / "run"
    given = ("eval", "passkey", "-m", model_folder, "-o", str(folder), "-l", "512", "-b", "64", "-n", "1", "-q")
    assert quest(*given, "--method", f"full,{name}").code == 0
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["full", name]
    shown = quest("report", str(folder))
    assert shown.code == 0
    assert any(name in file.read_text(encoding="utf-8") for file in folder.rglob("*.html"))


def test_the_time_left_is_said_once_and_only_where_it_matters() -> None:
    now = [0.0]
    pace = Pace(1000, clock=lambda: now[0])
    said = []
    for _ in range(20):
        now[0] += 2
        said.append(pace.take(10))
    assert [(index, words) for index, words in enumerate(said) if words] == [(2, "3 min")], "970 at 10 in 2 s"
    quick = Pace(40, clock=lambda: now[0])
    for _ in range(4):
        now[0] += 2
        assert quick.take(10) is None, "10 s more are nothing to speak of"


def test_loading_models_is_no_pace() -> None:
    now = [0.0]
    pace = Pace(1000, skips_first=True, clock=lambda: now[0])
    now[0] = 500.0
    assert pace.take(10) is None
    said = []
    for _ in range(3):
        now[0] += 2
        said.append(pace.take(10))
    assert said == [None, None, "3 min"]
