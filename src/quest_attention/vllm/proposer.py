"""`QuestProposer`: the model drafts for itself, with Quest; stock attention checks what it drafted.

    --speculative-config '{"method": "custom_class", "model": "quest_attention.vllm.proposer.QuestProposer",
                           "num_speculative_tokens": 4}'

What a server answers is then what it answers without Quest, at temperature 0 token by token: Quest chooses in steps of
the draft alone, and each of its tokens is kept only if the model, reading everything, would have written it.

vLLM calls `propose` when a step's tokens are known. Its interface for classes from outside gives those and the rows'
tokens. The rest is the runner's, which `watch_requests` hands over: blocks, metadata builders, buffers. A draft step is
a step of single tokens at the next positions, for which vLLM keeps blocks (`reserve_slots`). It writes keys and values
there; the check writes all of them again, so that none of the draft's stays in a token that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

__all__ = ["QuestProposer"]


class QuestProposer:
    """Drafts the next tokens of every row. Names of methods and of their arguments are vLLM's.

    Args:
        vllm_config: A `VllmConfig`.
    """

    _runner: Any = None
    _model: Any = None

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        self._count = int(vllm_config.speculative_config.num_speculative_tokens)

    def load_model(self, model: Any) -> None:
        """The model that is served, which drafts."""
        self._model = model

    def meet_runner(self, runner: Any) -> None:
        """The `GPUModelRunner` of vLLM that is about to run a step."""
        self._runner = runner

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Drafts of each row of the batch; none of one that is still in its prompt.

        Args:
            sampled_token_ids: What the step wrote, by row.
            num_tokens_no_spec: Tokens of each row, these included, `[rows or more]`.
            token_ids_cpu: Them, `[rows or more, max_model_len]`.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [row for row, tokens in enumerate(sampled_token_ids) if tokens]
        if not rows:
            return drafts
        device = self._runner.device
        lengths = [int(num_tokens_no_spec[row]) for row in rows]
        last = [int(token_ids_cpu[row, length - 1]) for row, length in zip(rows, lengths, strict=True)]
        tokens = torch.tensor(last, dtype=torch.int32, device=device)
        chosen = torch.tensor(rows, device=device)
        written = []
        with ExitStack() as stack:
            for builder, *_others in self._groups():
                stack.enter_context(builder.drafting())
            for ahead in range(self._count):
                tokens = self._step(tokens, chosen, [length + ahead for length in lengths])
                written.append(tokens)
        for row, found in zip(rows, torch.stack(written, 1).tolist(), strict=True):  # the host waits once
            drafts[row] = found
        return drafts

    def _step(self, tokens: Tensor, rows: Tensor, lengths: list[int]) -> Tensor:
        """The tokens that follow `tokens` `[R]`, the last ones of these rows, now so long [tokens]: int32."""
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        runner, count, device = self._runner, len(lengths), tokens.device
        mode, padded, graph = self._graph_of(count)
        on_host = torch.tensor(lengths, dtype=torch.int32)
        seq_lens = on_host.to(device)
        positions = seq_lens.long() - 1
        inputs, places = runner.input_ids.gpu[:padded], getattr(runner.positions, "gpu", runner.positions)[:padded]
        inputs[:count], places[:count] = tokens, positions
        starts = torch.arange(count + 1, dtype=torch.int32)
        metadata: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        for builder, layers, table in self._groups():
            blocks, size = table.get_device_tensor(runner.input_batch.num_reqs)[rows], builder.config.page_size
            # In vLLM's own buffer, whose address a graph may hold; tokens that only pad one are written nowhere.
            slot = table.slot_mapping.gpu[:padded]
            slot[:count] = blocks.gather(1, (positions // size)[:, None])[:, 0].long() * size + positions % size
            slot[count:] = -1
            batch = CommonAttentionMetadata(
                query_start_loc=starts.to(device), query_start_loc_cpu=starts, seq_lens=seq_lens, num_reqs=count,
                num_actual_tokens=count, max_query_len=1, max_seq_len=max(lengths), block_table_tensor=blocks,
                slot_mapping=slot[:count], seq_lens_cpu_upper_bound=on_host,
            )  # fmt: skip
            built = builder.build(0, batch, fast_build=True)
            metadata |= dict.fromkeys(layers, built)
            slots |= dict.fromkeys(layers, slot)
        with set_forward_context(
            metadata, self._vllm_config, num_tokens=padded, cudagraph_runtime_mode=mode, batch_descriptor=graph,
            slot_mapping=slots,
        ):  # fmt: skip
            # With what the runner gives it: what was compiled for that takes nothing else.
            hidden = runner.model(input_ids=inputs, positions=places, intermediate_tensors=None, inputs_embeds=None)
        logits: Tensor = self._model.compute_logits(hidden[:count])
        return logits.argmax(-1).int()

    def _groups(self) -> Iterator[tuple[Any, list[str], Any]]:
        """Metadata builders with the names of their layers and vLLM's `BlockTable` of them."""
        for index, groups in enumerate(self._runner.attn_groups):
            for group in groups:
                yield group.get_metadata_builder(), group.layer_names, self._runner.input_batch.block_table[index]

    def _graph_of(self, count: int) -> tuple[Any, int, Any]:
        """How vLLM runs so many tokens: in graphs of the pieces between attention, of more tokens, or without."""
        from vllm.config import CUDAGraphMode

        modes = {CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE}
        mode, graph = self._runner.cudagraph_dispatcher.dispatch(count, valid_modes=modes)
        return mode, graph.num_tokens, graph
