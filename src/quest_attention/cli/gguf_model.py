"""Load a model and its tokenizer from a GGUF file, as llama.cpp and its kin keep them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quest_attention.cli.console import say
from quest_attention.cli.gguf_header import GgufHeader, read_header
from quest_attention.errors import QuestValueError

__all__ = ["SUFFIX", "load_gguf"]

SUFFIX = ".gguf"
"""How the names of such files end, in small or capital letters."""
FIRST_RIGHT_RELEASE = "5.23"
"""Of transformers. Before it the tokenizers it makes of GGUF files are wrong without a word: 5.17 takes the first token
of a turn for the last, splits Gemma's words as its tokenizer never did, and none puts the file's own first token
before a text."""
PACKAGES = ("gguf", "accelerate")
"""What transformers needs to read GGUF: our extra of that name."""

SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Splits of text in which every digit stands alone, by llama.cpp's names. transformers does not know them, and after
two spaces or newlines joins a digit to the last."""
AS_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"})
"""Splits that are GPT-2's, which is what transformers takes for all that it does not know."""
NORMALIZED = frozenset({"qwen2"})
"""Splits of models whose tokenizers compose accents first (NFC), of which GGUF files say nothing."""
END_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<turn|>",
    "<EOT>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with its wide bars and low block
)
"""Tokens that end a text or a turn in any model that has them: files name one end where a chat model has two, so that
llama.cpp looks for them by name as well."""


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file with transformers' sdpa attention.

    The weights are unpacked: packed ones need a kernel for every device and cannot be saved.

    Args:
        path: The file.
        dtype: What the weights are unpacked to.

    Raises:
        QuestValueError: It is not a language model in one whole GGUF file, or this installation cannot read one.
    """
    _check_packages(path)
    header = read_header(path)
    _check_release(path)
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with _quiet_and_quick():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            dtype=dtype,
            attn_implementation="sdpa",
            quantization_config=transformers.GgufConfig(dequantize=True),
            **where,
        )
    # The class that AutoTokenizer finds makes the very same tokenizer of a GGUF file, but looks for it for seconds.
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(path.parent), **where)
    _mend_splits(tokenizer, header)
    _add_end_tokens(model, tokenizer, header)
    return model, tokenizer


def _check_packages(path: Path) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        how = "in a clone, pip install '.[gguf]'"
        expected = f"a folder or an id on the Hub, as GGUF needs package {' and '.join(missing)}: {how}"
        raise QuestValueError("model", str(path), expected)


def _check_release(path: Path) -> None:
    if Version(transformers.__version__) < Version(FIRST_RIGHT_RELEASE):
        expected = (
            f"a folder or an id on the Hub, as transformers {transformers.__version__} makes wrong tokenizers of GGUF "
            f"files: pip install 'transformers>={FIRST_RIGHT_RELEASE}'"
        )
        raise QuestValueError("model", str(path), expected)


@contextlib.contextmanager
def _quiet_and_quick() -> Iterator[None]:
    """Change how transformers reads GGUF for a while.

    Its progress bar alone does not ask the setting for them. And it parses the file twice and lists the names that
    tensors may have once for every module of the model, which together is a large part of the time a load takes.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    with contextlib.ExitStack() as undo:
        for module, name, wrap in (
            (modeling_gguf_pytorch_utils, "tqdm", functools.partial(functools.partial, disable=True)),
            (gguf, "GGUFReader", functools.cache),
            (gguf, "get_tensor_name_map", functools.cache),
        ):
            original = getattr(module, name)
            undo.callback(setattr, module, name, original)
            setattr(module, name, wrap(original))
        yield


def _mend_splits(tokenizer: PreTrainedTokenizerBase, header: GgufHeader) -> None:
    """Make a byte-level tokenizer split text as the model's own does, or warn that it may not."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if not header.is_byte_level:
        return  # transformers has a builder for each of the others
    splits = header.splits_text
    backend: Any = tokenizer.backend_tokenizer
    if splits in SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif splits not in AS_GPT2 and splits not in GGUF_PRE_TOKENIZER_SPLITS:
        say(
            f"quest: warning: the file's tokenizer splits text by the rule {splits!r}, which transformers "
            f"{transformers.__version__} does not know: it splits as GPT-2 does, so numbers and spaces may become "
            "other tokens than the model's own"
        )
    if splits in NORMALIZED and backend.normalizer is None:
        backend.normalizer = normalizers.NFC()


def _add_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: GgufHeader) -> None:
    """Let the model stop at every token that ends a text or a turn."""
    ends = set(header.end_tokens)
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    ends.update(added[name] for name in END_NAMES if name in added)
    generation: Any = model.generation_config
    generation.eos_token_id = sorted(ends) or None
