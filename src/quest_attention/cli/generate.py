"""`quest generate`: continue a prompt, stream the text, and say what was read to write it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from quest_attention.cli.console import OnProgress, progress_bar, say
from quest_attention.cli.loading import LoadedModel, load_model, resolve_device, set_threads
from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.eval.frame import turn_end
from quest_attention.eval.wording import chosen_by, counted
from quest_attention.hf import QuestCounters, enable_quest
from quest_attention.hf.cache_dtype import CacheDtype
from quest_attention.hf.held_memory import HeldMemory
from quest_attention.hf.naming import CACHE
from quest_attention.hf.offload import OffloadTo
from quest_attention.ops.dispatch import resolve_backend

__all__ = ["Drafts", "Sampling", "stream_text"]

Drafts = int | Literal["auto"] | None
"""Tokens to draft before a check [tokens]; None without `--lossless`."""

_CHUNK = 2048
"""Tokens of a prompt that pass at a time where keys and values go to host memory: the activations of more would take
the room of hot tokens [tokens]."""
LEAST_TEMPERATURE = 1e-6
"""Logits divided by far less than this are no numbers any more in float32; the likeliest token is sure before that."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens of this total probability.
        seed: Of the sampling.

    Raises:
        QuestValueError: A number is out of range.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise QuestValueError("max_new_tokens", self.max_new_tokens, "a positive integer")
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            expected = f"0 (the likeliest token), or a finite number from {LEAST_TEMPERATURE:g} up"
            raise QuestValueError("temperature", self.temperature, expected)
        if not 0 < self.top_p <= 1:
            raise QuestValueError("top_p", self.top_p, "a probability above 0 and at most 1")


@dataclass(frozen=True)
class Written:
    """What a run wrote, and how fast.

    Attributes:
        text: The generated text.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens written, an end-of-text token included.
        prefill_seconds: From the start to the first token [s].
        decode_seconds: From the first token to the last [s].
        memory: What the cache held in the end, where keys and values went to host memory; else None.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    memory: HeldMemory | None

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_speed(self) -> float | None:
        """New tokens per second after the first; None where there was but one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def stream_text(
    prompt: str, config: QuestConfig | None, sampling: Sampling, *, is_chat: bool, draft_tokens: Drafts,
    offload: str | None, hot_tokens: int | None, kv_cache_dtype: str, model_name: str | None, device: str, dtype: str,
    threads: int | None, as_json: bool, is_quiet: bool,
) -> None:  # fmt: skip
    """Do what `quest generate` does; `config` None is `--dense`, and `draft_tokens` are those of `--lossless`.

    Raises:
        QuestValueError: The prompt, the model or an option is wrong.
        BackendError: The backend cannot run on the device.
        UnsupportedModelError: Quest cannot serve the model.
    """
    set_threads(threads)
    if config is not None:
        resolve_backend(config.backend, resolve_device(device))
    loaded = load_model(model_name, device=device, dtype=dtype)
    ids = _encode(loaded.tokenizer, prompt, is_chat)
    _check_fits(loaded.model, ids.shape[1], sampling)
    with contextlib.ExitStack() as stack:
        counters = None
        if config is not None:
            is_lossless = draft_tokens is not None
            handle = enable_quest(
                loaded.model, config, lossless=is_lossless, draft_tokens=draft_tokens,
                offload=cast("OffloadTo | None", offload), hot_tokens=hot_tokens,
                kv_cache_dtype=cast("CacheDtype", kv_cache_dtype),
            )  # fmt: skip
            stack.enter_context(handle)
            config, counters = handle.config, handle.counters  # with the form of its metadata
        chunk = None if offload is None else _CHUNK + (ids.shape[1] % _CHUNK == 1)  # one token would be a decode step
        written = _generate(loaded, ids, sampling, chunk, is_chat=is_chat, is_silent=as_json, is_quiet=is_quiet)
    if as_json:
        sys.stdout.write(json.dumps(_report(written, config, counters, loaded), indent=2) + "\n")
    elif not is_quiet:
        say(_summary(written, config, counters))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, is_chat: bool) -> Tensor:
    """Token ids `[1, T]` of the prompt."""
    if is_chat:
        if tokenizer.chat_template is None:
            raise QuestValueError("chat", True, "a model whose tokenizer has a chat template; this one has none")
        turn = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    # A chat template writes the special tokens itself.
    return torch.tensor([tokenizer(text, add_special_tokens=not is_chat).input_ids])


