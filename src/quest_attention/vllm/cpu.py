"""vLLM's CPU backend, with Quest for decode rows past the budget.

Scores and selection are this library's. Attention over the selected pages is the stock kernel's, given a block table of
the selected pages with KV heads folded into the batch, because vLLM keeps keys on a CPU in formats of its own. For the
same reason bounds are taken from keys as they come. What no page at a time gives is read back out of these formats
(`places.py`): the pages that are sketched, when they are complete, the keys of candidates, and single tokens, to which
this library attends. It does so to pages too in a layer with attention sinks, of which each head has its own.
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
from vllm.v1.kv_cache_interface import FullAttentionSpec

from quest_attention.forms import Bounds
from quest_attention.ops import (
    Selection,
    Step,
    run_step,
    sparse_decode_attention,
    update_page_metadata,
    update_slot_metadata,
)
from quest_attention.ops.masses import score_masses
from quest_attention.ops.query_tokens import QueryTokens
from quest_attention.pages import PagedKV, num_pages
from quest_attention.serving.rows import read_lengths
from quest_attention.vllm.builder import QuestMetadataBuilder
from quest_attention.vllm.folding import Fold
from quest_attention.vllm.impl import OpenCache, QuestAttentionImpl, QuestBackend
from quest_attention.vllm.layout import page_in
from quest_attention.vllm.places import Places, read_places
from quest_attention.vllm.row_tokens import RowTokens
from quest_attention.vllm.step import QuestStep, steps_of

__all__ = ["QuestCPUBackend", "QuestCPUImpl", "QuestCPUMetadataBuilder"]


class QuestCPUBackend(QuestBackend, CPUAttentionBackend):
    """What `--attention-backend CUSTOM` means on a CPU."""

    stock_backend = CPUAttentionBackend

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

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if page_in(kv_cache_spec) is not None:
            _zero_whole_blocks()

    def _plan(self, batch: Any) -> QuestStep | None:
        step = super()._plan(batch)
        if step is not None and step.num_rows:
            for one in steps_of(step):
                longest = num_pages(max(one.lengths + one.checked), one.config.page_size)
                one.block_table = one.block_table[:, :longest]  # here the host knows
                if one.config.selection_unit == "page":
                    one.folded = self._fold(batch, one)
        return step

    def _fold(self, batch: Any, step: QuestStep) -> Any:
        """Stock metadata of one row for each row and KV head, the group's queries its heads."""
        folded = copy.copy(self)
        folded.num_heads, folded.num_kv_heads = self.num_heads // self.num_kv_heads, 1
        # What is read last are the tokens of the step, so that the stock kernel lets none see what is later.
        lengths = read_lengths(step.seq_lens, step.config).repeat_interleave(self.num_kv_heads)
        rows, tokens = lengths.shape[0], step.tokens
        starts = torch.arange(rows + 1, dtype=torch.int32) * (1 if tokens is None else tokens.most)
        if tokens is not None and tokens.lens is not None:
            starts[1:] = tokens.lens.repeat_interleave(self.num_kv_heads).cumsum(0)
        rows_batch = batch.replace(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=rows,
            num_actual_tokens=int(starts[-1]),
            max_query_len=1 if tokens is None else tokens.most,
            max_seq_len=int(lengths.max()),
            block_table_tensor=step.block_table,  # each layer puts its own in this place
            slot_mapping=batch.slot_mapping[:0],
            positions=None,
            is_prefilling=None,
        )
        return CPUAttentionMetadataBuilder.build(folded, 0, rows_batch)


