"""`RowTokens`: where the query tokens of rows lie in a batch, in which those of all rows follow one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowTokens"]


@dataclass(frozen=True)
class RowTokens:
    """The query tokens of the first rows of a batch, N of R rows, of which a row has T at most.

    Made once a step, on the device and without waiting for it: the host knows how many there are.

    Attributes:
        count: N [tokens].
        most: T [tokens].
        lens: `[R]` int32, how many each row has; None where all have T, as in a CUDA graph.
        place: `[R, T]` int64, which token of the batch each is, and for those that a row lacks its last one again; None
            where all have T.
        back: `[N]` int64, of each token the place among R * T; None where all have T.
    """

    count: int
    most: int
    lens: Tensor | None = None
    place: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of(cls, lens: list[int], starts: Tensor) -> RowTokens | None:
        """Of rows with so many tokens each; None where each has one.

        Args:
            lens: Of the rows, as the host knows them, none of them 0 [tokens].
            starts: `[R + 1]` int32 on the device, where in the batch the tokens of each row begin.
        """
        count, most = sum(lens), max(lens)
        if most == 1:
            return None
        if count == most * len(lens):
            return cls(count, most)
        starts = starts[: len(lens) + 1].long()
        first, has = starts[:-1], starts.diff()
        nth = torch.arange(most, device=starts.device)
        place = first[:, None] + torch.minimum(nth, has[:, None] - 1)
        row = torch.repeat_interleave(has, output_size=count)  # which row each token is of
        back = row * most + torch.arange(count, device=starts.device) - first[row]
        return cls(count, most, has.int(), place, back)

    def by_row(self, flat: Tensor) -> Tensor:
        """`[N, ...]` as `[R, T, ...]`; a view where all rows have T."""
        return flat.unflatten(0, (-1, self.most)) if self.place is None else flat[self.place]

    def flat(self, by_row: Tensor) -> Tensor:
        """`[R, T, ...]` as `[N, ...]`."""
        flat = by_row.flatten(0, 1)
        return flat if self.back is None else flat[self.back]

    def row_and_place(self, rows: int) -> tuple[Tensor, Tensor]:
        """Of each token its row, of so many, and which of that row's tokens it is: `[N]` int64 each."""
        back = torch.arange(rows * self.most) if self.back is None else self.back
        return back // self.most, back % self.most

    def with_one(self) -> Tensor | None:
        """`[R]` bool, which rows have one token alone; None where none has."""
        return None if self.lens is None else self.lens == 1
