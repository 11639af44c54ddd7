"""vLLM's FlashAttention backend, with Quest for decode rows past the budget.

Tokens are written with their bounds in one launch, in place of the stock one; the decode step of a layer is one launch.
With sketches either takes several. All read everything they need on the device, so that vLLM captures decode batches in
full CUDA graphs. In a captured step every row runs Quest, which reads a row within the budget whole.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from quest_attention.config import QuestConfig
from quest_attention.errors import QuestValueError
from quest_attention.forms import form_of
from quest_attention.ops import Selection, Workspace, append_slots, make_workspace, quest_decode
from quest_attention.ops.query_tokens import MOST_CHOOSING_HEADS
from quest_attention.ops.triton.token_workspace import passing_sample
from quest_attention.serving.options import KEY
from quest_attention.vllm.builder import QuestMetadataBuilder
from quest_attention.vllm.impl import OpenCache, QuestAttentionImpl, QuestBackend
from quest_attention.vllm.step import QuestStep, steps_of

_logger = logging.getLogger("vllm.quest_attention")
_ESTIMATE_BYTES = 4
"""Of the estimate of a logit."""

__all__ = ["QuestGPUBackend", "QuestGPUImpl", "QuestGPUMetadataBuilder", "check_estimates"]


class QuestGPUBackend(QuestBackend, FlashAttentionBackend):
    """What `--attention-backend CUSTOM` means on an NVIDIA GPU."""

    stock_backend = FlashAttentionBackend

    @staticmethod
    def get_impl_cls() -> type[QuestGPUImpl]:
        """Attention of a layer."""
        return QuestGPUImpl

    @staticmethod
    def get_builder_cls() -> type[QuestGPUMetadataBuilder]:
        """Metadata of a batch."""
        return QuestGPUMetadataBuilder

    # What FlashAttention serves and Quest was not tested with.

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Programs share a row by how many rows there are."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Not tested, as the two below."""
        return False

    supports_non_causal = supports_rswa = supports_mm_prefix

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders alone."""
        return bool(attn_type == AttentionType.DECODER)


class QuestGPUMetadataBuilder(QuestMetadataBuilder, FlashAttentionMetadataBuilder):
    """Metadata of a batch."""

    # A batch of single tokens is captured whole; others run in pieces between which attention is eager.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """With speculation vLLM captures batches in which every row checks as many tokens, and no others.

        Whether such rows choose or are read whole does not change in a graph.
        """
        del kv_cache_spec
        if vllm_config.speculative_config is not None:
            return AttentionCGSupport.UNIFORM_BATCH
        return cls._cudagraph_support

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # By width of the block table and tokens of a row; graphs hold their addresses.
        self._workspaces: dict[tuple[int, int], Workspace | None] = {}
        self._outgrown: set[QuestConfig] = set()
        if self._query_tokens > 1 and self.counters is not None and form_of(self.config).scores == "token":
            check_estimates(vllm_config, self._query_tokens, self.config, device)

    def _plan(self, batch: Any) -> QuestStep | None:
        step = super()._plan(batch)
        if step is not None and step.num_rows:
            for one in steps_of(step):
                one.workspace = self._scratch(one)
            if self._row_planner.is_capturing:
                self._warm_up(step)
        return step

    def _scratch(self, step: QuestStep) -> Workspace | None:
        """Memory for steps of every size, made where no graph is captured, whose memory it must outlive.

        Rows that check fewer tokens than others may, which no graph holds, take their own.
        """
        tokens = 1 if step.tokens is None else step.tokens.most
        if tokens > 1 and (tokens < self._query_tokens or self.config.selection_unit != "token"):
            return None
        layer, opened = self._first_layer()
        kv, num_heads = opened.with_table(step.block_table), layer.impl.num_heads * tokens
        key = kv.max_pages, tokens
        if key not in self._workspaces:
            settings = self.vllm_config
            captured = settings.compilation_config.max_cudagraph_capture_size or 0
            sizes = range(1, max(settings.scheduler_config.max_num_seqs, captured) + 1)
            # For the server's budget, whatever a request asks for that is in the first step.
            self._workspaces[key] = make_workspace(kv, num_heads, self.config, batch_sizes=sizes)
            if self._workspaces[key] is None:
                _logger.warning("Quest: a decode step takes several launches a layer, with memory of its own.")
        made = self._workspaces[key]
        if made is None or made.fits(kv, num_heads, step.config):
            return made
        if step.config not in self._outgrown:
            self._outgrown.add(step.config)
            _logger.warning("Quest: steps with a budget of %d take memory of their own.", step.config.token_budget)
        return None

    def _warm_up(self, step: QuestStep) -> None:
        """Run a step of this size over no tokens: kernels are compiled and loaded before the graph that holds them."""
        layer, opened = self._first_layer()
        impl = layer.impl
        query = torch.zeros(
            step.num_tokens, impl.num_heads, impl.head_size, dtype=self.vllm_config.model_config.dtype,
            device=self.device,
        )  # fmt: skip
        nothing = replace(
            step, seq_lens=torch.zeros_like(step.seq_lens), block_table=torch.zeros_like(step.block_table)
        )
        selected = impl.attend(layer, query, opened, nothing, torch.empty_like(query))
        nothing.count(selected)

    def _first_layer(self) -> tuple[Any, OpenCache]:
        """A sparse layer of this worker, and its cache."""
        layer = self.vllm_config.compilation_config.static_forward_context[self._row_planner.counted_layer]
        return layer, layer.impl.open(layer, layer.kv_cache)


def check_estimates(vllm_config: Any, query_tokens: int, config: QuestConfig, device: torch.device) -> None:
    """Say what the estimates of a step take in which every row checks tokens by sketches, where it makes any.

    Raises:
        QuestValueError: More than the GPU has.
    """
    rows, model = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config
    heads, length = model.get_num_attention_heads(vllm_config.parallel_config), model.max_model_len
    group = heads // model.get_num_kv_heads(vllm_config.parallel_config)
    is_told = config.candidate_factor or passing_sample(config.token_budget, length)
    has_launches = config.selection_unit == "token" and config.group_reduction == "max" and is_told
    if has_launches and group * query_tokens <= MOST_CHOOSING_HEADS:
        return
    size = rows * query_tokens * heads * length * _ESTIMATE_BYTES
    takes = f"{rows} rows that check {query_tokens} tokens over {length} positions take {size / 1e9:.1f} GB by sketches"
    less = "bounds, or a smaller --max-num-seqs or --max-model-len"
    if device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory:
        raise QuestValueError(f"{KEY}.metadata", "sketch", f"{less}: {takes}, which is more than the GPU has")
    _logger.warning("Quest: %s, and copies of it; less with %s.", takes, less)


class QuestGPUImpl(QuestAttentionImpl, FlashAttentionImpl):
    """Attention of a layer."""

    backend_class = QuestGPUBackend

    def attend(self, layer: Any, query: Tensor, opened: OpenCache, step: QuestStep, output: Tensor) -> Selection:
        """See `QuestAttentionImpl`."""
        del layer
        kv, tokens = opened.with_table(step.block_table), step.tokens
        is_view = tokens is None or tokens.place is None
        by_row = output if tokens is None else tokens.by_row(output)
        done = quest_decode(
            query if tokens is None else tokens.by_row(query), kv, step.seq_lens, step.config, sm_scale=self.scale,
            softcap=self._softcap, sinks=self.sinks, workspace=step.workspace, out=by_row if is_view else None,
            query_lens=None if tokens is None else tokens.lens,
        )  # fmt: skip
        if tokens is not None and not is_view:
            output.copy_(tokens.flat(done.output))
        return done.selected

    def write(self, layer: Any, key: Tensor, value: Tensor, opened: OpenCache, slots: Tensor) -> None:
        """See `QuestAttentionImpl`."""
        del layer
        # In a dense layer too, whose metadata nobody reads: bounds come in the launch that writes the tokens.
        append_slots(opened.paged, key, value, slots, backend=self._options.backend)