def _zero_whole_blocks() -> None:
    """Have vLLM's runner on a CPU clear whole blocks where a worker sees them cut into pages.

    It clears blocks that a request is given in models with states. vLLM 0.32 takes a block for what the worker sees,
    which it never cuts itself on a CPU: of cut blocks it would clear others' pages. On a GPU it knows of cut blocks.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def _zero_block_ids(runner: CPUModelRunner, block_ids: list[int]) -> None:
        config = runner.kv_cache_config
        layers = runner.compilation_config.static_forward_context
        for group in config.kv_cache_groups:
            if isinstance(group.kv_cache_spec, FullAttentionSpec):
                for name in group.layer_names:
                    blocks = layers[name].kv_cache.unflatten(0, (config.num_blocks, -1))
                    for block in block_ids:
                        blocks[block].zero_()

    CPUModelRunner._zero_block_ids = _zero_block_ids  # noqa: SLF001 - there is no other seam


class QuestCPUImpl(QuestAttentionImpl, CPUAttentionBackendImpl):
    """Attention of a layer."""

    backend_class = QuestCPUBackend
    _folded: tuple[int, Fold] | None = None
    _places: Places | None = None

    def close(self) -> None:
        """See `QuestAttentionImpl`: the folded cache is views of it too."""
        super().close()
        self._folded = None

    def attend(self, layer: Any, query: Tensor, opened: OpenCache, step: QuestStep, output: Tensor) -> Selection:
        """See `QuestAttentionImpl`."""
        kv, tokens = opened.with_table(step.block_table), step.tokens
        several = None if tokens is None else QueryTokens(tokens.by_row(query), tokens.lens, kv, step.seq_lens)
        asked = Step(
            query=query if several is None else several.folded(), kv=kv, seq_lens=step.seq_lens,
            config=step.config if several is None else several.config(step.config), sm_scale=self.scale,
            softcap=self._softcap, sinks=self.sinks if several is None else several.folded_sinks(self.sinks),
        )  # fmt: skip

        def attend_pages(_: Step, selected: Selection) -> Tensor:
            fold = self._fold_of(opened)
            metadata = replace(step.folded, block_table=fold.table(step.block_table, selected.units))
            group = query.shape[1] // self.num_kv_heads
            rows = query.reshape(-1, group, self.head_size)  # of each token its heads, by KV head
            order = None if tokens is None else self._by_fold(step)
            if order is None:
                self._forward_stock(layer, rows, None, None, fold.cache, metadata, output.view(rows.shape))
                return output
            attended = torch.empty_like(rows)
            self._forward_stock(layer, rows[order], None, None, fold.cache, metadata, attended)
            output.view(rows.shape)[order] = attended
            return output

        def attend_tokens(_: Step, selected: Selection) -> Tensor:
            return output.copy_(self._attend_tokens(layer, opened, asked, selected, query, tokens))

        def score_tokens(_: Step) -> Tensor:
            def keys_of(units: Tensor) -> Tensor:
                return self._read_units(layer, opened, asked.kv, units, step.config.unit_size)[0]

            return score_masses(asked, asked.scratch, keys_of=keys_of)

        # Folded rows are of different heads, for whose sinks the stock kernel has no place.
        is_stock = step.config.selection_unit == "page" and self.sinks is None
        attend = attend_pages if is_stock else attend_tokens
        if asked.kv.form.scores == "page" or not step.config.candidate_budget:
            return run_step(asked, attend=attend).selected
        if step.config.backend == "reference":  # which looks keys up in the cache itself
            return run_step(replace(asked, kv=self._readable(layer, opened, asked.kv)), attend=attend).selected
        return run_step(asked, score=score_tokens, attend=attend).selected

    def write(self, layer: Any, key: Tensor, value: Tensor, opened: OpenCache, slots: Tensor) -> None:
        """See `QuestAttentionImpl`."""
        CPUAttentionBackendImpl.do_kv_cache_update(self, layer, key, value, opened.parts.stock, slots)
        if self.is_dense(layer):
            return  # nobody reads the metadata of a dense layer
        kv, backend = opened.paged, self._options.backend
        if kv.form.takes_whole_pages:
            self._take_completed(layer, opened, slots)
            return
        update_slot_metadata(kv.metadata, key, slots, page_size=kv.page_size, form=kv.form, backend=backend)

    def _by_fold(self, step: QuestStep) -> Tensor:
        """`[N * HKV]`: of tokens by KV head, those of a row and a KV head side by side, as folded rows have them."""
        assert step.tokens is not None, "rows of one token are in order"
        heads = torch.arange(self.num_kv_heads)
        of_rows = torch.arange(step.tokens.count).split(step.folded.query_start_loc.diff()[:: len(heads)].tolist())
        return torch.cat([(row * len(heads) + heads[:, None]).flatten() for row in of_rows])

    def _attend_tokens(
        self, layer: Any, opened: OpenCache, asked: Step, selected: Selection, query: Tensor, of_rows: RowTokens | None
    ) -> Tensor:
        """Attention over the selected units, copied out of the cache, of each token `[N, HQ, D]`: the output."""
        size = selected.unit_size
        units = selected.units.clamp(min=0).long()  # unused slots come last
        keys, values = self._read_units(layer, opened, asked.kv, units, size)
        # The last unit alone may be part-filled, and lists of a sequence are equally long.
        lengths = (selected.counts[:, 0] - 1) * size + (asked.seq_lens - 1) % size + 1
        rows, heads, tokens = keys.shape[:3]
        table = torch.arange(rows, dtype=torch.int32)[:, None]  # what is read of a row is one page
        if of_rows is not None:  # what was copied ends with the tokens of the step, each of which sees up to itself
            row, nth = of_rows.row_and_place(rows)
            has = of_rows.most if of_rows.lens is None else of_rows.lens[row]
            lengths, table = lengths[row] - has + nth + 1, table[row]
        nothing = keys.new_empty(rows, heads, *Bounds().shape(tokens, self.head_size))
        chosen = PagedKV.from_hnd(keys, values, nothing, table)
        each = len(query), heads
        whole = Selection(table.new_zeros(*each, 1), table.new_ones(each), tokens)
        attended, _ = sparse_decode_attention(
            query, chosen, lengths, whole, sm_scale=asked.scale, softcap=asked.softcap, sinks=self.sinks,
            backend=self._options.backend,
        )  # fmt: skip
        return attended

    def _read_units(
        self, layer: Any, opened: OpenCache, kv: PagedKV, units: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[R, H, K * size, D]` of units `[R, H, K]` int64, copied out of the cache."""
        token = (units[..., None] * size + torch.arange(size)).flatten(2)  # [R, H, T]
        fold, places = self._fold_of(opened), self._places_of(layer, opened)
        blocks = fold.table(kv.page_table, token // kv.page_size).view(token.shape)
        keys, values = (read_places(fold.records, blocks, part[token % kv.page_size]) for part in places)
        return keys, values

    def _readable(self, layer: Any, opened: OpenCache, kv: PagedKV) -> PagedKV:
        """A copy of the rows' pages whose keys and values are as `PagedKV` has them."""
        rows, pages = kv.page_table.shape
        every = torch.arange(pages).expand(rows, kv.num_kv_heads, -1)
        keys, values = (
            part.unflatten(2, (pages, kv.page_size)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [R * P, N, H, D]
            for part in self._read_units(layer, opened, kv, every, kv.page_size)
        )
        table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
        return PagedKV(keys, values, kv.metadata[kv.page_table.flatten().long()], table, form=kv.form)

    def _take_completed(self, layer: Any, opened: OpenCache, slots: Tensor) -> None:
        """Take the pages whose last token was written to one of the slots, with all of their keys from the cache."""
        kv, fold = opened.paged, self._fold_of(opened)
        is_last = (slots >= 0) & (slots % kv.page_size == kv.page_size - 1)
        pages = slots[is_last] // kv.page_size
        if pages.numel() == 0:
            return
        shape = (len(pages), kv.num_kv_heads)
        blocks = fold.table(pages[:, None], pages.new_zeros(*shape, 1)).view(*shape, 1)
        keys = read_places(fold.records, blocks, self._places_of(layer, opened).keys)  # [pages, H, N, D]
        kept = kv.metadata.new_empty(*shape, *kv.metadata.shape[2:])
        table = torch.arange(len(pages), dtype=torch.int32)[:, None]
        completed = PagedKV.from_hnd(keys, keys, kept, table, form=kv.form)
        update_page_metadata(completed, kv.page_size, kv.page_size, self._options.backend)
        kv.metadata[pages] = kept

    def _fold_of(self, opened: OpenCache) -> Fold:
        """The cache with its KV heads folded, made once."""
        if self._folded is None or self._folded[0] != opened.address:
            self._folded = opened.address, Fold(opened.parts.stock)
        return self._folded[1]

    def _places_of(self, layer: Any, opened: OpenCache) -> Places:
        """Where this processor's cache has what, found out once."""
        if self._places is None:

            def write(*tokens: Tensor) -> None:
                CPUAttentionBackendImpl.do_kv_cache_update(self, layer, *tokens)

            keys = opened.parts.keys
            self._places = Places.find(write, keys.shape[1], keys.shape[3], keys.dtype)
        return self._places