def _check_fits(model: PreTrainedModel, prompt_tokens: int, sampling: Sampling) -> None:
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + sampling.max_new_tokens > positions:
        room = positions - sampling.max_new_tokens
        if room < 1:
            raise QuestValueError(
                "max_new_tokens", sampling.max_new_tokens, f"less than {positions}, the model's positions"
            )
        raise QuestValueError(
            "prompt",
            counted(prompt_tokens, "token"),
            f"at most {room}: the model's {positions} positions, less {counted(sampling.max_new_tokens, 'new token')}",
        )


def _generate(
    loaded: LoadedModel, ids: Tensor, sampling: Sampling, chunk: int | None, *, is_chat: bool, is_silent: bool,
    is_quiet: bool,
) -> Written:  # fmt: skip
    model, tokenizer = loaded.model, loaded.tokenizer
    generation = GenerationConfig.from_model_config(model.config)
    # Our own choices, not those that a checkpoint may bring: the options of the command say all there is.
    generation.max_new_tokens = sampling.max_new_tokens
    generation.do_sample = sampling.temperature > 0
    generation.prefill_chunk_size = chunk
    generation.return_dict_in_generate = chunk is not None  # whose cache is asked what it holds
    if generation.do_sample:
        generation.temperature, generation.top_p, generation.top_k = sampling.temperature, sampling.top_p, 0
        torch.manual_seed(sampling.seed)
    generation.eos_token_id = _ends(model, tokenizer, is_chat=is_chat)
    generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = ids.to(model.device)
    with contextlib.ExitStack() as until_first_token:
        on_progress = until_first_token.enter_context(progress_bar(is_quiet=is_quiet))
        until_first_token.enter_context(_prefill_progress(model, ids.shape[1], chunk, on_progress))
        streamer = _Stream(tokenizer, until_first_token, is_silent=is_silent)
        started = time.perf_counter()
        generate = cast("Any", model).generate  # its annotations describe a class that only type checkers see
        made = generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation, streamer=streamer)
    return Written(
        text="".join(streamer.pieces),
        prompt_tokens=ids.shape[1],
        new_tokens=len(streamer.times),
        prefill_seconds=streamer.times[0] - started,
        decode_seconds=streamer.times[-1] - streamer.times[0],
        memory=None if chunk is None else made[CACHE].memory,
    )


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> list[int] | None:
    """Tokens that end the text."""
    known = model.generation_config.eos_token_id  # may be several, where the tokenizer knows one
    known = tokenizer.eos_token_id if known is None else known
    ends = set(known) if isinstance(known, list) else {known}
    if is_chat:
        ends.add(turn_end(tokenizer))
    return sorted(end for end in ends if end is not None) or None


