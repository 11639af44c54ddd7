"""Options that can be checked by themselves, before anything is imported, loaded or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast

from quest_attention.errors import QuestValueError

__all__ = ["check_seed", "check_threads", "check_workers", "drafts_of", "path_of", "refuse_cache_options"]

MOST_SEED = 2**64 - 1
"""The largest that PyTorch's generators take."""


def check_seed(seed: int) -> None:
    """Refuse a seed that PyTorch would not take, for every command alike.

    Raises:
        QuestValueError: As said.
    """
    if not 0 <= seed <= MOST_SEED:
        raise QuestValueError("seed", seed, f"an integer from 0 to {MOST_SEED}")


def check_threads(threads: int | None) -> None:
    """Refuse more threads than there are cores for: thousands of them take the process down.

    Raises:
        QuestValueError: As said.
    """
    if threads is not None:
        _check_cores("threads", threads)


def check_workers(workers: int) -> None:
    """Likewise of processes, each of which has a model and a thread of its own.

    Raises:
        QuestValueError: As said.
    """
    _check_cores("workers", workers)


def drafts_of(text: str | None, *, is_lossless: bool, is_dense: bool) -> int | Literal["auto"] | None:
    """Tokens to draft before a check; None where nothing is drafted.

    Raises:
        QuestValueError: Drafts without --lossless, or --lossless with --dense; or it is no number of drafts.
    """
    if is_lossless and is_dense:
        raise QuestValueError("lossless", True, "False with --dense, which has nothing to check")
    if not is_lossless:
        if text is not None:
            raise QuestValueError("draft_tokens", text, "none without --lossless: nothing is drafted")
        return None
    from quest_attention.hf.draft_length import (
        DEFAULT_DRAFTS,
        check_draft_tokens,
    )  # takes seconds, as transformers does

    if text is None:
        return DEFAULT_DRAFTS
    drafts = int(text) if text.isdecimal() else text
    check_draft_tokens(drafts)
    return cast("int | Literal['auto']", drafts)


def refuse_cache_options(
    offload: str | None, hot_tokens: int | None, kv_cache_dtype: str, *, is_lossless: bool, is_dense: bool
) -> None:
    """Refuse what says nothing: where a cache lies and what it stores is asked of a Quest cache.

    Raises:
        QuestValueError: As said.
    """
    if offload is not None and is_dense:
        raise QuestValueError("offload", offload, "none with --dense, which reads all of the cache")
    if offload is not None and is_lossless:
        raise QuestValueError("offload", offload, "none with --lossless, whose checks read the whole cache")
    if offload not in (None, "host"):
        raise QuestValueError("offload", offload, "host, or nothing")
    if offload is None and hot_tokens is not None:
        raise QuestValueError("hot_tokens", hot_tokens, "none without --offload: all tokens are as near")
    if kv_cache_dtype == "auto":
        return
    if is_dense:
        raise QuestValueError("kv_cache_dtype", kv_cache_dtype, "auto with --dense, whose cache is transformers' own")
    from quest_attention.hf.cache_dtype import check_cache_dtype  # takes seconds, as transformers does

    check_cache_dtype(kv_cache_dtype)


def path_of(option: str, text: str) -> Path:
    """The path that an option names.

    Raises:
        QuestValueError: The text is empty, as an unset variable of a shell is: it would be the folder one is in.
    """
    if not text.strip():
        raise QuestValueError(option, text, "a path")
    return Path(text)


def _check_cores(option: str, count: int) -> None:
    cores = os.cpu_count()  # None where the system does not say
    if count < 1:
        raise QuestValueError(option, count, "a positive integer")
    if cores is not None and count > cores:
        raise QuestValueError(option, count, f"at most {cores}, the logical cores of this machine")
