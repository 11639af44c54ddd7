"""Models in GGUF: what is loaded from a file, and what a file that holds no such model is told."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import modeling_gguf_pytorch_utils

from gguf_files import SPECIAL, make_llama, make_tokenizer, write_gguf
from quest_attention.cli import gguf_model, run
from quest_attention.cli.gguf_header import read_header
from quest_attention.cli.loading import LoadedModel, load_model
from quest_attention.errors import QuestValueError

needs_right_tokenizers = pytest.mark.skipif(
    Version(transformers.__version__) < Version(gguf_model.FIRST_RIGHT_RELEASE),
    reason=f"transformers {transformers.__version__} makes wrong tokenizers of GGUF files",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny.GGUF", make_llama(), make_tokenizer())


@pytest.fixture(scope="module")
def loaded(file: Path) -> LoadedModel:
    return load_model(str(file), device="cpu")


def refused(name: Path | str) -> str:
    """What was expected instead of a model of that name."""
    with pytest.raises(QuestValueError) as error:
        load_model(str(name), device="cpu")
    assert error.value.argument == "model" and error.value.got == str(name)
    assert "\n" not in error.value.expected
    return error.value.expected


# ------------------------------------------------------------------------------------------------------- what is loaded


@needs_right_tokenizers
def test_the_weights_are_those_of_the_file(loaded: LoadedModel) -> None:
    ids = torch.randint(3, 512, (1, 40))
    with torch.no_grad():
        theirs, ours = make_llama()(ids).logits, loaded.model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert loaded.model.dtype == torch.float32 and not loaded.model.training


@needs_right_tokenizers
def test_the_model_is_known_by_the_name_of_its_file(loaded: LoadedModel) -> None:
    assert loaded.name == "Tiny.GGUF" and loaded.description.startswith("Tiny.GGUF, ")


@needs_right_tokenizers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for(file: Path, dtype: str) -> None:
    model = load_model(str(file), device="cpu", dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@needs_right_tokenizers
def test_it_can_be_saved_and_loaded_as_a_folder(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), device="cpu")
    text = "In 1914:\n\n28 men  sailed"
    ids = torch.tensor([loaded.tokenizer(text).input_ids])
    assert again.tokenizer(text).input_ids == ids[0].tolist()
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    assert again.model.generation_config.eos_token_id == loaded.model.generation_config.eos_token_id


@needs_right_tokenizers
def test_text_becomes_the_tokens_of_the_models_own_tokenizer(loaded: LoadedModel) -> None:
    own = make_tokenizer()
    for text in (
        "South of the ice, 1914.",
        "one\n\n2  3\n\n4",
        "  57",
        "é漢字\t🙂",
        "<|im_start|>user\nice<|im_end|>\n",
    ):
        assert loaded.tokenizer(text).input_ids == own.encode(text).ids, text
        assert loaded.tokenizer.decode(own.encode(text).ids) == text


@needs_right_tokenizers
def test_special_tokens_are_one_id_each_and_the_file_says_what_comes_first(loaded: LoadedModel, tmp_path: Path) -> None:
    tokenizer = loaded.tokenizer
    assert [tokenizer(token).input_ids for token in SPECIAL] == [[0], [1], [2]]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("").input_ids == [], "there is a first token, but the file says not to put it before texts"
    path = write_gguf(tmp_path / "x.gguf", make_llama(), make_tokenizer(), tokenizer__ggml__add_bos_token=True)
    assert load_model(str(path), device="cpu").tokenizer("").input_ids == [1]


@needs_right_tokenizers
def test_it_stops_at_every_token_that_ends_a_text_or_a_turn(loaded: LoadedModel, tmp_path: Path) -> None:
    assert loaded.model.generation_config.eos_token_id == [0, 2]
    path = write_gguf(tmp_path / "x.gguf", make_llama(), make_tokenizer(), tokenizer__ggml__eot_token_id=7)
    assert load_model(str(path), device="cpu").model.generation_config.eos_token_id == [0, 2, 7]


@needs_right_tokenizers
def test_a_way_of_splitting_that_transformers_does_not_know_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "x.gguf", make_llama(), make_tokenizer(), tokenizer__ggml__pre="viking")
    load_model(str(path), device="cpu")
    err = capsys.readouterr().err
    assert err.startswith("quest: warning: the file's tokenizer splits text by the rule 'viking'")
    assert len(err.splitlines()) == 1, "and transformers' progress bar stays away"


@needs_right_tokenizers
def test_accents_are_composed_as_qwens_tokenizer_does(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", make_llama(), make_tokenizer(), tokenizer__ggml__pre="qwen2")
    tokenizer = load_model(str(path), device="cpu").tokenizer
    assert tokenizer("e\u0301").input_ids == tokenizer("\xe9").input_ids


@needs_right_tokenizers
def test_a_load_leaves_the_reader_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str) -> None:
            reads.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    bar, names = modeling_gguf_pytorch_utils.tqdm, gguf.get_tensor_name_map
    load_model(str(file), device="cpu")
    assert len(reads) == 1
    assert (modeling_gguf_pytorch_utils.tqdm, gguf.get_tensor_name_map) == (bar, names)
    assert gguf.GGUFReader is Reader


@needs_right_tokenizers
def test_generate_takes_a_file_and_names_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--model", str(file), "--prompt", "ice", "--chat", "-n", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "Tiny.GGUF" and err == ""


# ------------------------------------------------------------------------------------------------------ what is refused


def test_files_that_are_no_model(file: Path, tmp_path: Path) -> None:
    def made(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = file.read_bytes()
    assert refused(made("empty.gguf", b"")) == "a GGUF file; this one is empty"
    assert refused(made("text.gguf", b"Weddell")) == "a GGUF file; this one begins with b'Wedd'"
    assert refused(made("short.gguf", whole[:3000])) == "a whole GGUF file; this one is cut off or damaged"
    assert refused(made("magic.gguf", b"GGUF")) == "a whole GGUF file; this one is cut off or damaged"
    key = struct.pack("<Q17sI", 17, b"general.alignment", 4)  # 4: a number of 32 bits
    unaligned = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<I", 0)
    assert "not damaged; this one aligns its tensors to 0" in refused(made("unaligned.gguf", unaligned))
    cut = refused(made("cut.gguf", whole[:-5000]))
    assert cut == f"a whole GGUF file; this one has {len(whole) - 5000:,} of {len(whole):,} bytes"
    assert "version 1" in refused(made("old.gguf", b"GGUF" + (1).to_bytes(4, "little") + whole[8:]))
    assert "version 50331648" in refused(made("big.gguf", b"GGUF" + (3).to_bytes(4, "big") + whole[8:]))
    assert "a GGUF file that exists" in refused(tmp_path / "none.gguf")
    assert "a GGUF file that exists" in refused("models/none.gguf")


def test_a_whole_file_has_all_its_bytes(file: Path) -> None:
    assert read_header(file).values["general.architecture"] == "llama"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general__architecture": "clip"}, "this file is the projector of one"),
        ({"general__type": "mmproj"}, "this file is the projector of one"),
        ({"general__type": "adapter"}, "by its general.type this file is: adapter"),
        ({"split__count": "3"}, "this file has the split.count '3'"),
        ({"split__count": 3}, "this is one of 3: join them with llama-gguf-split --merge"),
        ({"tokenizer__ggml__model": None}, "this file has no tokenizer.ggml.model"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, keys: dict[str, object], words: str) -> None:
    assert words in refused(write_gguf(tmp_path / "x.gguf", make_llama(), make_tokenizer(), **keys))


def test_a_part_of_a_model_is_known_by_its_name(file: Path, tmp_path: Path) -> None:
    part = tmp_path / "big-00001-of-00003.gguf"
    shutil.copy(file, part)
    assert "this is one of several: join them with llama-gguf-split --merge" in refused(part)


@needs_right_tokenizers
def test_an_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", make_llama(), make_tokenizer(), general__architecture="rwkv7")
    assert "rwkv7 is not supported" in refused(path)


def test_a_folder_of_gguf_files_says_what_to_pass(file: Path, tmp_path: Path) -> None:
    first = shutil.copy(file, tmp_path / "a.GGUF")
    assert refused(tmp_path).endswith(f"; to load GGUF name the file: {first}")
    shutil.copy(file, tmp_path / "b.gguf")
    assert refused(tmp_path).endswith(f"; to load GGUF name the file: one of its 2 files, like {first}")


def test_without_the_packages_it_says_how_to_get_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert refused(file).endswith("GGUF needs package gguf: in a clone, pip install '.[gguf]'")


def test_releases_with_wrong_tokenizers_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "FIRST_RIGHT_RELEASE", "99")
    expected = refused(file)
    assert f"transformers {transformers.__version__} makes wrong tokenizers of GGUF files" in expected
    assert expected.endswith("pip install 'transformers>=99'")