class _Stream(TextStreamer):
    """Writes words to standard output as they are finished, and notes when each token came.

    Args:
        tokenizer: Turns tokens into text.
        until_first_token: Closed when the first token comes, before anything is written.
        is_silent: Collect the text only.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, until_first_token: contextlib.ExitStack, *, is_silent: bool
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []
        self.times: list[float] = []  # [s]
        self._until_first_token = until_first_token
        self._is_silent = is_silent

    def put(self, value: Tensor) -> None:
        """Take the prompt (the first call) or a token."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self._until_first_token.close()
        super().put(value)  # type: ignore[no-untyped-call]  # transformers' own

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write text that no further token can change."""
        self.pieces.append(text)
        if not self._is_silent:
            sys.stdout.write(text + ("\n" if stream_end and sys.stdout.isatty() else ""))
            sys.stdout.flush()


@contextlib.contextmanager
def _prefill_progress(
    model: PreTrainedModel, tokens: int, chunk: int | None, on_progress: OnProgress
) -> Iterator[None]:
    """Report the passes of a prompt layer by layer; only that it runs, where the model's layers are not to be found."""
    layers = getattr(model.base_model, "layers", None)
    what = f"reading {counted(tokens, 'token')}"
    on_progress(what, 0, 0)
    hooks = []
    if isinstance(layers, nn.ModuleList):
        passed = itertools.count(1)
        total = len(layers) * (1 if chunk is None else -(-tokens // chunk))

        def report(*_: object) -> None:
            on_progress(what, next(passed), total)

        hooks = [layer.register_forward_hook(report) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _summary(written: Written, config: QuestConfig | None, counters: QuestCounters | None) -> str:
    """What was done, in a few lines for people."""
    seconds, speed = written.prefill_seconds, written.prefill_speed
    lines = ["", f"prefill  {counted(written.prompt_tokens, 'token')} in {seconds:.2f} s, {speed:,.0f} tokens/s"]
    if written.decode_speed is not None:
        lines.append(
            f"decode   {counted(written.new_tokens, 'token')}, {written.decode_speed:,.1f} tokens/s, "
            f"{1e3 / written.decode_speed:.2f} ms a token"
        )
    lines.append(f"cache    {_reads(config, counters)}")
    if counters is not None and counters.drafts is not None:
        lines.append(f"drafts   {counters.drafts.summary()}")
    if counters is not None and counters.fetches is not None:
        lines.append(f"offload  {counters.fetches.summary()}")
    if written.memory is not None:
        lines.append(f"memory   of the cache: {written.memory.summary()}")
    if config is not None and counters is not None and counters.sparse_steps:
        lines.append(f"chosen   by {chosen_by(config)}{_ranking(config)}")
    return "\n".join(lines)


def _ranking(config: QuestConfig) -> str:
    """What ranks what is chosen, where it is less than a page or keys do."""
    is_page = config.units_per_page == 1
    unit = "pages" if is_page else "single tokens" if config.unit_size == 1 else f"runs of {config.unit_size} tokens"
    if config.candidate_tokens:
        return f", {unit} by the keys of about {config.candidate_tokens:,} candidates, which each step reads too"
    return "" if is_page else f", {unit} by estimates alone"


def _reads(config: QuestConfig | None, counters: QuestCounters | None) -> str:
    if config is None or counters is None:
        return "all of it read at every step: --dense"
    if counters.sparse_steps == 0:
        budget = counted(config.token_budget, "token")
        if counters.drafts is not None and "within budget" not in counters.drafts.plain_steps:
            return "all of it read at every step: nothing was drafted"
        return f"all of it read at every step: Quest never ran, the text stayed within {budget}"
    sparse = [layer for layer in counters.layers if layer.sparse_steps]
    share = sum(layer.tokens_read for layer in sparse) / sum(layer.tokens_held for layer in sparse)
    return (
        f"{counters.share_read:.1%} read by the decode steps ({share:.1%} in the {len(sparse)} of "
        f"{len(counters.layers)} layers with Quest, {counted(config.token_budget, 'token')} a step)"
    )


def _report(
    written: Written, config: QuestConfig | None, counters: QuestCounters | None, loaded: LoadedModel
) -> dict[str, Any]:
    """The same for programs."""
    return {
        "text": written.text,
        "model": loaded.name,
        "prompt_tokens": written.prompt_tokens,
        "new_tokens": written.new_tokens,
        "prefill_seconds": written.prefill_seconds,
        "prefill_tokens_per_second": written.prefill_speed,
        "decode_seconds": written.decode_seconds,
        "decode_tokens_per_second": written.decode_speed,
        "cache_bytes": None if written.memory is None else written.memory._asdict(),
        "quest": None if config is None else asdict(config),
        "counters": None if counters is None else counters.to_dict(),
    }


# Longer than 250 lines: what is noted while a text is written, and the two reports of it, change together.
