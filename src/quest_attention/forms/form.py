"""`MetadataForm`: what is kept of a page's keys, how tokens are taken into it, and how a query scores it."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

__all__ = ["FP8", "MetadataForm", "Scored", "TwoVectors", "as_bits", "as_numbers"]

Scored = Literal["page", "token"]
FP8 = torch.float8_e4m3fn
"""The dtype of quantised caches, and of bounds in 8 bits."""


class MetadataForm(Protocol):
    """A form of page metadata. Everything else knows of it only what stands here.

    A form is a frozen value: two caches whose forms are equal hold the same. Its kernels are in `ops/triton`, in the
    file of the same name.
    """

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """As in `QuestConfig.metadata`."""
        ...

    @property
    def is_bound(self) -> bool:
        """Whether no key of a page gives a larger logit than the page's score."""
        ...

    @property
    def scores(self) -> Scored:
        """What `score` gives a number for: every page, or every token of every page."""
        ...

    @property
    def takes_whole_pages(self) -> bool:
        """Whether a page is taken once, when it is complete, with all of its keys from the cache.

        What is kept of a page of such a form is right as soon as the page's last token is written, in whatever order
        and however often its tokens were. Before that it may be anything: the page being written is read always, so
        nobody asks for its score.
        """
        ...

    @property
    def coefficient(self) -> float:
        """A number that the score takes, a constant of the kernels; 0 where it takes none."""
        ...

    def shape(self, page_size: int, dim: int) -> tuple[int, int]:
        """Of what is kept for a page and KV head: so many rows of so many numbers."""
        ...

    def dtypes(self, keys: torch.dtype) -> tuple[torch.dtype, ...]:
        """In which it may be stored beside keys of a dtype, `metadata_dtype="kv"` first."""
        ...

    def take(self, into: Tensor, keys: Tensor, before: Tensor | int, written: Tensor | None = None) -> None:
        """Take new keys of pages into what is kept of them, in place.

        Args:
            into: `[..., *shape]`, what is kept.
            keys: `[..., T, D]`, as stored, side by side or not.
            before: Tokens the pages held before these, an int or `[...]`; a page of none starts anew [tokens].
            written: `[..., T]` bool, which of the keys are new, at least one of each page; the keys then are those of
                whole pages, T the page size. None is all of them, which follow the `before` first ones.

        A form that takes whole pages is given all keys of a page, 0 and None.
        """
        ...

    def take_by_hand(self, kept: Tensor, keys: Tensor, before: int) -> Tensor:
        """The oracle of `take`: one page, `[*shape]`, and its new keys `[T, D]`, with loops; gives `[*shape]`."""
        ...

    def see(self, query: Tensor) -> Tensor:
        """Queries `[..., D]` as `score` takes them; float32 or wider."""
        ...

    def score(self, seen: Tensor, kept: Tensor) -> Tensor:
        """Unscaled logits that pages promise, or estimates of those that their tokens give.

        Args:
            seen: `[R, G, W]`, from `see`.
            kept: `[R, P, rows * numbers]`.

        Returns:
            `[R, P, G]`, of tokens `[R, P * page_size, G]`; anything but a finite number where a key of the page, or
            the token's, is not finite, and anything at all for a token that was never taken.
        """
        ...

    def score_by_hand(self, query: Tensor, kept: Tensor) -> Tensor:
        """The oracle of `score`: one query `[D]` and one page, `[*shape]`, in float64; gives `[]`.

        Of tokens it gives `[page_size]`.
        """
        ...


class TwoVectors:
    """What forms have in common that keep two numbers of each channel, and whose score is linear in them."""

    ROWS: ClassVar[int] = 2
    scores: ClassVar[Scored] = "page"
    takes_whole_pages = False

    def shape(self, page_size: int, dim: int) -> tuple[int, int]:
        """See `MetadataForm.shape`."""
        del page_size
        return self.ROWS, dim

    def score(self, seen: Tensor, kept: Tensor) -> Tensor:
        """See `MetadataForm.score`. The query on the right and transposed: `ops.torch_backend` says why."""
        return torch.bmm(kept.to(seen.dtype), seen.transpose(1, 2))


def as_numbers(keys: Tensor) -> Tensor:
    """Keys in a dtype that can be calculated with: those in 8 bits in bfloat16, which holds all of them."""
    return keys.to(torch.bfloat16) if keys.dtype == FP8 else keys


def as_bits(tensor: Tensor) -> Tensor:
    """A tensor as it can be moved about: numbers of 8 bits as bytes, since PyTorch scatters none of them."""
    return tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor
