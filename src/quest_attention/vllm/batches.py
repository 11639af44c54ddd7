"""Batches of vLLM: how long their rows are and of how many tokens, and batches of some of the rows."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from quest_attention.errors import QuestValueError
from quest_attention.serving.options import KEY

__all__ = [
    "SomeRows",
    "by_kind",
    "checking_lengths",
    "fresh_tokens",
    "lengths_of",
    "rows_from",
    "told_of_every_row",
]


def lengths_of(batch: Any, rows: int) -> list[int]:
    """Of the first rows, as far as the host knows them: never too short [tokens]."""
    known = batch.seq_lens_cpu_upper_bound
    return [batch.max_seq_len] * rows if known is None else cast("list[int]", known[:rows].tolist())


def fresh_tokens(batch: Any, rows: int) -> list[int]:
    """Tokens of this step of the first rows, but for those that have none: they only pad a batch, and come last."""
    found: list[int] = batch.query_start_loc_cpu[: rows + 1].diff().tolist()
    while found and not found[-1]:
        found.pop()
    return found


def by_kind(lengths: list[int], fresh: list[int]) -> tuple[list[int], list[int]]:
    """Lengths of rows of one token, and of those of several."""
    pairs = list(zip(lengths, fresh, strict=True))
    return [length for length, has in pairs if has == 1], [length for length, has in pairs if has > 1]


def told_of_every_row(batch: Any) -> Any:
    """A batch that tells of every row whether it is in its prompt.

    vLLM's V2 runner leaves out rows that only pad a batch for a graph. Its own look at the rows wants as many as there
    are in the batch.
    """
    told = batch.is_prefilling
    if told is None or len(told) == batch.num_reqs:
        return batch
    return batch.replace(is_prefilling=torch.nn.functional.pad(told, (0, batch.num_reqs - len(told)), value=False))


def checking_lengths(batch: Any, first: int, most: int) -> list[int]:
    """Lengths of the rows from `first` on that check up to `most` speculated tokens [tokens]."""
    fresh = batch.query_start_loc_cpu.diff()[first : batch.num_reqs]
    checks = (fresh > 1) & (fresh <= 1 + most)
    if batch.is_prefilling is not None:
        checks &= ~batch.is_prefilling[first : batch.num_reqs].to(checks.device)
    lengths = lengths_of(batch, batch.num_reqs)[first:]
    return [length for length, is_checked in zip(lengths, checks.tolist(), strict=True) if is_checked]


class SomeRows(NamedTuple):
    """Rows of a batch that come before those that cannot choose, with their tokens, on the host and on the device."""

    rows_on_host: list[int]
    rows: torch.Tensor
    tokens_on_host: list[int]
    tokens: torch.Tensor
    starts: torch.Tensor

    def of(self, batch: Any, max_query_len: int, max_seq_len: int) -> Any:
        """The batch of these rows alone."""
        device = self.rows.device

        def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[self.rows if tensor.device == device else self.rows_on_host]

        def tokens(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[self.tokens if tensor.device == device else self.tokens_on_host]

        return batch.replace(
            query_start_loc=self.starts.to(device),
            query_start_loc_cpu=self.starts,
            seq_lens=rows(batch.seq_lens),
            seq_lens_cpu_upper_bound=rows(batch.seq_lens_cpu_upper_bound),
            num_reqs=len(self.rows_on_host),
            num_actual_tokens=len(self.tokens_on_host),
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_table_tensor=rows(batch.block_table_tensor),
            slot_mapping=tokens(batch.slot_mapping),
            positions=tokens(batch.positions),
            is_prefilling=rows(batch.is_prefilling),
        )


def rows_from(batch: Any, first: int, first_token: int) -> Any:
    """The rows of a batch from `first` on, whose tokens begin at `first_token`."""

    def tail(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[first:]

    if isinstance(batch.causal, torch.Tensor):
        raise QuestValueError(KEY, "a batch that is causal row by row", "a plain decoder")
    return batch.replace(
        query_start_loc=batch.query_start_loc[first:] - first_token,
        query_start_loc_cpu=batch.query_start_loc_cpu[first:] - first_token,
        seq_lens=batch.seq_lens[first:],
        seq_lens_cpu_upper_bound=tail(batch.seq_lens_cpu_upper_bound),
        num_reqs=batch.num_reqs - first,
        num_actual_tokens=batch.num_actual_tokens - first_token,
        block_table_tensor=batch.block_table_tensor[first:],
        slot_mapping=batch.slot_mapping[first_token:],
        positions=None if batch.positions is None else batch.positions[first_token:],
        is_prefilling=tail(batch.is_prefilling),
    )
