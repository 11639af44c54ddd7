"""The GPU adapter run by vLLM's CPU engine: FlashAttention's part is plain PyTorch, all of ours is what a GPU runs.

Blocks, metadata, plans and calls are then those of a GPU but for the graphs; the verbs are PyTorch's.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata

from quest_attention.forms import FP8
from quest_attention.vllm import proposer
from quest_attention.vllm.draft_step import DraftStep
from quest_attention.vllm.gpu import QuestGPUBackend, QuestGPUImpl, QuestGPUMetadataBuilder
from quest_attention.vllm.scales import unquantized
from vllm_oracle import OracleExtension


class SimulatedBackend(QuestGPUBackend):
    """Stands where the GPU's would."""

    @staticmethod
    def get_impl_cls() -> type[SimulatedImpl]:
        return SimulatedImpl

    @staticmethod
    def get_builder_cls() -> type[QuestGPUMetadataBuilder]:
        return QuestGPUMetadataBuilder


class SimulatedImpl(QuestGPUImpl):
    """With FlashAttention's forward in PyTorch, over the same arguments."""

    backend_class = SimulatedBackend

    def __init__(self, *args: Any, sinks: Tensor | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sinks = sinks  # FlashAttention looks for a GPU that knows them

    def _forward_stock(
        self, _layer: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor, metadata: Any, output: Tensor, *_: Any
    ) -> Tensor:
        if metadata is None:
            return output.fill_(0)
        assert key is None and value is None, "in the cache already"
        if kv_cache.dim() == 5:  # vLLM 0.25
            keys, values = kv_cache.unbind(1)
        else:
            keys, values = kv_cache.transpose(1, 2).split(self.head_size, -1)
        if kv_cache.dtype == torch.uint8:
            keys, values = (
                (part.view(FP8).float() * scale).to(output.dtype)
                for part, scale in ((keys, _layer._k_scale), (values, _layer._v_scale))
            )
            query = unquantized(_layer, query, output.dtype)
        starts = metadata.query_start_loc.tolist()
        for row, length in enumerate(metadata.seq_lens.tolist()):
            start, end = starts[row], starts[row + 1]
            if start == end:
                continue
            table = metadata.block_table[row].long()[: -(-length // keys.shape[1])]
            k, v = (part[table].flatten(0, 1)[:length].transpose(0, 1) for part in (keys, values))  # [H, T, D]
            q = query[start:end].transpose(0, 1)  # [HQ, t, D]
            position = torch.arange(length - (end - start), length)
            mask = position[:, None] >= torch.arange(length)
            if self.sinks is None:
                attended = F.scaled_dot_product_attention(
                    q[None], k[None], v[None], attn_mask=mask, scale=self.scale, enable_gqa=True
                )[0]
            else:
                k, v = (part.repeat_interleave(q.shape[0] // k.shape[0], 0) for part in (k, v))
                logits = (q @ k.transpose(1, 2) * self.scale).masked_fill(~mask, -torch.inf)
                sinks = self.sinks.to(logits)[:, None, None].expand(-1, logits.shape[1], 1)
                attended = torch.softmax(torch.cat([logits, sinks], -1), -1, torch.float32)[..., :-1].to(v) @ v
            output[start:end] = attended.transpose(0, 1)
        return output


class ReplayedStep(DraftStep):
    """Draft steps prepared once for a number of rows, as a graph has them, and run again from the host."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for size in (2, 4):
            self._begin([], [], [], size)
            run = functools.partial(self._advance, size, size, self._prepare(size, None), CUDAGraphMode.NONE, None)
            self._graphs[size] = SimpleNamespace(replay=run), None


def replay_drafts() -> None:
    """Have drafts with Quest replayed."""
    proposer.DraftStep = ReplayedStep


class SimulatedOracle(OracleExtension):
    """The oracle for this adapter: the same checks, its output held to PyTorch's attention alone."""

    def plan_a_capture(self, tokens: int = 1) -> list[int]:
        """Rows that run Quest in a batch of four rows of so many tokens: as a short step, and as one to be captured."""
        builder = self.model_runner.attn_groups[0][0].get_metadata_builder()  # type: ignore[attr-defined]
        starts, lengths = torch.arange(5, dtype=torch.int32) * tokens, torch.full((4,), tokens, dtype=torch.int32)
        batch = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            num_reqs=4,
            num_actual_tokens=4 * tokens,
            max_query_len=tokens,
            max_seq_len=tokens,
            block_table_tensor=torch.zeros(4, 128, dtype=torch.int32),
            slot_mapping=torch.full((4 * tokens,), -1),
        )
        plans = builder.build(0, batch), builder.build_for_cudagraph_capture(batch), builder.build(0, batch)
        return [metadata.quest.num_rows for metadata in plans]

    def install_oracle(self) -> None:
        self.watch(QuestGPUImpl, has_yardstick=False)
