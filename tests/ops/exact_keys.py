"""`ExactKeys`: the simplest form that scores tokens, which keeps the keys themselves; and its place in a config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor

from quest_attention import forms
from quest_attention.forms import Scored, form_of

__all__ = ["ExactKeys", "exact_keys_known"]

NAME = "sketch"
"""Of the metadata whose options are those of any that scores tokens."""


@dataclass(frozen=True)
class ExactKeys:
    """What a token scores is its logit, in float32."""

    name = NAME
    is_bound = False
    takes_whole_pages = False
    coefficient = 0.0
    scores: ClassVar[Scored] = "token"

    def shape(self, page_size: int, dim: int) -> tuple[int, int]:
        return page_size, dim

    def dtypes(self, keys: torch.dtype) -> tuple[torch.dtype, ...]:
        del keys
        return (torch.float32,)

    def take(self, into: Tensor, keys: Tensor, before: Tensor | int, written: Tensor | None = None) -> None:
        if written is None:
            assert isinstance(before, int)
            into[..., before : before + keys.shape[-2], :] = keys.float()
        else:
            into.copy_(torch.where(written[..., None], keys.float(), into))

    def take_by_hand(self, kept: Tensor, keys: Tensor, before: int) -> Tensor:
        kept = kept.clone()
        for offset, key in enumerate(keys, start=before):
            kept[offset] = key.float()
        return kept

    def see(self, query: Tensor) -> Tensor:
        return query

    def score(self, seen: Tensor, kept: Tensor) -> Tensor:
        return torch.bmm(kept.unflatten(2, (-1, seen.shape[2])).flatten(1, 2), seen.transpose(1, 2))

    def score_by_hand(self, query: Tensor, kept: Tensor) -> Tensor:
        return torch.stack([(query.double() * key.double()).sum() for key in kept])


@contextmanager
def exact_keys_known() -> Iterator[None]:
    """As long as it lasts, the form is the one that a config asks for by its name."""
    with mock.patch.dict(forms._FORMS, {NAME: lambda _: ExactKeys()}):
        form_of.cache_clear()
        yield
    form_of.cache_clear()
