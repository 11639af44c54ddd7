"""`Places`: where the numbers of a token lie in a block of vLLM's CPU cache, and `read_places`, which copies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quest_attention.errors import UnsupportedModelError

__all__ = ["Places", "read_places"]

_BASE = 256
"""Of the digits by which numbers are told apart: bfloat16, like the wider dtypes, has all integers up to it."""


class Places(NamedTuple):
    """Where the numbers of each token lie in what a block has of one KV head.

    vLLM keeps keys and values on a CPU as its kernels read them, which differs between processors and releases: keys
    turned on their side, or packed in pairs. It is found out by writing tokens of numbers that tell where they come
    from, so nothing of it is written down here.

    Attributes:
        keys: `[N, D]` int64, places among the `2 N D` numbers of a block and head.
        values: `[N, D]` int64, likewise.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def find(
        cls, write: Callable[[Tensor, Tensor, Tensor, Tensor], None], page_size: int, head_dim: int, dtype: torch.dtype
    ) -> Places:
        """Of blocks of `page_size` tokens.

        Args:
            write: Takes keys and values `[N, 1, D]`, a cache `[1, 1, N, 2 D]` and slots `[N]` int64, and writes.
            page_size: Tokens of a block, N [tokens].
            head_dim: Channels, D.
            dtype: Of the cache, which stores what it is given.

        Raises:
            UnsupportedModelError: Not every number of the tokens is in the block, as it was given.

        >>> def side_by_side(key, value, cache, slots):
        ...     cache.view(2, 2, 4)[:] = torch.stack([key[:, 0], value[:, 0]])
        >>> Places.find(side_by_side, 2, 4, torch.bfloat16).values.tolist()
        [[8, 9, 10, 11], [12, 13, 14, 15]]
        """
        count = 2 * page_size * head_dim
        names, found, digit = torch.arange(count), torch.zeros(count, dtype=torch.int64), 1
        while digit < count:
            keys, values = (names // digit % _BASE).to(dtype).view(2, page_size, 1, head_dim)
            cache = torch.zeros(1, 1, page_size, 2 * head_dim, dtype=dtype)
            write(keys, values, cache, torch.arange(page_size))
            found += cache.flatten().long() * digit
            digit *= _BASE
        if not torch.equal(found.sort().values, names):
            raise UnsupportedModelError(
                f"KV cache: got {len(found.unique())} numbers of {count} in a block in {dtype}, expected keys and "
                "values as they were written, which sketches are made of"
            )
        return cls(*found.argsort().view(2, page_size, head_dim))


def read_places(records: Tensor, blocks: Tensor, places: Tensor) -> Tensor:
    """Copies of what lies at some places.

    Args:
        records: `[B', 2 N D]`, what blocks have of single heads; see `Fold`.
        blocks: Int32 or int64, of any shape: a record for each token.
        places: `[*blocks.shape, D]` int64, or what can be expanded to that: those of the tokens' numbers.

    Returns:
        `[*blocks.shape, D]`.
    """
    return records[blocks.long()[..., None], places]
