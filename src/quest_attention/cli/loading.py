"""Load a model and its tokenizer for a command: the bundled one, a folder, a GGUF file, or a model on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from quest_attention.cli.failures import one_line
from quest_attention.cli.gguf_model import SUFFIX, load_gguf
from quest_attention.cli.options import check_threads
from quest_attention.errors import QuestError, QuestValueError
from quest_attention.eval.wording import counted
from quest_attention.models import bundled_model_path

__all__ = ["LoadedModel", "check_dtype", "load_model", "resolve_device", "set_threads"]

HUB_TIMEOUT = 5.0
"""Seconds to wait for the Hub's first answer. transformers alone retries for over 20 before it gives up."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode.

    Attributes:
        name: As people know it: of a GGUF file its name alone.
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
        is_bundled: Whether it is the one that comes with the package.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    is_bundled: bool

    @property
    def description(self) -> str:
        """One line: name, size, number type and device."""
        millions = self.model.num_parameters() / 1e6
        dtype = str(self.model.dtype).removeprefix("torch.")
        device = self.model.device.type
        where = f"cpu, {counted(torch.get_num_threads(), 'thread')}" if device == "cpu" else str(self.model.device)
        return f"{self.name}, {millions:,.1f}M parameters, {dtype}, {where}"


def resolve_device(device: str) -> torch.device:
    """The device of that name; `auto` is the first GPU where there is one.

    Raises:
        QuestValueError: There is no such device, or none that can compute.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.ones(1, device=found).tolist()  # there and back: `meta` holds nothing
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        found = None
    if found is None or (found.type == "cpu" and found.index):  # PyTorch takes any number of a CPU for the one there is
        raise QuestValueError("device", device, "auto, cpu, or a device that `quest env` lists")
    return found


def set_threads(threads: int | None) -> None:
    """Let PyTorch use so many CPU threads; None leaves its choice.

    Raises:
        QuestValueError: The number is not positive, or larger than that of the cores.
    """
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def check_dtype(dtype: str) -> None:
    """Refuse what is no number type of `load_model`.

    Raises:
        QuestValueError: As said.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise QuestValueError("dtype", dtype, f"one of auto, {', '.join(DTYPES)}")


def load_model(name: str | None, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load a causal language model with transformers' sdpa attention.

    Args:
        name: A folder, a GGUF file or an id on the Hub; None is the bundled model.
        device: See `resolve_device`.
        dtype: `"auto"` is what the checkpoint was saved in. The bundled model on a CPU is float32, and a GGUF file is
            unpacked to float32 on a CPU and to bfloat16 elsewhere.

    Raises:
        QuestValueError: No such model, or it cannot be loaded; no such device or dtype.
        QuestStateError: There is no bundled model.
    """
    target = resolve_device(device)
    check_dtype(dtype)
    file = None if name is None else _gguf_file(name)
    if dtype == "auto":
        dtype = _own_dtype(target, is_bundled=name is None, is_gguf=file is not None)
    _quieten_transformers()
    try:
        model, tokenizer = _load_checkpoint(name, dtype) if file is None else load_gguf(file, DTYPES[dtype])
    except QuestError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken checkpoint raises whatever its parser does
        expected = f"a causal language model that transformers can load: {one_line(str(error))}"
        raise QuestValueError("model", name or "the bundled model", expected) from None
    model.eval().to(target)
    shown = (name or "the bundled model") if file is None else file.name
    return LoadedModel(shown, model, tokenizer, name is None)


def _load_checkpoint(name: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what transformers itself has a place for: a folder or an id on the Hub; None is the bundled model."""
    source, local_only = (str(bundled_model_path()), True) if name is None else _locate(name)
    options: dict[str, Any] = {"local_files_only": local_only}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=DTYPES.get(dtype, "auto"), attn_implementation="sdpa", **options
    )
    return model, tokenizer


def _own_dtype(target: torch.device, *, is_bundled: bool, is_gguf: bool) -> str:
    """What `auto` means: `"auto"` again where the checkpoint says it."""
    if target.type == "cpu" and (is_bundled or is_gguf):
        # The bundled model is saved in bfloat16 to be small, GGUF files in packed forms of no dtype. On a CPU full
        # attention is up to twice as fast in float32 at this size, and a comparison with a slowed-down baseline would
        # flatter Quest.
        return "float32"
    return "bfloat16" if is_gguf else "auto"


def _gguf_file(name: str) -> Path | None:
    """The GGUF file of that name; None where it is not the name of one.

    Raises:
        QuestValueError: It is, but there is no such file.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() != SUFFIX or path.is_dir():
        return None
    if not path.is_file():
        raise QuestValueError("model", name, "a GGUF file that exists, a folder, or an id on the Hub")
    return path


def _locate(name: str) -> tuple[str, bool]:
    """What to give to `from_pretrained`, and whether it must not ask the network.

    Raises:
        QuestValueError: It is neither a model's folder nor, as far as can be known, a model on the Hub.
    """
    if not name.strip():  # as an unset variable of a shell is: it would be the folder one is in
        raise QuestValueError("model", name, "a folder, a GGUF file, or an id on the Hub")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            expected = "a folder with a config.json, a tokenizer and weights"
            if files := sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX):
                which = files[0] if len(files) == 1 else f"one of its {len(files)} files, like {files[0]}"
                expected = f"{expected}; to load GGUF name the file: {which}"
            raise QuestValueError("model", name, expected)
        return str(folder), True
    if folder.exists():
        raise QuestValueError("model", name, "a folder with a model in it, not a file other than *.gguf")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise QuestValueError("model", name, "a folder that exists, a GGUF file, or an id on the Hub like owner/name")
    return name, not _is_on_hub(name)


def _is_on_hub(name: str) -> bool:
    """Whether the Hub has a model; False where it cannot be asked but a copy lies in the local cache.

    Raises:
        QuestValueError: The Hub has none, or it cannot be asked and there is no copy.
    """
    # huggingface_hub's errors derive from those of its HTTP client, whichever that is in the version installed.
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    expected = "a folder that exists, or a model on the Hub"
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise QuestValueError("model", name, f"{expected} that you may read: this one needs a login") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise QuestValueError("model", name, f"{expected}: the Hub has none of that name") from None
    except Exception as error:  # noqa: BLE001 - offline shows as many errors: names, proxies, timeouts, offline mode
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        why = f"no such folder, no copy in the local cache, and the Hub did not answer ({one_line(str(error))})"
        raise QuestValueError("model", name, f"{expected}: {why}") from None
    return True


def _quieten_transformers() -> None:
    """Keep transformers' advice and progress bars out of the terminal, from here to the end of the command."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
