"""vLLM's CPU backend, with Quest for decode rows past the budget.

Scores and selection are this library's. Attention over the selected pages is the stock kernel's, given a block table of
the selected pages with KV heads folded into the batch, because vLLM keeps keys on a CPU in formats of its own. For the
same reason bounds are taken from keys as they come, never from the cache.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from quest_attention.ops import Selection, Step, run_step, update_slot_metadata
from quest_attention.pages import num_pages
from quest_attention.serving.rows import read_lengths
from quest_attention.vllm.builder import QuestMetadataBuilder
from quest_attention.vllm.folding import Fold
from quest_attention.vllm.impl import OpenCache, QuestAttentionImpl, QuestBackend
from quest_attention.vllm.step import QuestStep

__all__ = ["QuestCPUBackend", "QuestCPUImpl", "QuestCPUMetadataBuilder"]


class QuestCPUBackend(QuestBackend, CPUAttentionBackend):
    """What `--attention-backend CUSTOM` means on a CPU."""

    @staticmethod
    def get_impl_cls() -> type[QuestCPUImpl]:
        """Attention of a layer."""
        return QuestCPUImpl

    @staticmethod
    def get_builder_cls() -> type[QuestCPUMetadataBuilder]:
        """Metadata of a batch."""
        return QuestCPUMetadataBuilder


class QuestCPUMetadataBuilder(QuestMetadataBuilder, CPUAttentionMetadataBuilder):
    """Metadata of a batch; that of folded rows is made once for all layers."""

    def _plan(self, batch: Any) -> QuestStep | None:
        step = super()._plan(batch)
        if step is not None and step.num_rows:
            longest = num_pages(max(step.lengths), step.config.page_size)
            step.block_table = step.block_table[:, :longest]  # here the host knows
            step.folded = self._fold(batch, step)
        return step

    def _fold(self, batch: Any, step: QuestStep) -> Any:
        """Stock metadata of one row for each decode row and KV head, the group's queries its heads."""
        folded = copy.copy(self)
        folded.num_heads, folded.num_kv_heads = self.num_heads // self.num_kv_heads, 1
        lengths = read_lengths(step.seq_lens, step.config).repeat_interleave(self.num_kv_heads)
        rows = lengths.shape[0]
        starts = torch.arange(rows + 1, dtype=torch.int32)
        rows_batch = batch.replace(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=rows,
            num_actual_tokens=rows,
            max_query_len=1,
            max_seq_len=int(lengths.max()),
            block_table_tensor=step.block_table,  # each layer puts its own in this place
            slot_mapping=batch.slot_mapping[:0],
            positions=None,
            is_prefilling=None,
        )
        return CPUAttentionMetadataBuilder.build(folded, 0, rows_batch)


class QuestCPUImpl(QuestAttentionImpl, CPUAttentionBackendImpl):
    """Attention of a layer."""

    backend_class = QuestCPUBackend
    _folded: tuple[int, Fold] | None = None

    def attend(self, layer: Any, query: Tensor, opened: OpenCache, step: QuestStep, output: Tensor) -> Selection:
        """See `QuestAttentionImpl`."""
        kv = opened.with_table(step.block_table)
        if self._folded is None or self._folded[0] != opened.address:
            self._folded = opened.address, Fold(opened.parts.stock)
        fold = self._folded[1]

        def attend_stock(_: Step, selected: Selection) -> Tensor:
            metadata = replace(step.folded, block_table=fold.table(step.block_table, selected.units))
            group = query.shape[1] // self.num_kv_heads
            rows = query.reshape(-1, group, self.head_size)
            self._forward_stock(layer, rows, None, None, fold.cache, metadata, output.view(rows.shape))
            return output

        asked = Step(query=query, kv=kv, seq_lens=step.seq_lens, config=step.config)
        return run_step(asked, attend=attend_stock).selected

    def write(self, layer: Any, key: Tensor, value: Tensor, opened: OpenCache, slots: Tensor) -> None:
        """See `QuestAttentionImpl`."""
        CPUAttentionBackendImpl.do_kv_cache_update(self, layer, key, value, opened.parts.stock, slots)
        if self.is_dense(layer):
            return  # nobody reads the bounds of a dense layer
        kv, backend = opened.paged, self._options.backend
        update_slot_metadata(kv.metadata, key, slots, page_size=kv.page_size, form=kv.form, backend=backend)
