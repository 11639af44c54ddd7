"""vLLM's FlashAttention backend, with Quest for decode rows past the budget.

Tokens are written with their bounds in one launch, in place of the stock one; the decode step of a layer is one launch.
Both read everything they need on the device, so that vLLM captures decode batches in full CUDA graphs. In a captured
step every row runs Quest, which reads a row within the budget whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from quest_attention.ops import Selection, append_slots, quest_decode
from quest_attention.vllm.layer import OpenCache, QuestLayer
from quest_attention.vllm.layout import layout_of
from quest_attention.vllm.planning import QuestPlanner
from quest_attention.vllm.plugin import vllm_version
from quest_attention.vllm.step import QuestStep

__all__ = ["QuestGPUBackend", "QuestGPUImpl", "QuestGPUMetadataBuilder"]


class QuestGPUBackend(FlashAttentionBackend):
    """What `--attention-backend CUSTOM` means on an NVIDIA GPU."""

    @staticmethod
    def get_name() -> str:
        """The name by which vLLM looks it up."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[QuestGPUImpl]:
        """Attention of a layer."""
        return QuestGPUImpl

    @staticmethod
    def get_builder_cls() -> type[QuestGPUMetadataBuilder]:
        """Metadata of a batch."""
        return QuestGPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Room for the bounds, in releases of vLLM that ask the backend."""
        return layout_of(vllm_version()).customize(spec)


class QuestGPUMetadataBuilder(QuestPlanner, FlashAttentionMetadataBuilder):
    """Metadata of a batch."""

    # A batch of single tokens is captured whole; others run in pieces between which attention is eager.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


class QuestGPUImpl(QuestLayer, FlashAttentionImpl):
    """Attention of a layer."""

    backend_class = QuestGPUBackend

    def _attend(self, layer: Any, query: Tensor, opened: OpenCache, step: QuestStep, output: Tensor) -> Selection:
        del layer
        kv = opened.with_table(step.block_table)
        done = quest_decode(
            query,
            kv,
            step.seq_lens,
            step.config,
            sm_scale=self.scale,
            softcap=self._softcap,
            workspace=step.workspaces.get(kv, query.shape[1], step.config),
            out=output,
        )
        return done.selected

    def _write(self, layer: Any, key: Tensor, value: Tensor, opened: OpenCache, slots: Tensor) -> None:
        del layer
        append_slots(opened.paged, key, value, slots, backend=self._options.backend)
