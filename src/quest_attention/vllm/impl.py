"""`QuestAttentionImpl`: what Quest adds to a stock `AttentionImpl`, vLLM's attention of a layer, on any device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from quest_attention.errors import QuestValueError
from quest_attention.forms import form_of
from quest_attention.ops import Selection
from quest_attention.pages import PagedKV
from quest_attention.serving.counters import StepCounters
from quest_attention.serving.options import KEY
from quest_attention.vllm.layout import BlockParts, Room, ask_for_room, layout_of, page_in, page_size
from quest_attention.vllm.options import read_options
from quest_attention.vllm.plugin import vllm_version
from quest_attention.vllm.ranks import sparse_layers
from quest_attention.vllm.refusals import BACKEND_NAME, check_layer, check_output_scales
from quest_attention.vllm.scales import check_cache_dtype, scales_of, stored_dtype, unquantized
from quest_attention.vllm.step import Part, QuestStep
from quest_attention.vllm.transfers import check_transfer, compare_metadata

__all__ = ["OpenCache", "QuestAttentionImpl", "QuestBackend"]


class QuestBackend:
    """Stands before a stock backend among the bases of a class."""

    stock_backend: type
    """The stock backend: of the layers of a model that Quest does not serve, those without full attention."""
    supports_kv_cache_update_bypass = False
    """Whether a model may write keys and values itself, as vLLM 0.33 asks: they would be without their metadata."""

    @staticmethod
    def get_name() -> str:
        """The name by which vLLM looks it up."""
        return BACKEND_NAME

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """Sizes of the blocks that a worker sees: of a page, where a block of the cache holds several."""
        page = page_in(kv_cache_spec)
        if page is not None:
            return [page]
        asked = () if kv_cache_spec is None else (kv_cache_spec,)
        found: list[Any] = super().get_supported_kernel_block_sizes(*asked)  # type: ignore[misc]
        return found


class QuestAttentionImpl:
    """Stands before a stock `AttentionImpl` among the bases of a class.

    Names of arguments are vLLM's, shapes too: queries `[T, HQ, D]`, keys and values `[T, HKV, D]`, T the tokens of all
    rows.

    Attributes:
        num_kv_heads: Of this rank; the stock class sets it, as it does `head_size`, `scale` and `sinks`.
    """

    backend_class: type
    """Quest's backend for this device."""
    num_kv_heads: int
    head_size: int
    scale: float
    sinks: Tensor | None = None

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None, kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
        attn_type: str = "decoder", kv_sharing_target_layer_name: str | None = None, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        vllm_config = get_current_vllm_config()
        check_layer(alibi_slopes=alibi_slopes, sliding_window=sliding_window, attn_type=attn_type)
        # What a checkpoint says of its cache may have made another of "auto" since the configuration was looked at.
        check_cache_dtype(kv_cache_dtype, vllm_config.model_config.dtype, current_platform.device_type)
        options = read_options(vllm_config, current_platform.device_type)
        if options is None:
            raise QuestValueError("additional_config", "nothing", f'{{"{KEY}": {{"token_budget": 2048}}}} or the like')
        # vLLM may have made one since the configuration was looked at.
        check_transfer(vllm_config, options.device, vllm_version())
        compare_metadata(vllm_config, options.device)
        super().__init__(  # type: ignore[call-arg]
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, sinks,
        )  # fmt: skip
        self._softcap = logits_soft_cap or None
        self._options = options
        # Filled while the model is made, and complete before its first step.
        self._layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self._layout = layout_of(vllm_version())
        from vllm.model_executor.layers.attention import Attention

        ask_for_room(self._layout, Attention, self.backend_class, options.device)
        self._vllm_config = vllm_config  # its block size is final when there is a cache
        self._opened: OpenCache | None = None
        self._is_dense: bool | None = None

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a batch: rows past the budget by Quest, in layers that are not dense; all else as stock.

        Raises:
            QuestValueError: The output is to be quantized.
        """
        check_output_scales(output_scale, output_block_scale)
        if attn_metadata is None:  # vLLM measures memory
            return self._forward_stock(layer, query, key, value, kv_cache, None, output)
        opened = self.open(layer, kv_cache)
        step: QuestStep | None = attn_metadata.quest
        if step is not None and not self.is_dense(layer):
            is_counted = layer.layer_name == step.counted_layer
            if step.num_rows:
                return self._forward_quest(layer, query, opened, step, output, is_counted=is_counted)
            if is_counted:
                step.counters.count_stock(step.lengths)
                step.counters.count_verified(step.checked)
                step.counters.count_step()
        # Keys and values are in the cache already; stock backends need them for nothing else.
        return self._forward_stock(layer, query, None, None, opened.parts.stock, attn_metadata, output)

    # What vLLM fuses into attention where a stock class says it may, in some release or on some device: quantization of
    # the output, and writes to the cache, which would pass by the metadata.

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: see `check_output_scales`."""
        del quant_key
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """No: keys would be written without their metadata, as in the two below."""
        return False

    fused_qk_norm_rope_kvcache_supported = fused_qk_norm_mrope_kvcache_supported = fused_rope_kvcache_supported

    def is_dense(self, layer: Any) -> bool:
        """Whether the layer always reads everything, by its rank among the full-attention layers of the model."""
        if self._is_dense is None:
            names = sparse_layers(self._layers, self._options.num_dense_layers, extract_layer_index)
            self._is_dense = layer.layer_name not in names
        return self._is_dense

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write tokens to their slots, and take them into the metadata; `key` and `value` may be padded."""
        count = slot_mapping.shape[0]
        self.write(layer, key[:count], value[:count], self.open(layer, kv_cache), slot_mapping)

    def _forward_stock(self, *arguments: Any) -> Tensor:
        output: Tensor = super().forward(*arguments)  # type: ignore[misc]
        return output

    def _forward_quest(
        self, layer: Any, query: Tensor, opened: OpenCache, step: QuestStep, output: Tensor, *, is_counted: bool
    ) -> Tensor:
        count = step.num_tokens
        if step.rest is not None:
            stock = opened.parts.stock
            self._forward_stock(layer, query[count:], None, None, stock, step.rest, output[count:])
        if step.parts:
            for part in step.parts:
                self._forward_part(layer, query, opened, part, output, step.counters if is_counted else None)
        else:
            selected = self.attend(layer, unquantized(layer, query[:count], output.dtype), opened, step, output[:count])
            if is_counted:
                step.count(selected)
        if is_counted:
            step.counters.count_step()
        return output

    def _forward_part(
        self, layer: Any, query: Tensor, opened: OpenCache, part: Part, output: Tensor, counters: StepCounters | None
    ) -> None:
        """Rows that are read alike, wherever in the batch they are; counted where there are counters."""
        query, attended = query[part.where], output.new_empty(len(part.where), *output.shape[1:])
        if part.step is None:
            self._forward_stock(layer, query, None, None, opened.parts.stock, part.stock, attended)
            if counters is not None:
                counters.count_stock(part.lengths)
                counters.count_verified(part.checked)
        else:
            selected = self.attend(layer, unquantized(layer, query, output.dtype), opened, part.step, attended)
            if counters is not None:
                part.step.count(selected)
        output[part.where] = attended

    def attend(self, layer: Any, query: Tensor, opened: OpenCache, step: QuestStep, output: Tensor) -> Selection:
        """Run the rows of a step, `[N, HQ, D]`, and write their output `[N, HQ, D]`; gives the units that were read.

        N is R where each row has one token, else as `step.tokens` says.
        """
        raise NotImplementedError

    def write(self, layer: Any, key: Tensor, value: Tensor, opened: OpenCache, slots: Tensor) -> None:
        """Write tokens, `[T, HKV, D]`, to their slots `[T]`, and take them into the metadata of their pages."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the cache: vLLM measures CUDA graphs on a small one, and takes it away before it makes another."""
        self._opened = None

    def open(self, layer: Any, kv_cache: Tensor) -> OpenCache:
        """Views of a layer's cache, made once: vLLM gives the same tensor each time."""
        if self._opened is None or self._opened.address != kv_cache.data_ptr():
            settings = self._vllm_config
            page = page_size(settings.cache_config.block_size, settings.model_config, self._options.device)
            config = self._options.config(page)
            dtype = stored_dtype(kv_cache.dtype)
            room = Room.of(config, self.head_size, dtype)
            parts = self._layout.split(kv_cache.view(dtype), self.num_kv_heads, self.head_size, room)
            parts = parts._replace(stock=parts.stock.view(kv_cache.dtype))
            nobody = torch.zeros(0, 1, dtype=torch.int32, device=kv_cache.device)
            key_scale, value_scale = scales_of(layer, dtype)
            paged = PagedKV(
                parts.keys, parts.values, parts.metadata, nobody, form=form_of(config), key_scale=key_scale,
                value_scale=value_scale,
            )  # fmt: skip
            self._opened = OpenCache(kv_cache.data_ptr(), parts, paged)
        return self._opened


class OpenCache(NamedTuple):
    """A layer's cache, seen as it is used.

    Attributes:
        address: Of the tensor that was opened.
        parts: Views of it.
        paged: For the verbs; its page table has no rows.
    """

    address: int
    parts: BlockParts
    paged: PagedKV

    def with_table(self, block_table: Tensor) -> PagedKV:
        """The cache of some sequences."""
        return replace(self.paged, page_table=block_table)
