"""`QuestMetadataBuilder`: what Quest adds to a stock metadata builder: the rows of a batch that run Quest."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from quest_attention.config import QuestConfig
from quest_attention.errors import UnsupportedModelError
from quest_attention.serving.rows import DECODE_TOKENS, RowPlanner
from quest_attention.vllm.batches import (
    SomeRows,
    by_kind,
    checking_lengths,
    fresh_tokens,
    lengths_of,
    rows_from,
    told_of_every_row,
)
from quest_attention.vllm.break_even import break_even_note
from quest_attention.vllm.kinds import note_on_others, other_layers
from quest_attention.vllm.layout import check_full, page_size
from quest_attention.vllm.metrics import publisher
from quest_attention.vllm.options import read_options
from quest_attention.vllm.proposer import watch_runner
from quest_attention.vllm.ranks import is_bounded, is_of_draft, sparse_layers
from quest_attention.vllm.refusals import BACKEND_NAME
from quest_attention.vllm.requests import budgets_of_step, watch_requests
from quest_attention.vllm.row_tokens import RowTokens
from quest_attention.vllm.speculation import drafts_by_quest
from quest_attention.vllm.step import Part, QuestStep
from quest_attention.vllm.worker import worker_label

__all__ = ["QuestMetadataBuilder"]

_logger = logging.getLogger("vllm.quest_attention")


class QuestMetadataBuilder:
    """Stands before a stock builder among the bases of a class. Names of arguments are vLLM's, which passes them so.

    A worker has one for each group of layers that share a block table.

    Attributes:
        counters: Of this group, or None where the budget covers the longest sequence and everything is stock.
        sparse_layers: Names of the layers of this group that choose what they read, in the order of the model.
    """

    reorder_batch_threshold = DECODE_TOKENS  # decode rows come first; a server may have more in those that choose
    supports_update_block_table = False  # a step holds the table too

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        options = read_options(vllm_config, device.type)
        assert options is not None, "a layer of the model was made with these options"
        page = page_size(vllm_config.cache_config.block_size, vllm_config.model_config, device.type)
        if kv_cache_spec.block_size != page:
            found = f"blocks of {kv_cache_spec.block_size} tokens, which vLLM does not cut"
            raise UnsupportedModelError(f"KV cache: got {found}, expected pages of {page} tokens")
        self.config = options.config(page)
        check_full(kv_cache_spec)
        _check_backends(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:  # a new builder comes with a new cache, which wants the memory of the last one
            layers[name].impl.close()
        sparse = sparse_layers(layers, self.config.num_dense_layers, extract_layer_index)
        self.sparse_layers = [name for name in sparse if name in layer_names]
        rank = get_tensor_model_parallel_rank()
        label = worker_label(vllm_config.parallel_config, rank)
        elsewhere = len(sparse) - len(self.sparse_layers)
        if elsewhere:
            label += f", layers {_indices(self.sparse_layers)}"
        self._row_planner = RowPlanner(
            self.config,
            device,
            label=label,
            sparse_layers=self.sparse_layers,
            num_layers=len(layer_names),
            num_elsewhere=elsewhere,
            max_length=vllm_config.model_config.max_model_len,
            log_interval=options.log_interval,
            logger=_logger,
            publish=publisher(worker_label(vllm_config.parallel_config, rank), _indices(self.sparse_layers)),
        )
        self.counters = self._row_planner.counters
        watch_requests(vllm_config)
        speculation = vllm_config.speculative_config
        self._num_speculated = 0 if speculation is None else speculation.num_speculative_tokens
        self._query_tokens = options.query_tokens
        self._chooses = not drafts_by_quest(speculation)
        if not self._chooses:
            watch_runner()
        self.reorder_batch_threshold = self._query_tokens  # rows that may choose come first
        # vLLM 0.32 and newer have this runner for n-gram drafts; 0.25 has none, and a CPU only where there is Triton.
        is_second = device.type == "cuda" and vllm_config.use_v2_model_runner
        if self._num_speculated and options.verify == "dense" and is_second:
            every = "which vLLM's V2 runner gives to every row"
            _logger.warning(
                'Quest reads everything in rows with drafts, %s: with "verify": "sparse" they choose.', every
            )
        if self.counters is not None and self.sparse_layers[0] == sparse[0]:  # once a worker
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            _logger.info("Quest: %s.", break_even_note(name, self.config.metadata))
            others = other_layers(vllm_config.model_config)
            if others is not None:
                _logger.info("Quest: %s.", note_on_others(others, self.config.metadata))

    def use_cascade_attention(self, *_: Any, **__: Any) -> bool:
        """A shared prefix is not read apart: rows choose pages of it."""
        return False

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Stock metadata with a `QuestStep` as `quest`, or None there."""
        metadata = self._build_stock(common_prefix_len, common_attn_metadata, fast_build)
        metadata.quest = self._plan(common_attn_metadata)
        return metadata

    @contextmanager
    def drafting(self, *, is_captured: bool) -> Iterator[None]:
        """While a batch is a step of a draft, in which rows choose that read everything elsewhere.

        Args:
            is_captured: Whether a graph will hold it: its lengths are then the device's, as in a capture of vLLM's own.
        """
        before, self._chooses = self._chooses, True
        try:
            with self._row_planner.capturing() if is_captured else nullcontext():
                yield
        finally:
            self._chooses = before

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """Metadata of a batch whose lengths will be the device's: every row may be past the budget."""
        with self._row_planner.capturing():
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]

    def _build_stock(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool) -> Any:
        """What the stock builder gives."""
        return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]

    def _plan(self, batch: Any) -> QuestStep | None:
        counters = self.counters
        if counters is None:
            return None
        batch = told_of_every_row(batch)
        # The last token of a prompt may come alone; where vLLM tells, and no graph is replayed, it is no decode row.
        tells = batch.is_prefilling is not None and not self._row_planner.is_capturing
        rows, _, tokens, _ = split_decodes_and_prefills(
            batch, decode_threshold=self._query_tokens, treat_short_extends_as_decodes=not tells
        )
        fresh = fresh_tokens(batch, rows)
        rows = len(fresh)
        lengths = lengths_of(batch, rows)
        first_behind = rows
        asked, budgets = budgets_of_step(), None
        configs = None if asked is None else asked.of_rows(rows, self.config)
        if configs is not None:
            budgets = [None if config is None else config.token_budget for config in configs]
        runs_quest = self._row_planner.runs_quest(lengths, budgets)
        if not runs_quest or not self._chooses:
            rows = 0
        if self._num_speculated and not self._row_planner.is_capturing:  # after what forgets the rows of a capture
            counters.count_verified(checking_lengths(batch, first_behind, self._num_speculated))
        of_one, of_several = by_kind(lengths, fresh)
        step = QuestStep(
            self.config, counters, self._row_planner.counted_layer, of_one, rows, batch.seq_lens[:rows],
            batch.block_table_tensor[:rows], of_several,
        )  # fmt: skip
        if rows > 0:
            step.tokens = RowTokens.of(fresh, batch.query_start_loc)
            is_uniform = step.tokens is None or step.tokens.lens is None
            assert is_uniform or not self._row_planner.is_capturing, f"a graph of rows of {set(fresh)} tokens"
        if rows > 0 and tokens < batch.num_actual_tokens:
            step.rest = self._build_stock(0, rows_from(batch, rows, tokens), True)
        if rows > 0 and configs is not None:
            first = configs[0]
            if first is not None and all(config == first for config in configs):
                step.config = first
            else:
                step.parts = self._parts(batch, step, configs, lengths, fresh)
        return step

    def _parts(
        self, batch: Any, step: QuestStep, configs: list[QuestConfig | None], lengths: list[int], fresh: list[int]
    ) -> list[Part]:
        """The rows of a step that may choose, by how they are read; so long, and of so many tokens in this step."""
        parts, begin, device = [], [0, *itertools.accumulate(fresh)], step.seq_lens.device
        for config in dict.fromkeys(configs):
            of_part = [row for row, one in enumerate(configs) if one == config]
            on_host = [token for row in of_part for token in range(begin[row], begin[row + 1])]
            rows, where = torch.tensor(of_part, device=device), torch.tensor(on_host, device=device)
            of_rows, has = [lengths[row] for row in of_part], [fresh[row] for row in of_part]
            kinds = by_kind(of_rows, has)
            starts = torch.tensor([0, *itertools.accumulate(has)], dtype=batch.query_start_loc.dtype)
            if config is None:
                some = SomeRows(of_part, rows, on_host, where, starts)
                parts.append(
                    Part(where, None, self._build_stock(0, some.of(batch, max(has), max(of_rows)), True), *kinds)
                )
            else:
                alike = replace(
                    step, config=config, lengths=kinds[0], checked=kinds[1], num_rows=len(rows),
                    seq_lens=step.seq_lens[rows], block_table=step.block_table[rows],
                    tokens=RowTokens.of(has, starts.to(device)), rest=None,
                )  # fmt: skip
                parts.append(Part(where, alike, None, *kinds))
        return parts


def _indices(layers: list[str]) -> str:
    """Of some layers in the model."""
    return ", ".join(str(extract_layer_index(name)) for name in layers)


def _check_backends(vllm_config: Any) -> None:
    """Whether every layer with full attention took the backend that was asked for.

    Raises:
        UnsupportedModelError: One brings a backend of its own.
    """
    layers = vllm_config.compilation_config.static_forward_context
    for name, layer in layers.items():
        backend = getattr(layer, "attn_backend", None)
        if backend is None or is_bounded(layer) or is_of_draft(layer, layers):
            continue
        if backend.get_name() != BACKEND_NAME:
            expected = "Quest in every layer with full attention"
            raise UnsupportedModelError(f"model: got {backend.get_name()} in {name}, expected {expected}")
