"""`DraftStep`: a step of a draft by the model that is served, on fixed memory, so that a CUDA graph can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from quest_attention.ops.capture import capturing

__all__ = ["DraftStep"]

_WARMUPS = 2
"""Runs before a capture: kernels are compiled and libraries make their handles, which a capture forbids."""


class DraftStep:
    """The newest token of each row in, the likeliest next one out, in its place; rows are then longer by one.

    It is a step of single tokens, for which vLLM keeps blocks ahead (`reserve_slots`). Everything that changes from
    step to step lies in memory of its own or in the runner's buffers, so that a step can follow another without the
    host, and be replayed from a graph.

    Args:
        runner: vLLM's `GPUModelRunner`, whose blocks, metadata builders and buffers a step uses.
        model: The model, for its logits.
        vllm_config: A `VllmConfig`.
        rows: Most rows of a step, R.

    Attributes:
        tokens: Of each row the newest, `[R]` int32.
        lengths: Of each row, that one included, `[R]` int32; 0 in rows that only pad a graph [tokens].
    """

    def __init__(self, runner: Any, model: Any, vllm_config: Any, rows: int) -> None:
        self._runner, self._model, self._vllm_config = runner, model, vllm_config
        device = runner.device
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.lengths = torch.zeros_like(self.tokens)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        # Metadata builders with the names of their layers, vLLM's `BlockTable` of them, and the rows' part of that.
        self._groups: list[tuple[Any, list[str], Any, Tensor]] = []
        for index, groups in enumerate(runner.attn_groups):
            table = runner.input_batch.block_table[index]
            own = torch.zeros(rows, table.get_device_tensor(1).shape[1], dtype=torch.int32, device=device)
            self._groups += [(one.get_metadata_builder(), one.layer_names, table, own) for one in groups]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._longest = int(vllm_config.model_config.max_model_len)

    def draft(self, rows: Sequence[int], tokens: Sequence[int], lengths: Sequence[int], count: int) -> Tensor:
        """The next tokens of some rows, `[N, count]` int32.

        Args:
            rows: Which of the runner's batch, N of them.
            tokens: The newest of each.
            lengths: Of each, that one included [tokens].
            count: Steps.
        """
        size = next((size for size in sorted(self._graphs) if size >= len(rows)), None)
        self._begin(rows, tokens, lengths, size or len(rows))
        written = []
        for ahead in range(count):
            if size is not None:
                self._graphs[size][0].replay()
            else:
                self._run(len(rows), [length + ahead for length in lengths])
            written.append(self.tokens[: len(rows)].clone())
        return torch.stack(written, dim=1)

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture steps of so many rows; where there are fewer, the others only pad."""
        from vllm.config import CUDAGraphMode

        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, reverse=True):  # smaller ones fit into the memory of larger ones
            self._begin([], [], [], size)
            metadata = self._prepare(size, None)
            for _ in range(_WARMUPS):
                self._advance(size, size, metadata, CUDAGraphMode.NONE, None)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool=pool):
                self._advance(size, size, metadata, CUDAGraphMode.NONE, None)
            self._graphs[size] = graph, metadata  # with what the graph reads

    def _begin(self, rows: Sequence[int], tokens: Sequence[int], lengths: Sequence[int], size: int) -> None:
        """Take the rows in; those up to `size` only pad."""
        count = len(rows)
        self.lengths[count:size] = 0
        if not count:
            return
        newest, held, chosen = torch.tensor([list(tokens), list(lengths), list(rows)], device=self.tokens.device)
        self.tokens[:count], self.lengths[:count] = newest, held
        for *_, table, own in self._groups:
            own[:count] = table.get_device_tensor(self._runner.input_batch.num_reqs)[chosen]

    def _run(self, count: int, lengths: list[int]) -> None:
        """A step that no graph holds whole: in graphs of the pieces between attention, of more tokens, or without."""
        from vllm.config import CUDAGraphMode

        modes = {CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE}
        mode, graph = self._runner.cudagraph_dispatcher.dispatch(count, valid_modes=modes)
        self._advance(count, graph.num_tokens, self._prepare(count, lengths), mode, graph)

    def _prepare(self, count: int, lengths: list[int] | None) -> dict[str, Any]:
        """Metadata of a step by layer; `lengths` None where they will be the device's, as in a graph [tokens]."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        on_host = torch.tensor([self._longest] * count if lengths is None else lengths, dtype=torch.int32)
        metadata: dict[str, Any] = {}
        with ExitStack() as stack:
            for builder, layers, table, own in self._groups:
                stack.enter_context(builder.drafting(is_captured=lengths is None))
                batch = CommonAttentionMetadata(
                    query_start_loc=self._starts[: count + 1],
                    query_start_loc_cpu=torch.arange(count + 1, dtype=torch.int32), seq_lens=self.lengths[:count],
                    num_reqs=count, num_actual_tokens=count, max_query_len=1, max_seq_len=int(on_host.max()),
                    block_table_tensor=own[:count], slot_mapping=table.slot_mapping.gpu[:count],
                    seq_lens_cpu_upper_bound=on_host,
                )  # fmt: skip
                metadata |= dict.fromkeys(layers, builder.build(0, batch, fast_build=True))
        return metadata

    def _advance(self, count: int, padded: int, metadata: dict[str, Any], mode: Any, graph: Any) -> None:
        """Run the model over the rows' newest tokens, padded to so many."""
        from vllm.forward_context import set_forward_context

        runner, lengths = self._runner, self.lengths[:count]
        positions = (lengths.long() - 1).clamp(min=0)
        inputs, places = runner.input_ids.gpu[:padded], getattr(runner.positions, "gpu", runner.positions)[:padded]
        inputs[:count], places[:count] = self.tokens[:count], positions
        slots: dict[str, Tensor] = {}
        for builder, layers, table, own in self._groups:
            size = builder.config.page_size
            # In vLLM's own buffer, whose address its graphs may hold; what only pads is written nowhere.
            slot = table.slot_mapping.gpu[:padded]
            block = own[:count].gather(1, (positions // size)[:, None])[:, 0].long()
            slot[:count] = torch.where(lengths > 0, block * size + positions % size, -1)
            slot[count:] = -1
            slots |= dict.fromkeys(layers, slot)
        with set_forward_context(
            metadata, self._vllm_config, num_tokens=padded, cudagraph_runtime_mode=mode, batch_descriptor=graph,
            slot_mapping=slots,
        ):  # fmt: skip
            # With what the runner gives it: what was compiled for that takes nothing else.
            hidden = runner.model(input_ids=inputs, positions=places, intermediate_tensors=None, inputs_embeds=None)
        self.tokens[:count] = self._model.compute_logits(hidden[:count]).argmax(-1)
        lengths += lengths > 0
